"""The capture on CPU engines: rows copied by the forward pass itself, keys searched by compiled numba code."""
