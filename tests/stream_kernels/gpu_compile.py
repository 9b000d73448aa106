"""Compiles the kernels that one GPU search would launch, for a GPU that need not be there; see `test_gpu_compiles.py`.

The arguments are a JSON object: `capability` (80, 90, ...), `strategy`, `key_type`, `query_type`, `head_dim`, `group`,
`max_context`. What comes out is one, by kernel: bytes of shared memory, of machine code, and the widths of copies from
global to shared memory.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from stream_kernels import gpu
from stream_kernels.layout import DeviceKeys
from stream_kernels.search import SearchConfig


class AbsentGpu:
    """What Triton asks a driver when it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class CompileOnly:
    """Stands where a kernel is launched."""

    def __init__(self, kernel: Any, found: dict[str, Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (?:0x)?(\d+)", compiled.asm["ptx"])
            self.found[self.kernel.__name__] = {
                "shared": compiled.metadata.shared,
                "copies": sorted({int(width, 16 if len(width) > 1 else 10) for width in copies}),
                "machine_code": len(compiled.asm["cubin"]),
            }

        return compile_it


def compile_search(
    capability: int,
    strategy: str,
    key_type: str,
    query_type: str,
    head_dim: int,
    group: int,
    max_context: int,
    outlier_keys: int,
    max_programs: int | None,
) -> dict[str, Any]:
    driver.set_active(AbsentGpu(capability))
    found: dict[str, Any] = {}
    for name in [name for name in vars(gpu) if name.endswith("_kernel")]:
        setattr(gpu, name, CompileOnly(getattr(gpu, name), found))
    page, kv_heads, rows = 16, 2, 4
    cache = torch.zeros(8, page, kv_heads, head_dim).to(getattr(torch, key_type))
    queries = torch.zeros(2, rows, kv_heads * group, head_dim, dtype=getattr(torch, query_type))
    blocks = max_context // 32
    searcher = gpu.GpuSearch(
        [DeviceKeys(cache, 0.1)] * 2,
        kv_heads * group,
        SearchConfig(strategy=strategy, outlier_keys=outlier_keys),
        max_rows=rows,
        max_context=max_context,
        query_dtype=queries.dtype,
        summary_slots=8,
        level_offsets=[level * blocks for level in range(7)],
        max_programs=max_programs,
    )
    tables = torch.zeros(1, rows, max_context // page, dtype=torch.int32)
    count = torch.ones(1, dtype=torch.int32)
    node_slots = torch.zeros(rows, 6 * blocks, dtype=torch.int32)
    lens = torch.zeros(rows, dtype=torch.int32)
    searcher.run(queries, tables, lens, count, searcher.allocate_result(), node_slots)
    if strategy == "beam":
        searcher.update(torch.zeros(4, 4, dtype=torch.int32), count, tables, node_slots)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_search(**json.loads(sys.argv[1]))))
