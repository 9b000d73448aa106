"""Exported rows as Parquet. The columns follow from the messages, so that files of two exports have one schema."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from stream_monitor.v1alpha1 import monitor_pb2

_TYPES = {
    FieldDescriptor.CPPTYPE_INT32: pa.int32(),
    FieldDescriptor.CPPTYPE_UINT32: pa.uint32(),
    FieldDescriptor.CPPTYPE_INT64: pa.int64(),
    FieldDescriptor.CPPTYPE_UINT64: pa.uint64(),
    FieldDescriptor.CPPTYPE_DOUBLE: pa.float64(),
    FieldDescriptor.CPPTYPE_FLOAT: pa.float32(),
    FieldDescriptor.CPPTYPE_BOOL: pa.bool_(),
    FieldDescriptor.CPPTYPE_ENUM: pa.string(),
    FieldDescriptor.CPPTYPE_STRING: pa.string(),
}
_KEY = [("engine_instance", pa.string()), ("request_id", pa.string()), ("sample_index", pa.uint32())]


def _fields(message: Descriptor) -> list[tuple[str, Any]]:
    return [(field.name, _type(field)) for field in message.fields if field.name != "key"]


def _type(field: FieldDescriptor) -> Any:
    one = pa.struct(_fields(field.message_type)) if field.message_type else _TYPES[field.cpp_type]
    return pa.list_(one) if field.is_repeated else one


SCHEMAS = {
    "events": pa.schema([*_KEY, *_fields(monitor_pb2.Event.DESCRIPTOR), ("sequence", pa.int64())]),
    "traces": pa.schema(
        [
            *_KEY,
            *_fields(monitor_pb2.RequestInfo.DESCRIPTOR),
            ("sentence_list", pa.list_(pa.struct(_fields(monitor_pb2.Sentence.DESCRIPTOR)))),
            ("heads", pa.list_(pa.struct(_fields(monitor_pb2.TraceHead.DESCRIPTOR)))),
            ("matrix_row", pa.list_(pa.uint32())),
            ("matrix_column", pa.list_(pa.uint32())),
            ("matrix_share", pa.list_(pa.float32())),
            ("unobserved_share", pa.list_(pa.float32())),
            ("captured_rows", pa.list_(pa.uint32())),
            ("vertical_score", pa.list_(pa.float32())),
            ("receiver_score", pa.list_(pa.float32())),
            ("corrected_score", pa.list_(pa.float32())),
            ("head_row", pa.list_(pa.uint32())),
            ("head_column", pa.list_(pa.uint32())),
            ("head_index", pa.list_(pa.uint8())),
            ("head_share", pa.list_(pa.float32())),
        ]
    ),
}


class ParquetFile:
    """A row group for each page."""

    def __init__(self, path: Path, name: str) -> None:
        self._schema = SCHEMAS[name]
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        """End the file."""
        self._writer.close()
