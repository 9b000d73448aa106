"""Wraps the runner and the worker so that the capture sees each step, without ever disturbing the engine.

The runner is wrapped, not the worker: Ray calls `worker.model_runner.execute_model` directly
(v1/executor/ray_utils.py:144), and model runner V2 warms up through `worker.execute_model` with invented requests.
"""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from stream_monitor.engine.capture import Capture

log = logging.getLogger("vllm.stream_monitor")

REPLACES_CACHE = (
    "sleep",
    "wake_up",
    "discard",
    "update_weights",
    "finish_weight_update",
    "reload_weights",
    "reset_weights",
)
"""Worker methods after which no key in the cache can be trusted (v1/worker/gpu_worker.py)."""


def install_runner_hooks(runner: Any, capture: Capture) -> None:
    """Wrap `execute_model` and `sample_tokens` of this runner."""
    execute_model, sample_tokens = runner.execute_model, runner.sample_tokens

    @functools.wraps(execute_model)
    def hooked_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return execute_model(scheduler_output, *args, **kwargs)
        guard(capture, capture.before_step, scheduler_output)
        output = execute_model(scheduler_output, *args, **kwargs)
        guard(capture, capture.after_forward, output is None)
        return output

    @functools.wraps(sample_tokens)
    def hooked_sample_tokens(*args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(*args, **kwargs)
        guard(capture, capture.after_sampling, output)
        return output

    runner.execute_model, runner.sample_tokens = hooked_execute_model, hooked_sample_tokens


def install_worker_hooks(worker: Any, capture: Capture, replaced: Callable[[], None]) -> None:
    """Drain the estimator before, and invalidate every row after, whatever replaces the cache or the weights; then,
    where the weights can be read, call `replaced`, while no search runs."""

    def hooked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            def read_again() -> None:
                if _weights_are_there(name, args, kwargs):
                    replaced()

            guard(capture, capture.invalidate)
            try:
                return method(*args, **kwargs)
            finally:
                guard(capture, capture.invalidate)
                guard(capture, read_again)

        return call

    for name in REPLACES_CACHE:
        if (method := getattr(worker, name, None)) is not None:
            setattr(worker, name, hooked(name, method))


def _weights_are_there(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the weights' memory is mapped after this call: to read it while it is not would end the engine
    (device_allocator/cumem.py). It is until sleep or discard give it away, and again when wake_up brings it back."""
    if name == "wake_up":
        tags = kwargs.get("tags", args[0] if args else None)
        return tags is None or "weights" in tags
    return name not in ("sleep", "discard")


def guard(capture: Capture, step: Callable[..., None], *args: Any) -> None:
    """Call a part of the capture, and take its time; any exception becomes its fault, never the engine's."""
    begin = time.perf_counter_ns()
    try:
        step(*args)
    except Exception as error:
        log.debug("Stream Monitor: fault", exc_info=True)
        capture.fail(f"{step.__name__}: {type(error).__name__}: {error}")
    capture.governor.add(step.__name__, time.perf_counter_ns() - begin)
