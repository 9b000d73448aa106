"""Sentence masses on disk: a Parquet file with one row per non-zero entry, and its reader.

| column | type | meaning |
| --- | --- | --- |
| `layer`, `query`, `head`, `key` | int32 | a row group is a layer; `key` is -1 for what was not read |
| `mass` | float32 | share of the key sentence in the query sentence's attention; over the keys it sums to 1 |
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.parquet import LayerWriter, open_parquet, readable
from stream_monitor.tracing.sentence_mass import SentenceMass

UNOBSERVED = -1
"""Stands for the key sentence of the mass that was not read."""
_INTEGERS = ("layer", "query", "head", "key")
_SCHEMA = pa.schema([*((name, pa.int32()) for name in _INTEGERS), ("mass", pa.float32())])


class SentenceWriter:
    """Writes layers as they come; the file is readable once `close` was called."""

    def __init__(self, path: Path) -> None:
        self._writer = LayerWriter(path, _SCHEMA)
        self._layers = 0

    def write(self, layer: SentenceMass) -> None:
        """Adds the next layer."""
        query, head = (axis.ravel() for axis in np.indices(layer.unobserved.shape, np.int32))
        columns = {
            "layer": np.full(len(layer.mass) + len(query), self._layers, np.int32),
            "query": np.concatenate([layer.query, query]),
            "head": np.concatenate([layer.head, head]),
            "key": np.concatenate([layer.key, np.full(len(query), UNOBSERVED, np.int32)]),
            "mass": np.concatenate([layer.mass, layer.unobserved.ravel()]),
        }
        self._writer.write(pa.table(columns, schema=_SCHEMA))
        self._layers += 1

    def close(self) -> None:
        """Finishes the file."""
        self._writer.close()


class SentenceFile:
    """A finished file: its layers, one at a time.

    Raises:
        TracingError: it cannot be read, or is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_parquet(path, "sentence masses")
        if not self._file.schema_arrow.equals(_SCHEMA):
            raise TracingError(f"{path} does not hold sentence masses")
        self.layers: int = self._file.metadata.num_row_groups

    def layer(self, number: int) -> SentenceMass:
        """One layer's masses. Raises TracingError if they are damaged."""
        with readable(self._path, "sentence masses"):
            table = self._file.read_row_group(number)
            query, head, key, mass = (np.asarray(table[name]) for name in ("query", "head", "key", "mass"))
            rest = key == UNOBSERVED
            shape = (int(query[rest].max()) + 1, int(head[rest].max()) + 1)
            return SentenceMass(query[~rest], head[~rest], key[~rest], mass[~rest], mass[rest].reshape(shape))
        raise AssertionError("the layer is read, or an error was raised")

    def __iter__(self) -> Iterator[SentenceMass]:
        return (self.layer(number) for number in range(self.layers))
