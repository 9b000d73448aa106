"""`--worker-cls stream_monitor.engine.worker.StreamWorker`: vLLM's own worker of this platform, plus the capture.

It overrides nothing of the decode path; it only installs hooks as the worker passes its life's stations.
"""

import logging
from collections.abc import Callable
from typing import Any

from stream_monitor.engine.compat.engine import native_worker_class
from stream_monitor.engine.policy import disabled

log = logging.getLogger("vllm.stream_monitor")

NativeWorker: Any = native_worker_class()


class StreamWorker(NativeWorker):
    """The native worker. With `STREAM_MONITOR_DISABLE=1`, or after any fault in set-up, exactly that."""

    stream_installation: Any = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then plan the capture and install its hooks."""
        super().load_model(*args, **kwargs)
        if not disabled():
            self._station("plan", self._plan)

    def determine_available_memory(self) -> int:
        """Memory for the KV cache, less what block summaries will take of it where vLLM sizes the cache itself."""
        available: int = super().determine_available_memory()
        installation = self.stream_installation
        if installation is not None:
            self._station("charge", lambda: installation.charge(available))
        return self.stream_installation.left_for_cache if self.stream_installation is not None else available

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the KV cache, then compile and check the search on it."""
        super().initialize_from_config(*args, **kwargs)
        if self.stream_installation is not None:
            self._station("bind", self.stream_installation.bind)

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, then arm: what ran so far were the engine's own trials."""
        result = super().compile_or_warm_up_model()
        if self.stream_installation is not None:
            self._station("arm", self.stream_installation.arm)
        return result

    def shutdown(self) -> None:
        """Stop the capture before the cache goes away."""
        if self.stream_installation is not None:
            self._station("close", self.stream_installation.close)
        super().shutdown()

    def stream_monitor_status(self) -> dict[str, Any]:
        """Plan, faults and counts of this rank; for `collective_rpc("stream_monitor_status")`."""
        if self.stream_installation is None:
            return {"capturing": False, "reason": "disabled, or a fault at load; see the log"}
        return self.stream_installation.status()

    def stream_monitor_pause(self) -> None:
        """Capture nothing until `stream_monitor_resume`; requests are followed on; for `collective_rpc`."""
        if self.stream_installation is not None:
            self.stream_installation.pause(True)

    def stream_monitor_resume(self) -> None:
        """Capture again, without a restart; for `collective_rpc`."""
        if self.stream_installation is not None:
            self.stream_installation.pause(False)

    def _plan(self) -> None:
        # Imported here, so that a fault of the import is a fault of the capture and not of the engine.
        from stream_monitor.engine.installation import Installation

        self.stream_installation = Installation.plan(self)

    def _station(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            log.exception("Stream Monitor: capture is off, serving goes on: %s failed: %s", name, error)
            self.stream_installation = None
