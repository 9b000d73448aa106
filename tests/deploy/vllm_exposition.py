"""A stand-in for vLLM's `/metrics`: the exposition of a real server, with the figures that move under load moving."""

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.deploy.promql import VLLM_EXPOSITION

TOKENS_PER_SECOND = 100.0
MOVING = {
    "vllm:generation_tokens_total": TOKENS_PER_SECOND,
    "vllm:inter_token_latency_seconds_count": TOKENS_PER_SECOND,
    "vllm:inter_token_latency_seconds_sum": 1.0,
}
"""Counter to its rise per second."""
STANDING = {"vllm:num_requests_running": 3.0, "vllm:num_requests_waiting": 1.0, "vllm:kv_cache_usage_perc": 0.4}


class VllmExposition:
    """Serves it on `address` until `close`; from `begin` on, tokens are generated."""

    def __init__(self) -> None:
        recorded = VLLM_EXPOSITION.read_text()
        exposition = self
        self._began: float | None = None

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seconds = time.monotonic() - exposition._began if exposition._began is not None else 0.0
                values = STANDING | {name: 10.0 + rise * seconds for name, rise in MOVING.items()}
                text = recorded
                for name, value in values.items():
                    text, count = re.subn(rf"^({name}{{[^}}]*}}) .*$", rf"\g<1> {value}", text, flags=re.MULTILINE)
                    assert count == 1, name
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def begin(self) -> None:
        """The figures of load begin to rise."""
        self._began = time.monotonic()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
