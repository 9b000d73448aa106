"""Whether vLLM loads the plug-in at all.

Paths are under `vllm/`, read in 0.32.0.
"""

import os

NAME = "stream_monitor"


def not_loaded() -> str:
    """Why vLLM does not load the plug-in; empty if it does. What stands between commas it takes for a name as it is
    (envs.py:1172, plugins/__init__.py:64)."""
    listed = os.environ.get("VLLM_PLUGINS")
    if listed is None or NAME in listed.split(","):
        return ""
    spaced = NAME in map(str.strip, listed.split(","))
    why = "with a space, which vLLM takes for a part of the name" if spaced else f"without {NAME}"
    return f"VLLM_PLUGINS is {listed!r}, {why}: vLLM does not load the plug-in"
