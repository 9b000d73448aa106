"""The Stream top-k block search: which key blocks each query head reads, in near-linear time (arXiv 2510.19875)."""
