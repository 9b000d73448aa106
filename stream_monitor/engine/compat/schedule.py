"""What the scheduler tells the runner, in our own terms.

Paths are under `vllm/`, read in 0.32.0 and, where it differs, in 0.26.0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec


class ScheduledRequest(msgspec.Struct, frozen=True):
    """One request of a step as the scheduler sees it.

    Attributes:
        computed_tokens: tokens whose keys were in the cache before this step.
        scheduled_tokens: query tokens of this step, at positions computed_tokens onwards.
        output_tokens: tokens sampled so far, as the scheduler counts them.
        draft_tokens: how many of the query tokens, its last ones, are guesses that this step verifies.
        rewritten_blocks: block ids, over all KV cache groups, whose content this step may replace.
        block_ids: per KV cache group, blocks that are new to the request; all of its blocks where `fresh`.
        fresh: the request begins, or begins anew after its blocks were taken from it.
    """

    request_id: str
    computed_tokens: int
    scheduled_tokens: int
    output_tokens: int
    rewritten_blocks: tuple[int, ...]
    block_ids: tuple[list[int], ...] = ()
    fresh: bool = False
    draft_tokens: int = 0


@dataclass(frozen=True)
class NewRequest:
    """What is told once about a request: `scheduled_new_reqs` (v1/core/sched/output.py).

    Attributes:
        stop_token_ids: a sampled token among them ends the output. Under asynchronous scheduling the engine samples one
            more before it knows.
    """

    request_id: str
    prompt_token_ids: list[int] | None
    prompt_tokens: int
    extra_args: dict[str, Any] | None
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ScheduledStep:
    """A SchedulerOutput in our own terms."""

    new: tuple[NewRequest, ...]
    resumed: frozenset[str]
    requests: tuple[ScheduledRequest, ...]
    finished: frozenset[str]
    rewritten_blocks: tuple[int, ...]
    preempted: frozenset[str] = frozenset()


def read_schedule(output: Any, block_tokens: list[int], connector: bool) -> ScheduledStep:
    """Translate a SchedulerOutput.

    Args:
        output: vLLM's SchedulerOutput.
        block_tokens: tokens per block, per KV cache group.
        connector: a KV connector may write blocks that count as computed (v1/core/sched/scheduler.py:1085).
    """
    new, requests = [], []
    for data in output.scheduled_new_reqs:
        prompt = data.prompt_token_ids
        embeds = getattr(data, "prompt_embeds", None)
        length = len(prompt) if prompt is not None else (int(embeds.shape[0]) if embeds is not None else 0)
        params = data.sampling_params
        extra = params.extra_args if params is not None else None
        new.append(NewRequest(data.req_id, prompt, length, extra, _stop_tokens(params)))
        rewritten = _blocks_from(data.block_ids, 0 if connector else data.num_computed_tokens, block_tokens)
        # For model runner V2 a preempted request is a new one, whose tokens so far are its prefill.
        prefill = getattr(data, "prefill_token_ids", None)
        outputs = max(0, len(prefill) - length) if prefill is not None else 0
        scheduled = output.num_scheduled_tokens[data.req_id]
        requests.append(
            ScheduledRequest(
                data.req_id, data.num_computed_tokens, scheduled, outputs, tuple(rewritten), data.block_ids, True
            )
        )
    cached, drafts = output.scheduled_cached_reqs, output.scheduled_spec_decode_tokens
    resumed = frozenset(cached.resumed_req_ids)
    for request_id, computed, outputs, block_ids in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, cached.new_block_ids, strict=True
    ):
        rewritten = []
        if block_ids is None:
            block_ids = ()
        elif request_id in resumed:
            rewritten = _blocks_from(block_ids, 0 if connector else computed, block_tokens)
        else:
            rewritten = [block for group in block_ids for block in group]
        requests.append(
            ScheduledRequest(
                request_id,
                computed,
                output.num_scheduled_tokens[request_id],
                outputs,
                tuple(rewritten),
                block_ids,
                request_id in resumed,
                len(drafts.get(request_id, ())),
            )
        )
    other: list[int] = list(output.new_block_ids_to_zero or ())
    for copy in output.kv_cache_block_copies or ():
        other.append(copy.dst_block_id)
    preempted = frozenset(output.preempted_req_ids or ())
    return ScheduledStep(
        tuple(new), resumed, tuple(requests), frozenset(output.finished_req_ids), tuple(other), preempted
    )


def _stop_tokens(params: Any) -> frozenset[int]:
    """As v1/core/sched/utils.py `check_stop` has them; sampling_params.py leaves the end of text out where it is to be
    ignored."""
    if params is None:
        return frozenset()
    end = getattr(params, "eos_token_id", None)
    stops = set(getattr(params, "stop_token_ids", None) or ())
    return frozenset(stops | ({end} if isinstance(end, int) and not params.ignore_eos else set()))


def _blocks_from(block_ids: Iterable[list[int]], computed: int, block_tokens: list[int]) -> list[int]:
    """Blocks at or beyond position `computed`, over all groups."""
    return [
        block for group, tokens in zip(block_ids, block_tokens, strict=True) for block in group[computed // tokens :]
    ]
