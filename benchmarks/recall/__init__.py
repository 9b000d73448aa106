"""How much of the attention each search finds for the keys it reads: `python -m benchmarks.recall`."""
