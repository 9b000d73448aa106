"""Every fact about vLLM's internals that the plug-in relies on, and nothing else.

`engine` knows the engine as a whole, `parallel` a worker's place among its ranks, `layers` its attention layers and
their caches, `schedule` what the scheduler says, `runner` what we ask of a model runner, `runner_v1` and `runner_v2`
how each answers, `doctor` how to build a model's layers without an engine.
"""
