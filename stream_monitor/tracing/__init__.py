"""Sparse Tracing offline: one pass of a Hugging Face model over a long context, and which key blocks its heads read.

Stream (arXiv 2510.19875) rebuilt on the search of `stream_kernels`: `model.py` loads and refuses, `trace.py` runs the
pass, `masks.py` keeps what it found, `fidelity.py` asks whether a model restricted to those blocks still behaves alike.
"""
