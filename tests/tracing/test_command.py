"""`stream-monitor trace`, as a user types it."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stream_kernels.search import SearchConfig
from stream_monitor.cli import app
from stream_monitor.tracing import command
from stream_monitor.tracing.masks import MaskFile
from tests.tracing import tiny


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("one two three " * 30)
    return path


def trace(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    done = CliRunner().invoke(app, ["trace", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_prompt_is_traced(tiny_folder: Path, prompt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--strategy", "exact", "--top-k", 3, "--block-size", 16, "--sink-blocks", 2, "--recent-blocks", 1)
    code, text, progress = trace(
        *("--model", tiny_folder, "--prompt", prompt, "--out", out, "--attention", "dense", "--needle", "two three o"),
        *("--reduction", "union"),
        *options,
    )
    assert code == 0, progress
    assert "420 tokens in " in text
    assert "% of the causal blocks" in text
    assert f"masks and figures are in {out}" in text
    assert f"open {out / 'report.html'}" in text.replace("\n", " ")
    assert json.loads((out / "routes.json").read_text())["needle_blocks"] == [0]
    assert "tokens/s" in progress
    metadata = MaskFile(out / "masks.parquet").metadata
    search = SearchConfig.for_prompt(strategy="exact", top_k=3, block_size=16, sink_blocks=2, recent_blocks=1)
    assert metadata["search"] == asdict(search)
    assert (metadata["attention"], metadata["reduction"]) == ("dense", "union")


def test_without_a_terminal_lines_say_how_far_it_is(
    tiny_folder: Path, prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "LINE_SECONDS", 0.0)
    _, _, progress = trace("--model", tiny_folder, "--prompt", prompt, "--out", tmp_path / "out")
    lines = progress.splitlines()
    assert re.fullmatch(r"layer 1 of 3, [\d,]+ tokens/s, [\d.]+ GiB", lines[0]), progress
    assert [line.split(",")[0] for line in lines[1:3]] == ["layer 2 of 3", "layer 3 of 3"]


def test_messages_are_traced(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": "Hello there!"}]))
    code, text, _ = trace("--model", tiny_folder, "--messages", path, "--out", tmp_path / "out")
    assert code == 0
    assert "29 tokens" in text


def test_windows_are_said(windowed_folder: Path, prompt: Path, tmp_path: Path) -> None:
    _, text, _ = trace("--model", windowed_folder, "--prompt", prompt, "--out", tmp_path / "out")
    assert "2 layers see a sliding window of 70 tokens: masks lie inside it" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--top-k", 0), "top_k is 0; valid: 1 to 4096"),
        (("--strategy", "bream"), "strategy is 'bream'; valid: descent, beam, exact"),
        (("--block-size", 33), "block_size is 33; valid: 8, 16, 32, 64, 128"),
        (("--attention", "half"), "--attention is 'half'; valid: pruned, dense"),
        (("--reduction", "sum"), "--reduction is 'sum'; valid: max, mean, union"),
        (("--against", "/nowhere"), "name it with --needle"),
        (("--against", "/nowhere", "--needle", "two"), "/nowhere is not a trace made with --needle"),
        (("--messages", "x.json"), "give either --prompt or --messages"),
        (("--model", "/nowhere"), "/nowhere is not the folder of a Hugging Face model"),
        (("--prompt", "/nowhere"), "cannot read /nowhere: No such file or directory"),
        (("--prompt", "/dev/null"), "the prompt in /dev/null is empty"),
        (("--needle", "four"), "the context does not contain 'four'"),
        (("--out", "/dev/null"), "/dev/null exists already"),
        (("--out", "/proc/out"), "cannot write /proc/out: "),
        (("--out", "/dev/null/out"), "cannot write /dev/null/out: /dev/null is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[object, ...], named: str, tiny_folder: Path, prompt: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text, errors = trace("--model", tiny_folder, "--prompt", prompt, "--out", out, *arguments)
    assert code == 2
    assert text == ""
    lines = [line for line in errors.splitlines() if line.startswith("stream-monitor: ")]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [prompt]


@pytest.mark.parametrize(
    ("option", "said"), [("--out", "write"), ("--model", "read"), ("--prompt", "read"), ("--messages", "read")]
)
def test_a_folder_that_may_not_be_entered_is_one_line(
    option: str, said: str, tiny_folder: Path, prompt: Path, tmp_path: Path, closed_folder: Path
) -> None:
    given = {"--model": tiny_folder, "--prompt": prompt, "--out": tmp_path / "out"} | {option: closed_folder / "there"}
    if option == "--messages":
        del given["--prompt"]
    code, _, errors = trace(*(part for pair in given.items() for part in pair))
    assert (code, errors) == (2, f"stream-monitor: cannot {said} {closed_folder / 'there'}: Permission denied\n")
    assert not (tmp_path / "out").exists()


def test_a_prompt_beyond_the_models_limit_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a" * (tiny.SHAPE["max_position_embeddings"] + 1))
    code, _, errors = trace("--model", tiny_folder, "--prompt", path, "--out", tmp_path / "out")
    assert code == 2
    assert "the prompt has 2,049 tokens" in errors


def test_the_sidecar_loads_nothing_of_it() -> None:
    code = (
        "import sys, stream_monitor.cli, stream_monitor.monitor.server\n"
        "print([n for n in ('torch', 'transformers', 'pyarrow', 'stream_monitor.tracing') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "[]"
