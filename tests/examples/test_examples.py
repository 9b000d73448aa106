"""The programs in docs/examples, as a reader runs them, across a kill of a real monitor on its store."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.monitor.test_store import stored, until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def node() -> Path:
    """The folder of the Node example, its packages installed where its reader would have them."""
    folder = EXAMPLES / "node"
    done = folder / "node_modules" / ".package-lock.json"
    if not done.exists() or done.stat().st_mtime < (folder / "package.json").stat().st_mtime:
        command = ["npm", "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, timeout=80)
    return folder


@pytest.fixture
def process(tmp_path: Path) -> Iterator[MonitorProcess]:
    running = MonitorProcess(tmp_path)
    yield running
    running.kill()


class Program:
    """A running example, line by line; killed if a line does not come."""

    def __init__(self, *command: str, folder: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._timer = threading.Timer(60, self.process.kill)
        self._timer.start()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def error_until(self, text: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text in line:
                return line
        raise AssertionError(f"ended without {text!r}")

    def stop(self) -> None:
        self._timer.cancel()
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def test_the_node_client_resumes_across_a_kill_of_the_monitor(node: Path, process: MonitorProcess) -> None:
    rank = Engine()
    program = Program("node", "follow.js", process.address, folder=node)
    try:
        program.error_until("subscribed at")
        process.publish(rank.request("before-aaaaaaaa", SHIFTING))
        first = json.loads(program.line())
        assert (first["kind"], first["externalId"], first["lost"]) == ("EVENT_KIND_ANCHOR_SHIFT", "before", 0)
        assert "moved from sentence 0 to sentence 5" in first["summary"]
        process.kill()
        program.error_until("trying again")
        process.start()
        program.error_until(f"subscribed at {first['cursor']}")
        process.publish(rank.request("after-aaaaaaaa", SHIFTING))
        second = json.loads(program.line())
        assert second["externalId"] == "after"
        # What comes while nobody listens waits in the store.
        program.stop()
        process.publish(rank.request("meanwhile-aaaaaaaa", SHIFTING) + rank.request("later-aaaaaaaa", SHIFTING))
        until(lambda: stored(process.store, "SELECT count(*) FROM events") == [(4,)])
        process.kill()
        process.start()
        program = Program("node", "follow.js", process.address, second["cursor"], folder=node)
        assert [json.loads(program.line())["externalId"] for _ in range(2)] == ["meanwhile", "later"]
    finally:
        program.stop()


def test_the_node_client_says_that_events_are_missing(node: Path, process: MonitorProcess) -> None:
    process.publish(Engine().request("held-aaaaaaaa", SHIFTING))
    program = Program("node", "follow.js", process.address, "YWJjOjA=", folder=node)
    try:
        assert "cursor is of another monitor start" in program.error_until("events are missing")
        assert json.loads(program.line())["externalId"] == "held"
    finally:
        program.stop()


def test_the_python_example_goes_on_where_it_ended(process: MonitorProcess, tmp_path: Path) -> None:
    rank = Engine()
    script = str(EXAMPLES / "python" / "follow.py")
    cursor = str(tmp_path / "cursor")
    for name in ("first", "second"):
        process.publish(rank.request(f"{name}-aaaaaaaa", SHIFTING))
        program = Program(sys.executable, script, process.address, cursor, folder=tmp_path)
        try:
            assert program.line().startswith(f"{name}: at sentence 2")
            while not Path(cursor).exists():
                pass
        finally:
            program.stop()
        process.kill()
        process.start()


def test_the_asyncio_example(process: MonitorProcess, tmp_path: Path) -> None:
    process.publish(Engine().request("one-aaaaaaaa", SHIFTING))
    program = Program(sys.executable, str(EXAMPLES / "python" / "follow_async.py"), process.address, folder=tmp_path)
    try:
        lines = {program.line(), program.line()}
        assert "0 of 1 requests run\n" in lines
        assert any(line.startswith("one: at sentence 2") for line in lines)
    finally:
        program.stop()


def test_no_lock_file_with_hosts_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files", "docs/examples"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "lock" not in listed
    versions = json.loads((EXAMPLES / "node" / "package.json").read_text())["dependencies"].values()
    assert all(version[0].isdigit() for version in versions)
