"""Compiles the kernels that copy query rows, for a GPU that need not be there: `python -m tests.gpu.rows_compile 90`.

What comes out is one JSON object, by kernel the bytes of its machine code.
"""

import json
import sys
from collections import deque

import torch
from triton.runtime import driver

from stream_monitor.engine.compat.runner import DeviceInputs
from stream_monitor.engine.gpu import rows
from stream_monitor.engine.gpu.streams import streams_of
from stream_monitor.engine.gpu.tables import HostTables
from tests.stream_kernels.gpu_compile import AbsentGpu, CompileOnly

REQUESTS, TOKENS, HEADS, DIM, PAGES = 256, 8192, 32, 128, 512


def compile_rows(capability: int) -> dict[str, int]:
    driver.set_active(AbsentGpu(capability))
    found: dict[str, dict[str, int]] = {}
    for name in [name for name in vars(rows) if name.endswith("_kernel")]:
        setattr(rows, name, CompileOnly(getattr(rows, name), found))
    start_loc = torch.zeros(REQUESTS + 1, dtype=torch.int32)
    buffers = rows.RowBuffers(1, REQUESTS, HEADS, DIM, torch.bfloat16, start_loc, prompt_stride=64, tokens=TOKENS)
    rows.GatherTap(buffers, 0).take(torch.zeros(TOKENS, HEADS, DIM, dtype=torch.bfloat16))
    assert not buffers.faults, buffers.faults
    inputs = DeviceInputs(torch.zeros(REQUESTS, dtype=torch.int32), [torch.zeros(REQUESTS, PAGES, dtype=torch.int32)])
    tables = HostTables([0], [PAGES])
    slot = rows.GpuSlot(buffers, inputs, tables, [0], [16], REQUESTS, streams_of(start_loc.device), deque())
    slot.place(torch.zeros(1, 1, HEADS, DIM, dtype=torch.bfloat16), [torch.zeros(1, PAGES).int().numpy()], 100)
    return {name: kernel["machine_code"] for name, kernel in found.items()}


if __name__ == "__main__":
    print(json.dumps(compile_rows(int(sys.argv[1]))))
