"""The two clients of the demo: one talks to vLLM as any OpenAI client would, one watches the monitor.

They share nothing but request ids. What the monitor says of a sentence comes with its text, as the demo has the engine
send token ids, which is off otherwise.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import openai

from stream_monitor.v1alpha1 import monitor_pb2 as pb
from stream_monitor.v1alpha1.monitor_pb2_grpc import MonitorServiceStub

if TYPE_CHECKING:
    from stream_monitor.v1alpha1.monitor_pb2_grpc import MonitorServiceAsyncStub

SYSTEM = (
    "You are a careful assistant. Think step by step. Write short sentences. "
    "State each fact you use before you use it. Check the result, then give the answer."
)
QUESTIONS = (
    "A train leaves at 9:40 and drives 150 km at 60 km per hour. It then waits for 20 minutes. After that it drives "
    "another 90 km at 45 km per hour. When does it arrive?",
    "Anna is older than Ben. Ben is older than Carla. Dan is younger than Carla. Eve is older than Anna. Who is the "
    "third oldest, and how do you know?",
    "A shop sells pens in boxes of 12. A school needs 7 pens for each of 30 pupils. It already has 25 pens. How many "
    "boxes must it buy, and how many pens are left over?",
    "A plant doubles its leaves every 3 days. On day 0 it has 5 leaves. On day 9 a goat eats half of them. How many "
    "leaves are there on day 12? Explain each step.",
)
MAX_TOKENS = 200
FINDINGS = (
    pb.EVENT_KIND_ANCHOR_SHIFT,
    pb.EVENT_KIND_PROMPT_DETACHMENT,
    pb.EVENT_KIND_ANCHOR_LOCK,
    pb.EVENT_KIND_UNTRUSTED_ANCHOR,
)
PROGRESS = (pb.EVENT_KIND_SENTENCE_CLOSED, pb.EVENT_KIND_REQUEST_STARTED, pb.EVENT_KIND_REQUEST_FINISHED)
# How long the monitor may take to report the end of a request after its client has the whole answer.
DRAIN_SECONDS = 15.0


class DemoError(RuntimeError):
    """The demo cannot go on. The message is for people, its first line says what happened."""


@dataclass
class Reply:
    """One question, what the engine has answered so far, and what the monitor has said of it so far."""

    id: str
    question: str
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    # The engine has sent all of it; the monitor has seen the end of it.
    answered: bool = False
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    # The newest closed sentence with the anchors it had.
    newest: pb.Event | None = None
    findings: list[pb.Event] = field(default_factory=list)
    trace: pb.GetTraceResponse | None = None


async def ask_all(engine: str, monitor: str, model_name: str, replies: Sequence[Reply]) -> None:
    """Ask every question at once and fill in `replies` until engine and monitor have both seen the end of each.

    `engine` is the server's base address, `monitor` the address of the monitor's gRPC port. Raises DemoError.
    """
    async with grpc.aio.insecure_channel(monitor) as channel:
        stub = MonitorServiceStub(channel)
        subscribed = asyncio.Event()
        watching = asyncio.create_task(_follow(stub, replies, subscribed))
        try:
            await _unless_ended(watching, subscribed.wait())
            async with openai.AsyncOpenAI(base_url=f"{engine}/v1", api_key="none", max_retries=0) as client:
                await _unless_ended(watching, _all_of([_ask(client, model_name, reply) for reply in replies]))
            async with asyncio.timeout(DRAIN_SECONDS):
                await _unless_ended(watching, _all_of([reply.drained.wait() for reply in replies]))
            for reply in replies:
                reply.trace = await stub.GetTrace(pb.GetTraceRequest(request_id=_external_id(reply)))
                reply.findings = list(reply.trace.events)
        except TimeoutError:
            missing = ", ".join(reply.id for reply in replies if not reply.drained.is_set())
            raise DemoError(f"the monitor did not report the end of {missing} in {DRAIN_SECONDS:.0f} s") from None
        except openai.OpenAIError as error:
            raise DemoError(f"the engine failed to answer: {error}") from None
        except grpc.aio.AioRpcError as error:
            raise DemoError(f"the monitor ended the call: {error.code().name}: {error.details()}") from None
        finally:
            await _cancel(watching)


async def _unless_ended(watching: "asyncio.Task[None]", wanted: Coroutine[Any, Any, object]) -> None:
    """Wait for `wanted`, but fail as soon as the subscription does."""
    task = asyncio.create_task(wanted)
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await watching  # raises what ended it
            raise DemoError("the monitor ended the subscription")
        await task
    finally:
        await _cancel(task)


async def _all_of(wanted: Sequence[Coroutine[Any, Any, object]]) -> None:
    await asyncio.gather(*wanted)


async def _cancel(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _ask(client: openai.AsyncOpenAI, model_name: str, reply: Reply) -> None:
    """Stream one answer. `return_token_ids` is vLLM's addition: the monitor's account is of these very tokens."""
    stream = await client.chat.completions.create(
        model=model_name,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": reply.question}],
        max_tokens=MAX_TOKENS,
        temperature=0.0,
        stream=True,
        extra_headers={"X-Request-Id": reply.id},
        extra_body={"return_token_ids": True},
    )
    async for chunk in stream:
        for choice in chunk.choices:
            reply.output_ids += (choice.model_extra or {}).get("token_ids") or []
            reply.text += choice.delta.content or ""
    reply.answered = True


async def _follow(stub: "MonitorServiceAsyncStub", replies: Sequence[Reply], subscribed: asyncio.Event) -> None:
    """Keep `replies` up to date with what the monitor says, until cancelled."""
    by_external_id = {_external_id(reply): reply for reply in replies}
    async for response in stub.Subscribe(pb.SubscribeRequest(kinds=[*FINDINGS, *PROGRESS])):
        subscribed.set()
        event = response.event
        reply = by_external_id.get(event.external_id)
        if reply is None:
            continue
        if event.kind == pb.EVENT_KIND_SENTENCE_CLOSED:
            reply.newest = event
        elif event.kind == pb.EVENT_KIND_REQUEST_FINISHED:
            reply.drained.set()
        elif event.kind in FINDINGS:
            reply.findings.append(event)


def _external_id(reply: Reply) -> str:
    """The id under which vLLM's chat endpoint knows a request whose client sent X-Request-Id."""
    return f"chatcmpl-{reply.id}"


def top_sentences(trace: pb.GetTraceResponse, count: int = 3) -> list[tuple[pb.Sentence, float]]:
    """The sentences that later ones read most, with their vertical scores, highest first."""
    scores = np.frombuffer(trace.vertical_score, dtype="<f4")
    order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0]  # NaN compares false
    return [(trace.sentences[i], float(scores[i])) for i in order[:count]]
