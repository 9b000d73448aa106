"""The sidecar's environment, as its image has it: our wheel and what its base and the image's extras ask for.

The wheel is built from what `.dockerignore` lets through; the dependencies are links to those of this environment, so
that no test needs a network.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
EXTRAS = re.findall(r"/wheels/\*\.whl\)\[(.+)\]", (ROOT / "deploy/docker/monitor.Dockerfile").read_text())[0]
CONTEXT = ("LICENSE", "README.md", "pyproject.toml", "kernels", "stream_monitor")
"""What the Dockerfiles copy for the wheel."""
PROCESSOR = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
"""For which the image has machine code."""
PREPARE = "from stream_monitor import compiled; compiled.prepare()"
"""What makes it."""


def build_wheel(folder: Path) -> Path:
    """The wheel, built as the images build it, except that setuptools is the one installed here."""
    source = folder / "source"
    source.mkdir()
    for name in CONTEXT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "wheels"), str(source))
    (wheel,) = (folder / "wheels").glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel and its dependencies; returns its `bin`."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    _pip("--python", str(python), "install", "--no-deps", "--no-index", "--compile", str(wheel))
    site = next((folder / "lib").glob("python3*/site-packages"))
    for found in _closure(_requirements(wheel), EXTRAS.split(",")):
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(found.locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(target)
    subprocess.run([python, "-I", "-c", PREPARE], env=PROCESSOR, check=True)
    return folder / "bin"


def _requirements(wheel: Path) -> list[str]:
    metadata = subprocess.run(
        [sys.executable, "-c", _METADATA, str(wheel)], check=True, capture_output=True, text=True
    ).stdout
    return metadata.splitlines()


_METADATA = """
import email, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    for line in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist", []):
        print(line)
"""


def _closure(requirements: list[str], extras: list[str]) -> list[Distribution]:
    """Distributions that these requirements bring, without extras that nobody asked for."""
    found: dict[str, Distribution] = {}
    waiting = [(text, extra) for text in requirements for extra in ("", *extras)]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = requirement.name.lower()
        known = name in found
        found[name] = held = distribution(name)
        if not known:
            waiting += [(inner, "") for inner in held.requires or ()]
        waiting += [(inner, wanted) for wanted in requirement.extras for inner in held.requires or ()]
    return list(found.values())


def _pip(*arguments: str) -> None:
    # A PYTHONPATH would make pip believe that what lies there is installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
