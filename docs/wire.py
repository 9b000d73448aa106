"""Prints wire.md from the protos and their comments: `make docs` writes the file, a test compares the two."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent.parent / "protos"
PACKAGE = "stream_monitor/v1alpha1"
FILES = ("ingest.proto", "summary.proto", "monitor.proto")

HEAD = """# The wire

Written by `make docs` from the comments in [protos/](../protos/stream_monitor/v1alpha1/); edit them there, and this
text in `docs/wire.py`. The package is `stream_monitor.v1alpha1`: until the first tagged release it may change in any
way, and becomes `v1` then.

Two services carry everything, over gRPC (HTTP/2), in plain text or over TLS ([security.md](security.md)); each server
also answers the standard services for health (`grpc.health.v1.Health`, for `""` and for each service by its name) and
reflection. By default engines publish to a Unix socket, and subscribers use `127.0.0.1:9750`.

| service | who calls it | where |
| --- | --- | --- |
| `IngestService` | publishers, one stream for each engine rank | setting `ingest` |
| `MonitorService` | whoever watches | setting `grpc` |

Any client in any language can be made from the protos alone; this one lists what the monitor holds:

```python run
import grpc
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc

with grpc.insecure_channel("127.0.0.1:9750") as channel:
    monitor = monitor_pb2_grpc.MonitorServiceStub(channel)
    for request in monitor.ListRequests(monitor_pb2.ListRequestsRequest(), timeout=10).requests:
        print(request.external_id, request.model_name, request.sentences, request.events)
```

## Sequence numbers

Every summary of a rank has a number, from 1 and ascending; the monitor answers each with that number, in order. A
publisher keeps what was not answered, and sends it again on its next stream: what the monitor had taken in comes back
as `DUPLICATE` and counts once. A gap in the numbers is a loss, and its rows are in the ledger of a later summary; the
ledger is cumulative, so the newest one alone is the truth. On one stream, a number that does not ascend ends the stream
with `OUT_OF_RANGE`.

## Cursors

Each response of `Subscribe` carries a cursor. Handing it to a later `Subscribe` goes on after that response: the
findings missed in between come first, over restarts of the monitor too, however it ended: a finding is sent once the
store has it. A cursor is opaque; one that the monitor can no longer honour ends the call with `OUT_OF_RANGE`, and the
message and the trailing metadata `oldest-cursor` name the oldest one held, never with a silent gap. A subscriber that
reads too slowly loses the oldest waiting events, and the next response says how many (`lost`).

## Compatibility

* Fields are only added, with new numbers; readers ignore fields they do not know. An enum may get new members: treat
  one that you do not know as its `_UNSPECIFIED`.
* `StepSummary.schema_version` changes when a reader that ignores the new fields would misread the old ones. A monitor
  takes in version N and N - 1, and ends the stream with `FAILED_PRECONDITION` for others, so upgrade the monitor first
  ([upgrade.md](upgrade.md)). The version now is 2, from which on
  `Rows.narrow_block_ids` may take the place of `Rows.block_ids`.
* An array whose length contradicts the shapes stated below, an unknown outcome, a name that is too long: each ends its
  own stream with a status that names the fault, is counted in `stream_monitor_messages_total`, and harms no other.
"""


def main() -> None:
    """The whole page."""
    print(HEAD.rstrip())
    for file in _files():
        print(f"\n## {PACKAGE}/{Path(file.name).name}")
        comments = {tuple(place.path): place for place in file.source_code_info.location}
        if detached := _file_comment(comments):
            print(f"\n{detached}")
        for index, service in enumerate(file.service):
            _service(service, comments, (6, index))
        for index, enum in enumerate(file.enum_type):
            _enum(enum, comments, (5, index))
        for index, message in enumerate(file.message_type):
            _message(message, comments, (4, index))


Comments = dict[tuple[int, ...], descriptor_pb2.SourceCodeInfo.Location]


def _files() -> Iterator[descriptor_pb2.FileDescriptorProto]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "set"
        names = [f"{PACKAGE}/{name}" for name in FILES]
        arguments = ["protoc", f"-I{PROTOS}", f"--descriptor_set_out={output}", "--include_source_info", *names]
        if protoc.main(arguments):
            raise SystemExit(1)
        held = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())
    by_name = {file.name: file for file in held.file}
    yield from (by_name[name] for name in names)


def _file_comment(comments: Comments) -> str:
    """What stands above `syntax`."""
    place = comments.get((12,))
    return _text(place.leading_comments) if place is not None else ""


def _heading(kind: str, name: str, comment: str) -> None:
    print(f"\n### {kind} `{name}`" + (f"\n\n{comment}" if comment else ""))


def _service(service: descriptor_pb2.ServiceDescriptorProto, comments: Comments, path: tuple[int, ...]) -> None:
    _heading("service", service.name, _comment(comments, path))
    for index, method in enumerate(service.method):
        asks = ("stream " if method.client_streaming else "") + _short(method.input_type)
        answers = ("stream " if method.server_streaming else "") + _short(method.output_type)
        print(f"\n**`{method.name}`**`({asks}) returns ({answers})`\n\n{_comment(comments, (*path, 2, index))}")


def _enum(enum: descriptor_pb2.EnumDescriptorProto, comments: Comments, path: tuple[int, ...]) -> None:
    _heading("enum", enum.name, _comment(comments, path))
    print("\n| number | name | meaning |\n| --- | --- | --- |")
    for index, value in enumerate(enum.value):
        print(f"| {value.number} | `{value.name}` | {_cell(_comment(comments, (*path, 2, index)))} |")


def _message(message: descriptor_pb2.DescriptorProto, comments: Comments, path: tuple[int, ...]) -> None:
    _heading("message", message.name, _comment(comments, path))
    if not message.field:
        return
    maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    print("\n| number | field | type | meaning |\n| --- | --- | --- | --- |")
    for index, field in enumerate(message.field):
        meaning = _cell(_comment(comments, (*path, 2, index)))
        print(f"| {field.number} | `{field.name}` | {_type(field, maps)} | {meaning} |")


def _type(field: descriptor_pb2.FieldDescriptorProto, maps: dict[str, descriptor_pb2.DescriptorProto]) -> str:
    if entry := maps.get(_short(field.type_name)):
        key, value = (_type(each, {}) for each in entry.field)
        return f"map of {key} to {value}"
    named = {field.TYPE_MESSAGE, field.TYPE_ENUM}
    kind = _short(field.type_name) if field.type in named else field.Type.Name(field.type)[len("TYPE_") :].lower()
    if field.label == field.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _comment(comments: Comments, path: tuple[int, ...]) -> str:
    place = comments.get(path)
    return _text(place.leading_comments or place.trailing_comments) if place is not None else ""


def _text(comment: str) -> str:
    """Without the space that follows `//`; what is indented further becomes a list."""
    lines = [line.removeprefix(" ").rstrip() for line in comment.strip("\n").splitlines()]
    return "\n".join(f"* {line.strip()}" if line.startswith("  ") else line for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
