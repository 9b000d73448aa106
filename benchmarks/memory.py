"""Bytes that a traced token leaves, against dense attention maps.

What a row (one query token) leaves is a `BlockSummary` in the worker and `Rows` on the wire, both allocated and packed
here by the product's own code and compared with the formulas printed. A dense map holds T x T shares in float16 for
each layer and query head, or T a row. Sparsity is the part of such a map that is not kept; of the full square, half of
which a causal mask leaves empty, or of the causal half alone: papers state either.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.report import Report, run
from stream_kernels.search import BlockSummary, SearchConfig
from stream_monitor.engine.packing import pack_rows
from stream_monitor.engine.requests import RowLabel
from stream_monitor.publisher.convert import summary_message
from stream_monitor.records import Ledger, Phase, StepRecord
from stream_monitor.v1alpha1 import summary_pb2

LENGTHS = (4096, 16_384, 32_768, 131_072)
LAYERS, HEADS = 24, 14
"""Without a model: those of Qwen2.5-0.5B."""

DENSE_SHARE = 2
"""Bytes of a float16."""

REQUEST_ID = "cmpl-00000000-0000-0000-0000-000000000000-0"


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a model, for its layers and heads.")] = None,
    top_k: Annotated[int, typer.Option(help="Inner blocks kept per head.")] = SearchConfig().top_k,
    seed: Annotated[int, typer.Option(help="Of the shares that are packed; sizes do not depend on it.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="The same: it takes a second.")] = False,
) -> None:
    """Memory of a trace against dense attention."""
    layers, heads = (LAYERS, HEADS) if model is None else _size(model)
    try:
        config = SearchConfig(strategy="beam", top_k=top_k)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    k, f, pairs = config.top_k, config.forced_blocks, layers * heads
    held, sent = held_bytes(layers, heads, config), sent_bytes(layers, heads, config, seed)
    report = Report(
        benchmark="memory",
        config={
            "layers": layers,
            "query_heads": heads,
            "top_k": k,
            "forced_blocks": f,
            "block_size": config.block_size,
            "full": full,
        },
        seed=seed,
        n=1,
    )
    print(f"L = {layers} layers, H = {heads} query heads, K = {k}, F = {f}, blocks of {config.block_size} tokens")
    print(f"held: L H (9 K + 5 F + 8) + 4 L = {held:,} bytes a token: block id 4, log-sum-exp 4, strongest key 1;")
    print("      forced blocks 4 + 1; unobserved 4, learned sink 4; keys read 4 a layer")
    print(f"sent: L H (5 K + 3 F + 6) + 4 L + 9 = {sent:,} bytes a token: block id 2, log share 2, strongest key 1;")
    print("      forced blocks 2 + 1; unobserved 2, total 4; keys read 4 a layer; position 4, attempt 4, phase 1;")
    print("      beyond 65,535 blocks of context (2 million tokens) block ids take 4")
    report.figures |= {
        "held_bytes": held,
        "sent_bytes": sent,
        "sent_message_bytes": message_bytes(layers, heads, config, seed),
        "held_error": abs(held - (pairs * (9 * k + 5 * f + 8) + 4 * layers)),
        "sent_error": abs(sent - (pairs * (5 * k + 3 * f + 6) + 4 * layers + 9)),
    }
    for name in ("held_error", "sent_error"):
        report.must |= {name: ("<=", 0.0)}
    print(
        f"as a protobuf message of one row, request id and lengths included: {report.figures['sent_message_bytes']:,}"
    )
    print("\ndense: 2 T bytes a row, layer and head; 2 T^2 for the map of all T rows")
    print(
        f"{'T':>9}{'dense row':>12}{'dense map, a head':>19}{'trace, a head':>15}{'map / held':>12}{'map / sent':>12}"
        f"{'sparsity of the square':>24}{'of the causal half':>20}"
    )
    for tokens in LENGTHS:
        row = DENSE_SHARE * tokens
        square, causal = sparsity(tokens, config)
        print(
            f"{tokens:>9,}{row:>12,}{_binary(row * tokens):>19}{_binary(held * tokens / pairs):>15}"
            f"{row * pairs / held:>11,.0f}x{row * pairs / sent:>11,.0f}x{square:>24.3%}{causal:>20.3%}"
        )
        report.figures |= {
            f"dense_row_bytes/{tokens}": row,
            f"dense_map_bytes/{tokens}": row * tokens,
            f"dense_over_held/{tokens}": row * pairs / held,
            f"dense_over_sent/{tokens}": row * pairs / sent,
            f"sparsity_square/{tokens}": square,
            f"sparsity_causal/{tokens}": causal,
        }
    report.finish()


def _size(model: Path) -> tuple[int, int]:
    """Layers and query heads by the model's config."""
    path = model / "config.json"
    if not path.is_file():
        raise typer.BadParameter(f"{model} is not the folder of a model")
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    return config["num_hidden_layers"], config["num_attention_heads"]


def held_bytes(layers: int, heads: int, config: SearchConfig) -> int:
    """Of one row in a `BlockSummary`."""
    return sum(array.nbytes for array in vars(BlockSummary.allocate(layers, 1, heads, config)).values())


def _record(layers: int, heads: int, config: SearchConfig, seed: int) -> StepRecord:
    """One row with K blocks found in every head."""
    summary = BlockSummary.allocate(layers, 1, heads, config)
    draw = np.random.default_rng(seed)
    for masses in (summary.block_lse, summary.forced_lse, summary.unobserved_lse):
        masses[...] = draw.normal(size=masses.shape)
    summary.block_ids[...] = np.arange(config.top_k)
    label = RowLabel(REQUEST_ID, LENGTHS[-1], 0, Phase.DECODE, "", True)
    return StepRecord(step=1, wall_time_ns=0, ledger=Ledger(), rows=pack_rows(summary, [label], [0]))


def sent_bytes(layers: int, heads: int, config: SearchConfig, seed: int) -> int:
    """Of one row's arrays on the wire, without its request id."""
    rows = _record(layers, heads, config, seed).rows
    assert rows is not None
    arrays = (getattr(rows, name) for name in rows.__struct_fields__)
    return sum(len(array) for array in arrays if isinstance(array, bytes))


def message_bytes(layers: int, heads: int, config: SearchConfig, seed: int) -> int:
    """Of the `Rows` message of one row."""
    record = _record(layers, heads, config, seed)
    return summary_message(summary_pb2.EngineInfo(), 1, record, Ledger()).rows.ByteSize()


def sparsity(tokens: int, config: SearchConfig) -> tuple[float, float]:
    """Part of the (query, key) pairs in no kept block, of all T^2 and of the T (T + 1) / 2 that a causal mask leaves.

    Kept and forced blocks of a row hold at most (K + F) * block_size keys, and never more than its context.
    """
    kept = int(np.minimum(np.arange(1, tokens + 1), (config.top_k + config.forced_blocks) * config.block_size).sum())
    return 1 - kept / tokens**2, 1 - kept / (tokens * (tokens + 1) / 2)


def _binary(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


if __name__ == "__main__":
    run(main)
