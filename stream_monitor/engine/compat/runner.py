"""What the capture asks of vLLM's model runner, whichever it is, and what the runner answers with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stream_monitor.engine.compat.schedule import ScheduledRequest


@dataclass(frozen=True)
class BatchRows:
    """The runner's batch after a forward pass, in row order.

    Attributes:
        request_ids: internal ids.
        block_tables: per KV cache group, int32 [at least rows, pages]; a view of the runner's own buffer. Empty where
            the host has none.
        page_tokens: per group, tokens per page of that table.
        query_tokens: of each in this step; the schedule's word, where rows of prompts are captured.
    """

    request_ids: list[str]
    block_tables: list[NDArray[np.int32]]
    page_tokens: list[int]
    query_tokens: Sequence[int] = ()


@dataclass(frozen=True)
class DeviceInputs:
    """Tensors on the device that the runner fills before each forward pass, in row order, at fixed addresses.

    Attributes:
        seq_lens: int32 [requests], keys of each request once the step is done.
        block_tables: per KV cache group, int32 [requests, pages].
    """

    seq_lens: Any
    block_tables: list[Any]


class RunnerView(Protocol):
    """`RunnerV1` or `RunnerV2`."""

    def block_tokens(self) -> list[int]: ...

    def table_pages(self) -> list[int]: ...

    def batch(self) -> BatchRows: ...

    def query_start_loc(self) -> Any: ...

    def device_inputs(self) -> DeviceInputs: ...


def misplaced(batch: BatchRows, fresh: Sequence[ScheduledRequest]) -> str:
    """Why the rows of requests that just began are not theirs by the scheduler's word, which gave each of them its
    blocks; empty if they are, or where the host has no tables to look at."""
    row_of = {request_id: row for row, request_id in enumerate(batch.request_ids)}
    for request in fresh if batch.block_tables else ():
        row = row_of.get(request.request_id)
        if row is None:
            return "a request that was scheduled has no row in the batch"
        for table, blocks in zip(batch.block_tables, request.block_ids, strict=True):
            if table[row, : len(blocks)].tolist() != list(blocks):
                return "a row's block table is not that of the request it is said to be of"
    return ""


def max_requests(runner: Any) -> int:
    """Most requests in a batch (`max_num_reqs` of both runners)."""
    return int(runner.max_num_reqs)


def decode_query_len(vllm_config: Any) -> int:
    """Most query tokens of a decoding request in a step: its last token, and the drafts to verify."""
    speculative = vllm_config.speculative_config
    return 1 + (speculative.num_speculative_tokens if speculative is not None else 0)


def has_tokens(output: Any) -> bool:
    """Whether an output says what was sampled, if anything was; a rank that does not sample has none."""
    return getattr(output, "sampled_token_ids", None) is not None


def sampled_tokens(output: Any) -> dict[str, list[int]]:
    """Token ids sampled in a step by request, as a ModelRunnerOutput has them; {} where there are none."""
    ids = getattr(output, "sampled_token_ids", None)
    request_ids = getattr(output, "req_ids", None)
    if not ids or not request_ids:
        return {}
    return {request_id: list(tokens) for request_id, tokens in zip(request_ids, ids, strict=True) if len(tokens)}


def is_pending(output: Any) -> bool:
    """Whether an output's tokens are still on the device: an AsyncModelRunnerOutput, whose `get_output` waits for them
    and runs on the output rank alone, on a thread of its own where scheduling is asynchronous (v1/outputs.py,
    v1/executor/multiproc_executor.py:1057)."""
    return callable(getattr(output, "get_output", None))
