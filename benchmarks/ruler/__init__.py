"""Whether a model that reads only the kept blocks still solves RULER's tasks: `python -m benchmarks.ruler`."""
