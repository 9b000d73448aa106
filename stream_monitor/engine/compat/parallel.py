"""A worker's place among the ranks of its engine, and the name they share.

Paths are under `vllm/`, read in 0.32.0.
"""

import hashlib
import multiprocessing
import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_START = "_STREAM_MONITOR_START"
"""Environment variable of the processes of one vLLM: a UUID of the start of its front end. Not a setting."""
_INSTANCE_KEY = "stream_monitor/instance"
_AGREE_SECONDS = 20
_marked = False


def mark_start() -> None:
    """Give this vLLM a name that its engine cores and workers inherit, however many there are.

    Plug-ins load in the front end before it starts anything (engine/arg_utils.py:906). A main process names itself
    anew, whatever it inherited: it may be one of several engines that a script starts.
    """
    global _marked
    if not _marked and (multiprocessing.parent_process() is None or _START not in os.environ):
        os.environ[_START] = str(uuid.uuid4())
    _marked = True


def engine_instance(vllm_config: Any, distributed_init_method: str) -> str:
    """One UUID per engine start, equal on all ranks of an engine: tensor, pipeline and data parallel.

    `instance_id` (config/vllm.py) tells apart the engines of one front end; five digits are not enough for those of
    all. Workers that are no descendants of the front end (Ray's) have the rendezvous of their engine core instead, so
    that each data-parallel core is an engine of its own there. Over several hosts each has a front end, and the first
    rank's name counts.

    Raises:
        RuntimeError: this rank is on another host than the first one, and learned no name from it.
    """
    start = os.environ.get(_START) or f"{distributed_init_method}|{vllm_config.parallel_config.data_parallel_index}"
    text = f"{start}|{vllm_config.instance_id}"
    own = str(uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=4))
    return _agreed(own) if hosts() > 1 else own


def _agreed(own: str) -> str:
    """The first rank's name, through the store by which all ranks found each other. No collective: a rank that does not
    take part holds nobody up for longer than some seconds."""
    import torch

    store = torch.distributed.distributed_c10d._get_default_store()
    if torch.distributed.get_rank() == 0:
        store.set(_INSTANCE_KEY, own)
        return own
    try:
        store.wait([_INSTANCE_KEY], timedelta(seconds=_AGREE_SECONDS))
    except torch.distributed.DistError as error:
        raise RuntimeError(f"the engine's first rank told no name within {_AGREE_SECONDS} s: {error}") from None
    return str(store.get(_INSTANCE_KEY).decode())


def hosts() -> int:
    """On how many hosts the ranks of this engine run (distributed/parallel_state.py:1992)."""
    from vllm.distributed.parallel_state import get_node_count

    return int(get_node_count())


@dataclass(frozen=True)
class Ranks:
    """Where this worker stands in its engine."""

    tensor: int
    pipeline: int
    last_pipeline: bool


def ranks() -> Ranks:
    """From the process groups (distributed/parallel_state.py)."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    pipeline = get_pp_group()
    return Ranks(get_tensor_model_parallel_rank(), pipeline.rank_in_group, pipeline.is_last_rank)


def sends_tokens() -> bool:
    """Whether this rank reports sampled tokens: the output rank alone (v1/executor/multiproc_executor.py:1057)."""
    here = ranks()
    return here.tensor == 0 and here.last_pipeline
