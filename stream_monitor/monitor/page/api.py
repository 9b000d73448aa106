"""`MonitorService` for browsers: the same calls and answers, as protobuf JSON over HTTP.

GET /api/requests?model_name=&engine=&request_id=&page_size=&page_token=      ListRequests
GET /api/trace?request_id=&engine_instance=&sample_index=[&download=1]        GetTrace
GET /api/events?kinds=&model_names=&engines=&request_ids=&minimum_severity=&last=&cursor=   Subscribe, as events
GET /api/status                                                               which engines are connected
"""

import re
from collections import Counter
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.json_format import MessageToJson, ParseDict, ParseError
from google.protobuf.message import Message
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stream_monitor.monitor.access import rights
from stream_monitor.monitor.access.rights import Right
from stream_monitor.monitor.ranks import RankBook, rank_name
from stream_monitor.monitor.service import MonitorService
from stream_monitor.v1alpha1 import monitor_pb2

M = TypeVar("M", bound=Message)
_STATUS = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.OUT_OF_RANGE: 410,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}


class Refused(Exception):
    """The service aborted the call."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details

    def response(self) -> Response:
        """The refusal over HTTP."""
        return JSONResponse({"code": self.code.name, "message": self.details}, _STATUS.get(self.code, 500))


class Call:
    """Stands in for gRPC's context: what a service method needs of it."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        """End the call. HTTP has no place for the metadata."""
        raise Refused(code, details)


class Api:
    """The calls that answer once."""

    def __init__(self, service: MonitorService, ranks: RankBook | None, version: str, text: bool) -> None:
        """`ranks` is None where engines are not connected themselves, but the monitors of a fleet."""
        self._service = service
        self._ranks = ranks
        self._version = version
        self._text = text

    async def requests(self, request: Request) -> Response:
        """ListRequests."""
        return await self._answer(monitor_pb2.ListRequestsRequest(), request, self._service.ListRequests)

    async def trace(self, request: Request) -> Response:
        """GetTrace; with `download`, as a file."""
        parameters = request.query_params
        answer = await self._answer(monitor_pb2.GetTraceRequest(), request, self._service.GetTrace, {"download"})
        if parameters.get("download") and answer.status_code == 200:
            name = re.sub(r"[^A-Za-z0-9._-]", "_", parameters.get("request_id", ""))[:100]
            answer.headers["content-disposition"] = f'attachment; filename="trace-{name}.json"'
        return answer

    async def status(self, _: Request) -> Response:
        """What is connected, and what became of its rows; engines of other tenants do not exist."""
        engines: dict[tuple[str, str], dict[str, Any]] = {}
        principal = rights.current()
        for rank in self._ranks.ranks.values() if self._ranks is not None else ():
            # What an engine of all tenants does tells of other tenants' requests.
            if not principal.may(Right.SUBSCRIBE, rank.tenant_of("")):
                continue
            engine = engines.setdefault(
                rank.labels, {"modelName": rank.labels[0], "engine": rank.labels[1], "ranks": [], "rows": Counter()}
            )
            info = rank.engine
            engine["ranks"].append(
                {
                    "name": rank_name(info, info.tensor_parallel_rank, info.pipeline_parallel_rank),
                    "engineInstance": info.instance,
                    "connected": rank.streams > 0,
                    "fault": rank.ledger.newest.fault,
                }
            )
            for (phase, outcome, _reason), count in rank.ledger.cells():
                if phase == "token":
                    engine["rows"][outcome] += count
        listed = [engines[labels] for labels in sorted(engines)]
        who = "" if principal is rights.ANYBODY else principal.name
        answer = {"version": self._version, "text": self._text, "engines": listed, "principal": who}
        return JSONResponse(answer | {"fleet": self._ranks is None})

    async def _answer(self, asked: Message, request: Request, call: Any, others: set[str] | None = None) -> Response:
        try:
            return json_response(await call(parsed(asked, request.query_params, others or set()), Call()))
        except Refused as refused:
            return refused.response()


def json_response(message: Message) -> Response:
    """A message as protobuf JSON."""
    return Response(MessageToJson(message, indent=None), media_type="application/json")


def parsed(message: M, parameters: QueryParams, others: set[str]) -> M:
    """`message` filled from a query by its fields' names; a repeated field may come several times.

    Raises Refused with INVALID_ARGUMENT.
    """
    fields = message.DESCRIPTOR.fields_by_name
    values: dict[str, Any] = {}
    for name in set(parameters.keys()):
        if name in others:
            continue
        if name not in fields:
            valid = ", ".join(sorted({*fields, *others}))
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{name[:100]}: no such parameter; valid: {valid}")
        given = [value for value in parameters.getlist(name) if value]
        if given:
            values[name] = given if fields[name].is_repeated else given[-1]
    try:
        return ParseDict(values, message)
    except ParseError as error:
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, " ".join(str(error).split())) from None
