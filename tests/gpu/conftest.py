"""What only an engine's own process may import: it makes vLLM take a CPU for a GPU."""

collect_ignore = ["interpreted_engine.py", "pretend_cuda.py"]
