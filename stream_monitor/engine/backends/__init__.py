"""Subclasses of vLLM's attention backends that keep the query rows of watched layers; one module per native backend.

Each is registered over the native member, so every choice the engine makes stays its own (engine-side rule: selection,
block sizes, graph support, draft and encoder layers are vLLM's business).
"""
