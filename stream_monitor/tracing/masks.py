"""What a trace finds, on disk: a Parquet file with one row per (layer, query block, head), and its reader.

| column | type | meaning |
| --- | --- | --- |
| `layer`, `query_block`, `head` | int32 | rows are ordered by them; a row group is a layer |
| `first_position`, `rows` | int32 | the query block's first token, and how many it has |
| `block_ids` | int32 [K] | kept inner key blocks, heaviest first; -1 where there are fewer |
| `block_shares` | float32 [K] | their shares of the attention, reduced over the rows; 0 where padded |
| `forced_ids`, `forced_shares` | int32 [F], float32 [F] | the same of the blocks that are always kept |
| `unobserved` | float32 | share of everything else, estimated where it was not read |
| `keys_read` | float32 | key-equivalents that the search read for the query block, per query head |

The key `stream_monitor` of the file's metadata is a JSON object: the model, the tokens, how it was searched, and how
shares were reduced over the rows of a query block (see `search_prefill`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from stream_kernels.prefill import PrefillSummary
from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.parquet import LayerWriter, open_parquet, readable

_KEY = b"stream_monitor"
MASKS = "masks.parquet"
"""Name of the file in the folder of a trace."""

_FORMAT = 1
"""Changes when a reader of the columns above could no longer read them."""


@dataclass(frozen=True)
class LayerMasks:
    """One layer's masks: B query blocks, H query heads, K kept and F forced key blocks; -1 and 0 where padded.

    Attributes:
        first_position: int32 [B]; rows: int32 [B].
        block_ids: int32 [B, H, K]; block_shares: float32 [B, H, K].
        forced_ids: int32 [B, F]; forced_shares: float32 [B, H, F].
        unobserved: float32 [B, H].
        keys_read: float32 [B].
    """

    first_position: NDArray[np.int32]
    rows: NDArray[np.int32]
    block_ids: NDArray[np.int32]
    block_shares: NDArray[np.float32]
    forced_ids: NDArray[np.int32]
    forced_shares: NDArray[np.float32]
    unobserved: NDArray[np.float32]
    keys_read: NDArray[np.float32]

    @classmethod
    def of(cls, found: PrefillSummary) -> "LayerMasks":
        """Of a search: shares instead of log-sum-exps."""

        def share(lse: torch.Tensor) -> NDArray[np.float32]:
            total = found.total_lse.view(*found.total_lse.shape, *[1] * (lse.ndim - 2))
            return _float32((lse - total).exp())

        return cls(
            first_position=_int32(found.first_position),
            rows=_int32(found.rows),
            block_ids=_int32(found.block_ids),
            block_shares=share(found.block_lse),
            forced_ids=_int32(found.forced_ids),
            forced_shares=share(found.forced_lse),
            unobserved=share(found.unobserved_lse),
            keys_read=_float32(found.keys_read),
        )


def _int32(values: torch.Tensor) -> NDArray[np.int32]:
    return np.asarray(values.cpu().numpy(), np.int32)


def _float32(values: torch.Tensor) -> NDArray[np.float32]:
    return np.asarray(values.cpu().numpy(), np.float32)


class MaskWriter:
    """Writes layers as they come, one row group each; the file is readable once `close` was called."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: LayerWriter | None = None
        self._layers = 0

    def write(self, masks: LayerMasks) -> None:
        """Adds the next layer."""
        table = _table(self._layers, masks)
        if self._writer is None:
            self._writer = LayerWriter(self._path, table.schema)
        self._writer.write(table)
        self._layers += 1

    def close(self, metadata: dict[str, Any]) -> None:
        """Finishes the file with what a reader must know; JSON values only."""
        assert self._writer is not None, "no layer was written"
        self._writer.close({_KEY: json.dumps(metadata | {"format": _FORMAT}).encode()})


def _table(layer: int, masks: LayerMasks) -> pa.Table:
    blocks, heads, _ = masks.block_ids.shape
    rows = blocks * heads

    def per_block(values: NDArray[Any]) -> pa.Array:
        return _column(np.repeat(values, heads, axis=0))

    return pa.table(
        {
            "layer": _column(np.full(rows, layer, np.int32)),
            "query_block": per_block(np.arange(blocks, dtype=np.int32)),
            "head": _column(np.tile(np.arange(heads, dtype=np.int32), blocks)),
            "first_position": per_block(masks.first_position),
            "rows": per_block(masks.rows),
            "block_ids": _column(masks.block_ids.reshape(rows, -1)),
            "block_shares": _column(masks.block_shares.reshape(rows, -1)),
            "forced_ids": per_block(masks.forced_ids),
            "forced_shares": _column(masks.forced_shares.reshape(rows, -1)),
            "unobserved": _column(masks.unobserved.reshape(rows)),
            "keys_read": per_block(masks.keys_read),
        }
    )


def _column(values: NDArray[Any]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


class MaskFile:
    """A finished file: `metadata`, and its layers as arrays, one at a time.

    Raises:
        TracingError: it cannot be read, or is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_parquet(path, "masks")
        with readable(path, "masks"):
            stored = self._file.metadata.metadata or {}
            self.metadata: dict[str, Any] = json.loads(stored.get(_KEY, b"{}"))
            if self.metadata.get("format") != _FORMAT:
                raise TracingError(f"{path} does not hold masks in the format {_FORMAT} known here")
        self.layers: int = self._file.metadata.num_row_groups

    def layer(self, number: int) -> LayerMasks:
        """One layer's masks. Raises TracingError if they are damaged."""
        with readable(self._path, "masks"):
            return self._layer(number)
        raise AssertionError("the layer is read, or an error was raised")

    def _layer(self, number: int) -> LayerMasks:
        table = self._file.read_row_group(number)
        heads = int(table["head"][-1].as_py()) + 1

        def read(name: str) -> NDArray[Any]:
            """[B, H, ...] of a column."""
            column = table[name].combine_chunks()
            if pa.types.is_fixed_size_list(column.type):
                return np.asarray(column.flatten()).reshape(-1, heads, column.type.list_size)
            return np.asarray(column).reshape(-1, heads)

        return LayerMasks(
            first_position=read("first_position")[:, 0],
            rows=read("rows")[:, 0],
            block_ids=read("block_ids"),
            block_shares=read("block_shares"),
            forced_ids=read("forced_ids")[:, 0],
            forced_shares=read("forced_shares"),
            unobserved=read("unobserved"),
            keys_read=read("keys_read")[:, 0],
        )

    def __iter__(self) -> Iterator[LayerMasks]:
        return (self.layer(number) for number in range(self.layers))
