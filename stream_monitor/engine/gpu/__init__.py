"""The capture on CUDA engines: rows gathered by a kernel that CUDA graphs contain, keys searched on a side stream.

What has and has not run on a GPU: docs/design.md.
"""
