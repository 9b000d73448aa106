"""Stream Monitor: what a chain of thought rests on, seen while vLLM serves it."""

__version__ = "0.1.0"
