"""`stream-monitor vllm MODEL [vllm flags]`: vLLM's own OpenAI-compatible server with the capture in its workers.

The CPU build's `vllm` command fails (it looks for a distribution called vllm), so the server's module is run, which
works on every build.
"""

import os
import sys

WORKER = "stream_monitor.engine.worker.StreamWorker"
SERVER = "vllm.entrypoints.openai.api_server"


def command(model: str, flags: list[str]) -> list[str]:
    """The command line that serves `model` with the capture.

    Raises:
        ValueError: the flags choose another worker class.
    """
    if any(flag == "--worker-cls" or flag.startswith("--worker-cls=") for flag in flags):
        raise ValueError(f"--worker-cls: stream-monitor vllm sets it to {WORKER}; leave it out, or start vLLM yourself")
    return [sys.executable, "-m", SERVER, "--model", model, "--worker-cls", WORKER, *flags]


def main(model: str, flags: list[str]) -> int:
    """Replace this process by the server; returns 2, with one line, if flags, settings or VLLM_PLUGINS cannot work."""
    from stream_monitor.config import CaptureSettings, SettingsError, load
    from stream_monitor.engine.compat.plugins import not_loaded

    try:
        settings = load(CaptureSettings)
        line = command(model, flags)
        if not settings.disable and (reason := not_loaded()):
            # Somebody's list of what may be loaded is not ours to change.
            raise ValueError(f"{reason}; add stream_monitor to it, or unset it")
    except (SettingsError, ValueError) as error:
        print(f"stream-monitor vllm: {error}", file=sys.stderr)
    else:
        os.execv(line[0], line)
    return 2
