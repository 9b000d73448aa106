"""The process beside each worker that reads its ring and streams summaries to the monitor.

`launch` is the worker's side of it and imports no gRPC; everything else runs in the publisher's own process.
"""
