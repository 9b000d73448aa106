"""`benchmarks.gpu_search` on a CPU: its own code and vLLM's attention interpreted, without clocks and CUDA graphs, in
float16: Triton's interpreter multiplies bfloat16 wrongly, which the search's own kernels do not ask of it.

A program of its own, because vLLM must see a Triton that it takes to work before it is imported; for the same reason
nothing is done or imported here unless it is run.
"""

import os
import time
from collections.abc import Callable
from types import SimpleNamespace


def captured(work: Callable[[], None]) -> SimpleNamespace:
    """As a graph is captured: one run before it, and none by itself."""
    work()
    return SimpleNamespace(replay=work)


def median_times(works: list[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of one run each."""
    times = []
    for work in works:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Run the benchmark with the arguments given, what needs a GPU replaced."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    # On its CPU build vLLM replaces every kernel by a stub unless Triton has this backend.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

    import torch

    from benchmarks import gpu_search
    from benchmarks.report import run

    vllm_attention = gpu_search.prepare_attention

    def prepare_attention(step: gpu_search.Step) -> Callable[[], None]:
        """vLLM's, with its output looked at once."""
        attend = vllm_attention(step)
        attend()
        (out,) = [
            cell.cell_contents
            for cell in attend.__closure__ or ()
            if isinstance(cell.cell_contents, torch.Tensor)
            and cell.cell_contents.shape == step.queries.shape[1:]
            and cell.cell_contents.dtype == gpu_search.DTYPE
        ]
        keys, values = (
            step.caches[-1][part][step.block_table.long()].flatten(1, 2).transpose(1, 2) for part in range(2)
        )
        wanted = torch.nn.functional.scaled_dot_product_attention(
            step.queries[-1][:, :, None].float(), keys.float(), values.float(), scale=step.scale, enable_gqa=True
        )
        torch.testing.assert_close(out.float(), wanted[:, :, 0], atol=0.02, rtol=0.02)
        return attend

    gpu_search.DTYPE = torch.float16
    gpu_search.DEVICE, gpu_search.KV_HEADS, gpu_search.HEAD_DIM = "cpu", 1, 16
    for replacement in (captured, median_times, prepare_attention):
        setattr(gpu_search, replacement.__name__, replacement)
    gpu_search.copy_bandwidth = lambda repeats: 1.0
    gpu_search.free_memory = lambda: 1 << 30
    run(gpu_search.main)


if __name__ == "__main__":
    main()
