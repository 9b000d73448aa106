"""Stands in for the `stream-monitor` command, so that the demo's programme can be tested in seconds.

`serve` is a monitor that has seen the requests demo-1 to demo-4; `vllm` an OpenAI server that answers each question
with the same tokens. Both ignore SIGTERM, as a hanging engine would. FAKE_FAULT picks what goes wrong.
"""

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from stream_monitor.v1alpha1 import monitor_pb2 as pb
from stream_monitor.v1alpha1 import monitor_pb2_grpc, summary_pb2

FAULT = os.environ.get("FAKE_FAULT", "")
OUTPUT_IDS = list(range(20, 32))
METRICS = """\
# TYPE stream_monitor_rows_expected_total counter
stream_monitor_rows_expected_total{phase="token"} 40
# TYPE stream_monitor_rows_total counter
stream_monitor_rows_total{phase="token",outcome="captured",reason=""} 10
stream_monitor_rows_total{phase="token",outcome="sampled_out",reason=""} 30
"""
USER = pb.Sentence(index=1, role=summary_pb2.ROLE_USER, first_token=4, end_token=10, text=" How old\nis Anna?")
ANSWER = pb.Sentence(index=2, role=summary_pb2.ROLE_ANSWER, first_token=10, end_token=22)


class Monitor(monitor_pb2_grpc.MonitorServiceServicer):
    def Subscribe(self, request: pb.SubscribeRequest, context: grpc.ServicerContext) -> Iterator[pb.SubscribeResponse]:
        yield pb.SubscribeResponse(cursor="0")
        if FAULT == "monitor_ends":
            context.abort(grpc.StatusCode.UNAVAILABLE, "shutting down")
        for number in range(1, 5):
            for kind in (pb.EVENT_KIND_SENTENCE_CLOSED, pb.EVENT_KIND_ANCHOR_SHIFT, pb.EVENT_KIND_REQUEST_FINISHED):
                event = pb.Event(kind=kind, external_id=f"chatcmpl-demo-{number}", sentence=ANSWER, summary="It moved.")
                event.to_anchors.add(sentence=USER, share=0.75)
                yield pb.SubscribeResponse(event=event)
        while context.is_active():
            time.sleep(0.05)

    def GetTrace(self, request: pb.GetTraceRequest, context: grpc.ServicerContext) -> pb.GetTraceResponse:
        scores = np.array([0.5, np.nan], dtype="<f4")
        moved = pb.Event(kind=pb.EVENT_KIND_ANCHOR_SHIFT, summary="It moved.")
        return pb.GetTraceResponse(sentences=[USER, ANSWER], vertical_score=scores.tobytes(), events=[moved])


async def chat(request: Request) -> Response:
    assert (await request.json())["return_token_ids"]

    async def chunks() -> AsyncIterator[str]:
        head = {"id": f"chatcmpl-{request.headers['X-Request-Id']}", "object": "chat.completion.chunk", "created": 0}
        head["model"] = "m"
        for token in OUTPUT_IDS:
            choice = {"index": 0, "delta": {"content": f"t{token} "}, "token_ids": [token], "finish_reason": None}
            yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def text(request: Request) -> Response:
    return PlainTextResponse(METRICS)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    routes = [Route(path, text) for path in ("/metrics", "/readyz", "/health")]
    if sys.argv[1] == "serve":
        server = grpc.server(ThreadPoolExecutor(8))
        monitor_pb2_grpc.add_MonitorServiceServicer_to_server(Monitor(), server)
        server.add_insecure_port(os.environ["STREAM_MONITOR_GRPC"])
        server.start()
        port = os.environ["STREAM_MONITOR_HTTP"].rpartition(":")[2]
    else:
        if FAULT == "engine_dies":
            sys.exit("ValueError: no such device")
        if FAULT == "engine_hangs":
            print("hanging", flush=True)
            time.sleep(60)
        routes.append(Route("/v1/chat/completions", chat, methods=["POST"]))
        port = sys.argv[sys.argv.index("--port") + 1]
    # Served without uvicorn's own signal handlers, which would end it politely.
    server_config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=int(port), log_level="warning")
    import asyncio

    asyncio.run(uvicorn.Server(server_config)._serve())


if __name__ == "__main__":
    main()
