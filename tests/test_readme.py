"""The README's commands exist and its subscriber runs as printed."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stream_monitor.cli import app
from stream_monitor.config import MonitorSettings
from tests.monitor.conftest import TIMEOUT, Running, starter
from tests.monitor.synthetic import Engine

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```(?:sh|python)\n(.*?)```|`([^`\n]+)`", README, re.DOTALL)
COMMANDS = "\n".join(block or inline for block, inline in CODE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    yield from starter(tmp_path)


def test_the_subscriber_prints_a_shift(start: Callable[..., Running]) -> None:
    monitor = start()
    (programme,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(programme.splitlines()) <= 11
    address = MonitorSettings.model_fields["grpc"].default
    assert programme.count(address) == 1
    process = subprocess.Popen(
        [sys.executable, "-c", programme.replace(address, monitor.server.grpc_address)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")},
    )
    # Ends the wait for a line that never comes.
    timer = threading.Timer(3 * TIMEOUT, process.kill)
    timer.start()
    try:
        while not monitor.metric("stream_monitor_subscribers"):
            assert process.poll() is None
        monitor.publish(Engine().request("chatcmpl-my-req-1-aee6d49e", [4] * 14 + [30] * 8))
        assert process.stdout is not None
        line = process.stdout.readline()
    finally:
        timer.cancel()
        process.kill()
        process.communicate()
    assert line.startswith("EVENT_KIND_ANCHOR_SHIFT chatcmpl-my-req-1 at sentence 2")
    assert "moved from sentence 0 to sentence 5" in line


def test_the_commands_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    used = set(re.findall(r"stream-monitor (\w+)", COMMANDS))
    assert used == known
    targets = set(re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", COMMANDS)) <= targets


def test_the_worker_class_is_where_the_readme_says() -> None:
    from stream_monitor.engine.launch import WORKER

    assert f"--worker-cls {WORKER}" in COMMANDS
    module, _, name = WORKER.rpartition(".")
    assert f"class {name}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text()
