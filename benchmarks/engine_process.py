"""An engine in a process of its own that is asked for one thing after the other: one JSON object a line, each way."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STOP_SECONDS = 60


class EngineEnded(RuntimeError):
    """The process ended instead of answering; the message holds the end of its log."""


class EngineProcess:
    """The side that asks. `python -m MODULE ASKED` runs from construction to `stop`.

    Attributes:
        started: what the engine said when it was up.
    """

    def __init__(self, name: str, module: str, asked: Any, environment: dict[str, str], log: Path) -> None:
        self.name, self._log, self._environment = name, log, environment
        self._command = [sys.executable, "-m", module, json.dumps(asked)]
        self.start()

    def start(self) -> None:
        """Start it (again). Raises EngineEnded."""
        with self._log.open("a") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )
        self.started = self._answer()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the engine's method `do` returns. Raises EngineEnded."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End it, if it has not ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-25:])
            raise EngineEnded(f"the engine `{self.name}` ended:\n{tail}")
        return json.loads(line)


def serve(make: Callable[[], Any]) -> None:
    """The side that answers, until standard input ends: `make` gives an engine with `started` and `stop`, whose other
    methods are asked for."""
    # vLLM and its processes write to standard output too: answers get a copy of it, the rest goes to standard error.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        # The core is stepped by hand, in this process; requests have the ids that they are given.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
        try:
            engine = make()
            print(json.dumps(engine.started), file=answers)
            for line in sys.stdin:
                request = json.loads(line)
                print(json.dumps(getattr(engine, request.pop("do"))(**request)), file=answers)
            engine.stop()
        except BaseException:
            # Into the log, before the other side learns that there is no answer; the process itself may not end then.
            traceback.print_exc()
            raise
