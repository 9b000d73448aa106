"""Building a model's layers without an engine.

Paths are under `vllm/`, read in 0.32.0.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


def build_on_meta(vllm_config: Any) -> None:
    """Construct the model's layers without memory for weights; fills `static_forward_context`."""
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
        initialize_model(vllm_config)


@contextlib.contextmanager
def single_rank_groups(vllm_config: Any, rendezvous: str) -> Iterator[None]:
    """vLLM's process groups with this process alone in them (distributed/parallel_state.py)."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
