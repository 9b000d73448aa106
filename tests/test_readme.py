"""The README's commands exist; tests/docs runs what can be run of them."""

import re
from pathlib import Path

from typer.main import get_command

from stream_monitor.cli import app
from tests.docs.blocks import blocks

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"```(?:sh|python)[^\n]*\n(.*?)```|`([^`\n]+)`", README, re.DOTALL)
COMMANDS = "\n".join(block or inline for block, inline in CODE)


def test_a_subscriber_is_a_few_lines() -> None:
    # That it prints a shift is seen by running it: tests/docs.
    (programme,) = (block for block in blocks(ROOT / "README.md") if block.language == "python")
    assert programme.mode == "run until ANCHOR_SHIFT chatcmpl-live-"
    assert len(programme.text.splitlines()) <= 11


def test_the_commands_exist() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"stream-monitor (\w+)", COMMANDS))
    assert used == known
    targets = set(re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", COMMANDS)) <= targets


def test_the_worker_class_is_where_the_readme_says() -> None:
    from stream_monitor.engine.launch import WORKER

    assert f"--worker-cls {WORKER}" in COMMANDS
    module, _, name = WORKER.rpartition(".")
    assert f"class {name}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text()
