"""One module per question: `python -m benchmarks.NAME --help`. A JSON line comes last; a missed must exits 1."""
