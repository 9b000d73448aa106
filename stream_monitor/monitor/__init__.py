"""The sidecar: takes in step summaries, keeps a trace per request, raises events, serves subscribers and Prometheus.

Everything runs on one event loop, so nothing here locks. It imports neither torch nor vllm.
"""
