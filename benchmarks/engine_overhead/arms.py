"""The engines that are compared, each in a process of its own, and the monitor that those with a capture publish to."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine_process import EngineProcess

STREAM_WORKER = "stream_monitor.engine.worker.StreamWorker"
EVERYTHING = {"STREAM_MONITOR_STRIDE": "1", "STREAM_MONITOR_LAYERS": "all", "STREAM_MONITOR_HEADS": "all"}
ARMS: dict[str, dict[str, str] | None] = {
    "plain": None,
    "off": {"STREAM_MONITOR_DISABLE": "1"},
    "capturing": {},
    "everything": EVERYTHING,
}
"""Settings of the plug-in; None for the engine without it."""


class Arm(EngineProcess):
    """An engine in a process of its own (`benchmarks.engine_overhead.engine`).

    Attributes:
        captures: whether it does, unless paused.
    """

    def __init__(self, name: str, engine: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        settings = ARMS[name]
        self.captures = settings is not None and name != "off"
        if settings is not None:
            engine = engine | {"worker_cls": STREAM_WORKER}
        own = (
            environment
            | (settings or {})
            | {
                "STREAM_MONITOR_MAX_OVERHEAD": "0",
                "STREAM_MONITOR_ALLOW_UNTESTED_ENGINE": "1",
            }
        )
        asked = {"engine": engine, "captures": self.captures}
        super().__init__(name, "benchmarks.engine_overhead.engine", asked, own, log)


@contextmanager
def monitor(folder: Path) -> Iterator[str]:
    """The sidecar that the capturing engines publish to; its address."""
    address = f"unix:{folder / 'ingest.sock'}"
    addresses = ["--ingest", address, "--grpc", f"unix:{folder / 'grpc.sock'}", "--http", "127.0.0.1:0"]
    with (folder / "monitor.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stream_monitor", "serve", *addresses], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)


def engine_arguments(
    source: str,
    dummy: bool,
    longest: int,
    requests: int,
    dtype: str,
    gpu_memory: float,
    compiled: bool,
    backend: str,
    seed: int,
) -> dict[str, Any]:
    """What all arms are started with."""
    import torch

    arguments: dict[str, Any] = {
        "model": source,
        "dtype": dtype,
        "max_model_len": longest + 1,
        "max_num_seqs": requests,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": dummy,
        "seed": seed,
    }
    if dummy:
        arguments |= {"load_format": "dummy", "generation_config": "vllm"}
    if torch.cuda.is_available():
        arguments["gpu_memory_utilization"] = gpu_memory
        # Else vLLM measures what is left, and the engines beside it disturb that.
        arguments["kv_cache_memory_bytes"] = int(gpu_memory * torch.cuda.get_device_properties(0).total_memory)
        # One size for all: else the memory of block summaries would change the schedule.
        arguments["num_gpu_blocks_override"] = 1 + requests * -(-(longest + 1) // 16)
        arguments["block_size"] = 16
        if backend:
            arguments["attention_config"] = {"backend": backend}
    else:
        # As in a server; vLLM would else put the worker into the process of the core, where its threads are not bound.
        arguments["distributed_executor_backend"] = "mp"
        arguments["enforce_eager"] = not compiled
        arguments["block_size"] = 32
        arguments["num_gpu_blocks_override"] = 1 + requests * -(-(longest + 1) // 32)
    return arguments
