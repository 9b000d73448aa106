"""The demo's programme, top to bottom: weights, monitor, engine, questions, account.

python -m stream_monitor.demo [--once] [--model DIR]
"""

import argparse
import asyncio
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from stream_monitor.config import PREFIX
from stream_monitor.demo.client import QUESTIONS, DemoError, Reply, ask_all
from stream_monitor.demo.ledger import settled_ledger
from stream_monitor.demo.processes import Child, Children
from stream_monitor.demo.screen import Screen
from stream_monitor.demo.weights import is_complete

MODEL_NAME = "SmolLM2-135M-Instruct"
# Beside the interpreter that runs the demo, so that no activated environment is needed.
COMMAND = str(Path(sys.executable).with_name("stream-monitor"))
MONITOR_READY_SECONDS = 30
# About 40 on two cores; a first start on a slow disk takes longer.
ENGINE_READY_SECONDS = 300
FRAMES_PER_SECOND = 4


@dataclass(frozen=True)
class Addresses:
    """Where the demo's own monitor and engine listen: free ports and a private socket, beside whatever else runs."""

    ingest: str
    grpc: str
    http: str
    engine: str


def main() -> None:
    """Run the demo; the exit code is 0, 1 for a failure, 130 for Ctrl-C or a signal."""
    parser = argparse.ArgumentParser(prog="python -m stream_monitor.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--once", action="store_true", help="end after the first answers, with a JSON object last")
    default = Path(os.environ.get("MODEL_CACHE", ".cache/models")) / "smollm2"
    parser.add_argument("--model", type=Path, default=default, help="model folder, fetched if absent (%(default)s)")
    options = parser.parse_args()
    console = Console()
    # Named before it is made, and made where signals are exceptions: at no moment can one of them leave it behind.
    folder = Path(tempfile.gettempdir(), f"stream-monitor-demo-{secrets.token_hex(8)}")
    try:
        with Children() as children:
            folder.mkdir(mode=0o700)
            _run(console, children, folder, options.model, once=options.once)
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        console.print("Stopped.")
        sys.exit(130)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _run(console: Console, children: Children, folder: Path, model: Path, *, once: bool) -> None:
    if not is_complete(model):
        _fetch(model)
    at = _free_addresses(folder)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        monitor = _start_monitor(children, folder, at, model)
        _wait(progress, "Starting the monitor", monitor, f"http://{at.http}/readyz", MONITOR_READY_SECONDS)
        engine = _start_engine(children, folder, at, model)
        what = f"Starting vLLM with {MODEL_NAME} (about 40 s)"
        _wait(progress, what, engine, f"{at.engine}/health", ENGINE_READY_SECONDS)
    console.print(f"Open in a browser on this machine, and watch: [bold]http://{at.http}/[/]\n", highlight=False)
    replies = _ask(console, at, [Reply(f"demo-{i}", question) for i, question in enumerate(QUESTIONS, 1)])
    if once:
        _print_account(at, replies)
        return
    while question := _next_question(console, at):
        replies += _ask(console, at, [Reply(f"demo-{len(replies) + 1}", question)])


def _fetch(model: Path) -> None:
    # A process of its own: it loads torch, and its memory is needed for the engine afterwards.
    result = subprocess.run([sys.executable, "-m", "stream_monitor.demo.weights", str(model)])
    if result.returncode != 0:
        raise DemoError("there are no weights to serve (the line above says why)")


def _start_monitor(children: Children, folder: Path, at: Addresses, model: Path) -> Child:
    settings = {PREFIX + "INGEST": at.ingest, PREFIX + "GRPC": at.grpc, PREFIX + "HTTP": at.http}
    # The text of the demo is nobody else's business: it is kept in memory alone.
    settings |= {PREFIX + "TOKENIZERS": str(model.resolve()), PREFIX + "STORE": ""}
    return children.start("the monitor", [COMMAND, "serve"], folder / "monitor.log", os.environ | settings)


def _start_engine(children: Children, folder: Path, at: Addresses, model: Path) -> Child:
    host, _, port = at.engine.removeprefix("http://").rpartition(":")
    command = [COMMAND, "vllm", str(model.resolve()), "--served-model-name", MODEL_NAME, "--host", host, "--port", port]
    command += ["--max-model-len", "4096", "--max-num-seqs", "8", "--enforce-eager"]
    settings = {
        PREFIX + "TARGET": at.ingest,
        # Off by default. Here the text is the visitor's own and stays on this machine.
        PREFIX + "SEND_TOKEN_IDS": "true",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        # The demo needs no network once it has the weights, and reports to nobody.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return children.start("vLLM", command, folder / "engine.log", os.environ | settings)


def _wait(progress: Progress, what: str, child: Child, url: str, seconds: float) -> None:
    """Wait until `url` answers 200. Raises DemoError that quotes the child's log if it dies or takes too long."""
    task = progress.add_task(what, total=None)
    deadline = time.monotonic() + seconds
    while not _answers(url):
        if child.process.poll() is not None:
            raise _failure(child, f"ended with code {child.process.returncode}")
        if time.monotonic() > deadline:
            raise _failure(child, f"was not ready after {seconds:.0f} s")
        time.sleep(0.2)
    progress.update(task, description=f"{what}: ready", total=1, completed=1)


def _failure(child: Child, what: str) -> DemoError:
    with tempfile.NamedTemporaryFile(prefix=f"{child.log.stem}-", suffix=".log", delete=False) as out:
        out.write(child.log.read_bytes())
    return DemoError(f"{child.name} {what} (whole log: {out.name}):\n{child.last_words()}")


def _answers(url: str) -> bool:
    # HTTPError (503: not ready yet) is a URLError, which is an OSError, as a refused connection is.
    with suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
        return bool(response.status == 200)
    return False


def _ask(console: Console, at: Addresses, replies: list[Reply]) -> list[Reply]:
    screen = Screen(replies)
    asking = ask_all(at.engine, at.grpc, MODEL_NAME, replies)
    if console.is_terminal:
        with Live(screen, console=console, refresh_per_second=FRAMES_PER_SECOND):
            asyncio.run(asking)
    else:  # in a file or a pipe only the last state is of use
        try:
            asyncio.run(asking)
        finally:
            console.print(screen)
    return replies


def _next_question(console: Console, at: Addresses) -> str:
    console.print(
        "\nAsk something that needs a few steps of thought; an empty line or Ctrl-C ends the demo, and the page at "
        f"http://{at.http}/ with it.",
        highlight=False,
    )
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""


def _print_account(at: Addresses, replies: Sequence[Reply]) -> None:
    account = settled_ledger(at.http)
    if fault := account.fault():
        raise DemoError(fault)
    tokens = sum(len(reply.output_ids) for reply in replies)
    events = sum(len(reply.findings) for reply in replies)
    print(json.dumps({"requests": len(replies), "tokens": tokens, **asdict(account), "events": events}), flush=True)


def _free_addresses(folder: Path) -> Addresses:
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        ports = []
        # All three are held until each has its number, so that no two are the same.
        for held in (first, second, third):
            held.bind(("127.0.0.1", 0))
            ports.append(held.getsockname()[1])
    grpc, http, engine = ports
    return Addresses(
        ingest=f"unix:{folder / 'ingest.sock'}",
        grpc=f"127.0.0.1:{grpc}",
        http=f"127.0.0.1:{http}",
        engine=f"http://127.0.0.1:{engine}",
    )
