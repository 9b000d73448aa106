"""Ring records to the wire's messages."""

from collections.abc import Iterator

from stream_monitor.records import (
    Audit,
    EngineInfo,
    Ledger,
    RequestFinished,
    RequestStarted,
    RowLedger,
    Rows,
    StepRecord,
    TokenRun,
)
from stream_monitor.v1alpha1 import summary_pb2 as pb

SCHEMA_VERSION = 2


def engine_message(info: EngineInfo) -> pb.EngineInfo:
    """`EngineInfo` for every summary of this rank."""
    geometry = info.geometry
    return pb.EngineInfo(
        instance=info.instance,
        model_name=info.model_name,
        engine=info.engine,
        data_parallel_index=info.data_parallel_index,
        tensor_parallel_rank=info.tensor_parallel_rank,
        tensor_parallel_size=info.tensor_parallel_size,
        pipeline_parallel_rank=info.pipeline_parallel_rank,
        pipeline_parallel_size=info.pipeline_parallel_size,
        layers=info.layers,
        first_query_head=info.first_query_head,
        total_query_heads=info.total_query_heads,
        query_heads=info.query_heads,
        geometry=pb.BlockGeometry(
            block_size=geometry.block_size,
            top_k=geometry.top_k,
            sink_blocks=geometry.sink_blocks,
            recent_blocks=geometry.recent_blocks,
            strategy=geometry.strategy,
        ),
        vllm_version=info.vllm_version,
        plugin_version=info.plugin_version,
        summary_bytes=info.summary_bytes,
        kv_tokens_lost=info.kv_tokens_lost,
        tenant=info.tenant,
        tenants_by_request=info.tenants_by_request,
    )


def summary_message(engine: pb.EngineInfo, sequence: int, record: StepRecord, ledger: Ledger) -> pb.StepSummary:
    """The summary of `record` with `ledger` in place of the record's own. A record without rows has step 0."""
    return pb.StepSummary(
        schema_version=SCHEMA_VERSION,
        engine=engine,
        sequence=sequence,
        step=record.step if record.rows is not None else 0,
        wall_time_ns=record.wall_time_ns,
        started=map(_started, record.started),
        tokens=map(_tokens, record.tokens),
        rows=None if record.rows is None else _rows(record.rows),
        finished=map(_finished, record.finished),
        ledger=_ledger(ledger),
        audits=map(_audit, record.audits),
        more=record.more,
    )


def _rows(rows: Rows) -> pb.Rows:
    return pb.Rows(
        count=len(rows.request_ids),
        request_ids=rows.request_ids,
        positions=rows.positions,
        attempts=rows.attempts,
        phases=rows.phases,
        block_ids=rows.block_ids,
        block_log_share=rows.block_log_share,
        block_strongest=rows.block_strongest,
        forced_log_share=rows.forced_log_share,
        forced_strongest=rows.forced_strongest,
        unobserved_log_share=rows.unobserved_log_share,
        total_lse=rows.total_lse,
        keys_read=rows.keys_read,
        learned_sink_log_share=rows.learned_sink_log_share,
        narrow_block_ids=rows.narrow_block_ids,
    )


def _started(entry: RequestStarted) -> pb.RequestStarted:
    return pb.RequestStarted(
        request_id=entry.request_id,
        prompt_tokens=entry.prompt_tokens,
        role_starts=entry.role_starts,
        roles=entry.roles,
        prompt_flags=entry.prompt_flags,
        prompt_token_ids=entry.prompt_token_ids,
        refused_reason=entry.refused_reason,
        tenant=entry.tenant,
    )


def _tokens(entry: TokenRun) -> pb.TokenRun:
    return pb.TokenRun(
        request_id=entry.request_id,
        first_position=entry.first_position,
        flags=entry.flags,
        token_ids=entry.token_ids,
    )


def _finished(entry: RequestFinished) -> pb.RequestFinished:
    return pb.RequestFinished(request_id=entry.request_id, total_tokens=entry.total_tokens)


def _audit(audit: Audit) -> pb.Audit:
    return pb.Audit(
        row=audit.row,
        layer=audit.layer,
        query_head=audit.query_head,
        recall=audit.recall,
        unobserved_error=audit.unobserved_error,
    )


def _ledger(ledger: Ledger) -> pb.Ledger:
    return pb.Ledger(
        token_rows=_counts(ledger.token_rows),
        chunk_rows=_counts(ledger.chunk_rows),
        estimates=ledger.estimates,
        estimate_seconds=ledger.estimate_seconds,
        fault=ledger.fault,
        refused_arguments=ledger.refused_arguments,
        hook_seconds=ledger.hook_seconds,
        stride=ledger.stride,
        device_waits=ledger.device_waits,
        key_bytes=ledger.key_bytes,
        record_bytes=ledger.record_bytes,
        sent=ledger.sent,
        queues=(pb.QueueState(name=queue.name, size=queue.size, capacity=queue.capacity) for queue in ledger.queues),
    )


def _counts(rows: RowLedger) -> Iterator[pb.RowCount]:
    for outcome in ("expected", "captured", "sampled_out", "raced"):
        yield pb.RowCount(outcome=outcome, count=getattr(rows, outcome))
    if rows.governed:
        yield pb.RowCount(outcome="sampled_out", reason="governor", count=rows.governed)
    for outcome in ("dropped", "refused", "discarded"):
        for reason, count in getattr(rows, outcome).items():
            yield pb.RowCount(outcome=outcome, reason=reason, count=count)
