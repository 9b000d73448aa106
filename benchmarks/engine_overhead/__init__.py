"""What the plug-in costs a user of the engine: `python -m benchmarks.engine_overhead`."""
