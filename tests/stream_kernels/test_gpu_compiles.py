"""The kernels compile to machine code for real GPUs, which Triton can do where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes that one program may have, by compute capability (CUDA programming guide, technical specifications)."""

DEFAULT = {
    "capability": 90,
    "strategy": "beam",
    "key_type": "bfloat16",
    "query_type": "bfloat16",
    "head_dim": 128,
    "group": 7,
    "max_context": 131072,
    "outlier_keys": 1,
    "max_programs": None,
}

VARIANTS = {
    "a multiprocessor to each program": {"max_programs": 1},
    "a multiprocessor to each program, head size 256": {"max_programs": 1, "head_dim": 256, "group": 4},
    "descent": {"strategy": "descent"},
    "exact": {"strategy": "exact"},
    "compute capability 8.0": {"capability": 80},
    "float8_e4m3fn, compute capability 8.0": {"capability": 80, "key_type": "float8_e4m3fn"},
    "float8_e5m2": {"key_type": "float8_e5m2"},
    "float16": {"key_type": "float16", "query_type": "float16"},
    "float32": {"key_type": "float32", "query_type": "float32"},
    "head size 64, compute capability 8.9": {"capability": 89, "head_dim": 64},
    "head size 80": {"head_dim": 80, "group": 1},
    "head size 256": {"head_dim": 256, "group": 4},
    "sixteen query heads": {"group": 16},
    "two outliers a node": {"outlier_keys": 2},
    "a million tokens": {"max_context": 1 << 20},
}


def compile_it(**changes: object) -> None:
    settings = DEFAULT | changes
    script = Path(__file__).with_name("gpu_compile.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, json.dumps(settings)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    expected = {f"{settings['strategy']}_kernel"}
    if settings["strategy"] == "beam":
        expected |= {"summarise_blocks_kernel", "summarise_nodes_kernel"}
    assert set(kernels) == expected
    for name, kernel in kernels.items():
        assert kernel["machine_code"] > 0
        assert kernel["shared"] <= SHARED_MEMORY[int(str(settings["capability"]))], name
    # Keys and summaries come 16 bytes at a time; page ids, 4.
    assert kernels[f"{settings['strategy']}_kernel"]["copies"] == [4, 16]


@pytest.mark.timeout(300)
def test_the_default_search_compiles() -> None:
    compile_it()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compile(name: str) -> None:
    compile_it(**VARIANTS[name])
