"""Compiled code on disk is never that of other sources, and a disk that cannot be used costs nothing but time.

A toy package of two functions stands in for the folders of compiled functions, beside the real `compiling.py`.
"""

import ast
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

import stream_kernels.cpu_kernel
import stream_monitor.compiled
from stream_kernels import compiling
from stream_kernels.cpu_kernel import search_rows

from .cases import Case, draw
from .test_parity import SHARED, run_cpu

ENTRY = """
from toy.callee import callee
from stream_kernels.compiling import cached_jit

@cached_jit()
def entry(x):
    return callee(x)
"""
CALLEE = """
from stream_kernels.compiling import jit

@jit()
def callee(x):
    return x + {addend}
"""
RUN = "from toy.entry import entry; print(entry(1), sum(entry.stats.cache_hits.values()))"


@dataclass
class Toy:
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "toy"

    @property
    def cache(self) -> Path:
        return self.folder / "__pycache__"

    def write(self, addend: int) -> None:
        """Same size and same times whatever the addend, as after a careless copy."""
        for name, text in {"__init__.py": "", "entry.py": ENTRY, "callee.py": CALLEE.format(addend=addend)}.items():
            (self.folder / name).write_text(text)
            os.utime(self.folder / name, (1e9, 1e9))

    def start(self, limit: Callable[[], None] | None = None) -> tuple[int, int, list[str]]:
        """What `entry(1)` gives in a new process, how often the cache had it, and the lines logged."""
        done = subprocess.run(
            [sys.executable, "-B", "-c", RUN],
            env={"PYTHONPATH": str(self.root), "PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(self.root / "user")},
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=limit,
        )
        result, hits = done.stdout.split()
        return int(result), int(hits), done.stderr.splitlines()


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    (tmp_path / "toy").mkdir()
    made = Toy(tmp_path)
    made.write(addend=1)
    return made


def test_the_second_start_compiles_nothing(toy: Toy) -> None:
    assert toy.start() == (2, 0, [])
    assert toy.start() == (2, 1, [])


def test_a_changed_callee_in_another_file_is_compiled_anew(toy: Toy) -> None:
    toy.start()
    toy.write(addend=5)
    assert toy.start() == (6, 0, [])
    assert toy.start() == (6, 1, [])
    assert len(list(toy.cache.glob("entry.entry-*.nbi"))) == 1, "code of the old sources is deleted"


def test_without_any_place_for_a_cache_it_compiles_in_memory_and_says_so_once(toy: Toy) -> None:
    toy.cache.write_text("not a folder")
    (toy.root / "user").write_text("not a folder")
    for _ in range(2):
        result, hits, lines = toy.start()
        assert (result, hits, len(lines)) == (2, 0, 1)
        assert "compiled anew at every start" in lines[0]


def test_a_full_disk_costs_the_cache_and_not_the_result(toy: Toy) -> None:
    def no_file_may_grow() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    result, hits, lines = toy.start(no_file_may_grow)
    assert (result, hits, len(lines)) == (2, 0, 1)
    assert "cannot be kept" in lines[0]


def test_a_truncated_cache_is_replaced(toy: Toy) -> None:
    toy.start()
    (code,) = toy.cache.glob("*.nbc")
    code.write_bytes(code.read_bytes()[:100])
    result, hits, lines = toy.start()
    assert (result, hits, len(lines)) == (2, 0, 1)
    assert "cannot be read" in lines[0]
    assert toy.start() == (2, 1, [])


def test_the_search_itself_is_kept_under_the_hash_of_its_sources() -> None:
    case = Case(SHARED, (500,), layers=1)
    run_cpu(case, draw(case))
    names = [path.name for path in Path(search_rows.stats.cache_path).glob("*.nbi")]
    assert any(compiling.source_hash(Path(str(stream_kernels.cpu_kernel.__file__)).parent) in name for name in names)


@pytest.mark.parametrize("package", [stream_kernels.cpu_kernel, stream_monitor.compiled])
def test_compiled_folders_import_nothing_of_ours_that_the_hash_does_not_cover(package: ModuleType) -> None:
    for path in Path(str(package.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path.name
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = [name for name in names if name.split(".")[0] in ("stream_kernels", "stream_monitor")]
            covered = f"{package.__name__}.", "stream_kernels.compiling."
            assert all(name.startswith(covered) for name in ours), path.name


def test_callees_are_lent_arrays_and_make_none() -> None:
    @compiling.jit()
    def lent(values: NDArray[np.float32]) -> float:
        row = values[1]
        return float(row[0])

    @compiling.jit()
    def made(values: NDArray[np.float32], row: int) -> None:
        values[row] = values[row + 1]

    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    entry = numba.njit(lambda values: lent(values))
    held = sys.getrefcount(values)
    assert [entry(values) for _ in range(100)] == [2.0] * 100
    assert sys.getrefcount(values) == held
    with pytest.raises(numba.core.errors.NumbaError, match="NRT required but not enabled"):
        numba.njit(lambda values: made(values, len(values) - 2))(values)
