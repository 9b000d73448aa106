"""The command line: what it says, what it refuses, what it loads."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc
from tests.monitor.conftest import Running, run, until
from tests.monitor.synthetic import Engine

__all__ = ["run"]  # the fixture

CHAT = "chatcmpl-my-req-1-aee6d49e"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stream_monitor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def test_version_and_help() -> None:
    assert command("--version").stdout.startswith("stream-monitor 0.")
    text = command("--help").stdout
    assert all(name in text for name in ("serve", "watch", "vllm", "doctor"))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom stream_monitor.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'vllm', 'grpc', 'numpy', 'numba', 'uvicorn') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "[]"


def test_serve_help_lists_every_setting() -> None:
    text = command("serve", "--help").stdout
    assert all(flag in text for flag in ("--ingest", "--max-message-bytes", "--insecure"))


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (("serve", "--max-tarces", "3"), {}, ("--max-tarces", "--max-traces")),
        (("serve", "--max-traces", "many"), {}, ("max_traces", "many", "integer")),
        (("serve", "--max-traces"), {}, ("--max-traces", "needs a value")),
        (("serve", "--grpc", "9750"), {}, ("grpc", "host:port")),
        (("serve", "--grpc=0.0.0.0:0"), {}, ("grpc", "--insecure")),
        (("serve",), {"STREAM_MONITOR_MAX_TRACES": "0"}, ("max_traces", "greater than or equal to 1")),
        (("serve",), {"STREAM_MONITOR_MAX_TARCES": "1"}, ("STREAM_MONITOR_MAX_TARCES", "STREAM_MONITOR_MAX_TRACES")),
        (("watch", "--target", "nowhere"), {}, ("--target", "host:port")),
        (("watch", "--kind", "shift"), {}, ("--kind", "anchor_shift")),
    ],
)
def test_a_wrong_value_is_one_line_with_the_key_and_what_is_valid(
    arguments: tuple[str, ...], environment: dict[str, str], named: tuple[str, ...]
) -> None:
    done = command(*arguments, **environment)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in named)
    assert "Traceback" not in done.stderr


def test_commands_of_the_engine_get_their_arguments(tmp_path: Path) -> None:
    # Stands in for the engine's modules, which bring torch.
    code = (
        "import sys, types\n"
        "def fake(name, main):\n"
        "    module = types.ModuleType(name); module.main = main; sys.modules[name] = module\n"
        "fake('stream_monitor.engine.launch', lambda model, flags: print(model, flags) or 0)\n"
        "fake('stream_monitor.engine.doctor', lambda model: print(model) or 1)\n"
        "from stream_monitor.cli import main\n"
        "main()"
    )

    def called(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30)
        return done.returncode, done.stdout.strip()

    flags = ["--max-model-len", "512", "--help", "-tp=2", "--enforce-eager"]
    assert called("vllm", "some/model", *flags) == (0, f"some/model {flags}")
    assert called("doctor", "some/model") == (1, "some/model")


def published(monitor: Running, request_id: str) -> None:
    stub = ingest_pb2_grpc.IngestServiceStub(monitor.ingest_channel)
    summaries = Engine().request(request_id, [4] * 14 + [30] * 8)
    list(stub.Publish(iter([ingest_pb2.PublishRequest(summary=summary) for summary in summaries])))


def wait_for_subscribers(monitor: Running, number: int = 1) -> None:
    until(lambda: len(monitor.server.log.subscribers) >= number, 20)


Watch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def watching() -> Iterator[Watch]:
    """Starts `stream-monitor watch`, which goes on until it is told to end."""
    processes = []

    def start(monitor: Running, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "stream_monitor", "watch", "--target", monitor.server.grpc_address, *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            # Buffered, as where a user starts it: each line has to be flushed.
            env=os.environ | {"COLUMNS": "160", "PYTHONUNBUFFERED": ""},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def test_watch_prints_one_event_a_line_and_outlives_the_monitor(
    run: Callable[..., Running], watching: Watch, tmp_path: Path
) -> None:
    first = run()
    process = watching(first, "--json", "--request", "my-req-1")
    assert process.stdout is not None
    wait_for_subscribers(first)
    published(first, "chatcmpl-other-aee6d49e")
    published(first, CHAT)
    event = json.loads(process.stdout.readline())
    assert (event["kind"], event["external_id"], event["request_id"]) == ("ANCHOR_SHIFT", "chatcmpl-my-req-1", CHAT)
    assert event["severity"] == "WARNING"
    assert event["to_anchors"][0]["sentence"]["index"] == 5
    first.call(first.server.stop())
    first.stopped = True
    second = run(grpc=first.server.grpc_address, ingest=f"unix:{tmp_path / 'second.sock'}")
    wait_for_subscribers(second)
    published(second, CHAT)
    assert json.loads(process.stdout.readline())["engine_instance"] != event["engine_instance"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, 130)
    assert "Traceback" not in errors


def test_watch_prints_plain_lines_where_there_is_no_terminal(run: Callable[..., Running], watching: Watch) -> None:
    monitor = run()
    interrupted, cut_off = watching(monitor), watching(monitor)
    assert interrupted.stdout is not None
    assert cut_off.stdout is not None
    wait_for_subscribers(monitor, 2)
    published(monitor, CHAT)
    line = interrupted.stdout.readline()
    assert cut_off.stdout.readline() == line
    assert re.fullmatch(r"\S+ chatcmpl-my-req-1 ANCHOR_SHIFT WARNING at sentence \d+ the anchors moved .+\n", line)
    # As `head -1` ends: what comes next has nobody to read it.
    cut_off.stdout.close()
    published(monitor, "chatcmpl-my-req-2-aee6d49e")
    assert interrupted.stdout.readline().split()[1] == "chatcmpl-my-req-2"
    interrupted.send_signal(signal.SIGINT)
    for process in (interrupted, cut_off):
        assert process.stderr is not None
        assert (process.wait(20), process.stderr.read()) == (0, "")


def test_watch_shows_a_table_in_a_terminal(run: Callable[..., Running], watching: Watch) -> None:
    monitor = run()
    published(monitor, CHAT)
    screen, terminal = os.openpty()
    process = watching(monitor, "--all", stdout=terminal)
    os.close(terminal)
    shown = ""
    while not re.search(r"Requests, newest first.*chatcmpl-my-req-1 .*finished", shown, re.DOTALL):
        shown += os.read(screen, 1 << 16).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    os.close(screen)
