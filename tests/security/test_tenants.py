"""Requests of other tenants do not exist: over gRPC and HTTP, in memory and in the store, live and on resumption."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from stream_monitor.monitor.export import export
from stream_monitor.v1alpha1 import ingest_pb2, monitor_pb2, summary_pb2
from tests.monitor.conftest import TIMEOUT
from tests.monitor.spoken import Speech, byte_level
from tests.monitor.synthetic import Engine, engine
from tests.monitor.test_service import SHIFTING
from tests.security.guarded import EVERYTHING, SCRAPER, Guarded, as_, code_of, principal

NOT_FOUND = grpc.StatusCode.NOT_FOUND
READ = {right: EVERYTHING[right] for right in ("subscribe", "read_text", "delete")}
ACCESS = SCRAPER + "".join(
    (
        principal("engine", publish="*"),
        principal("of-acme", publish="acme"),
        principal("acme", **dict.fromkeys(READ, "acme")),
        principal("beta", **dict.fromkeys(READ, "beta")),
        principal("both", subscribe=["acme", "beta"], read_text=["beta"], delete=["beta"]),
        principal("all", **READ),
    )
)
# Two requests of one external id, as X-Request-Id allows, and one that is nobody's.
OF = {"acme": "same-aaaaaaaa", "beta": "same-bbbbbbbb", "": "own-cccccccc"}


def of_tenant(tenant: str, name: str = "", rank: Engine | None = None) -> list[summary_pb2.StepSummary]:
    """A request with a finding, whose start says whose it is."""
    summaries = (rank or Engine()).request(name or OF[tenant], SHIFTING)
    for started in (started for summary in summaries for started in summary.started):
        started.tenant = tenant
    return summaries


class Reader:
    """What one principal gets to see."""

    def __init__(self, monitor: Guarded, name: str) -> None:
        self.monitor, self.name = monitor, name
        self.api = monitor.monitor()
        self.how = {"timeout": TIMEOUT, "metadata": as_(name)}

    def listed(self, request_id: str = "", page_size: int = 1) -> list[str]:
        """In pages of one, so that a page is no hint at what was left out of it."""
        found: list[str] = []
        asked = monitor_pb2.ListRequestsRequest(request_id=request_id, page_size=page_size)
        while True:
            page = self.api.ListRequests(asked, **self.how)
            assert len(page.requests) == page_size or not page.next_page_token
            found += [info.key.request_id for info in page.requests]
            if not page.next_page_token:
                return found
            asked.page_token = page.next_page_token

    def trace(self, request_id: str) -> monitor_pb2.GetTraceResponse:
        return self.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=request_id), **self.how)

    def events(self, count: int, **asked: Any) -> list[str]:
        stream = self.api.Subscribe(monitor_pb2.SubscribeRequest(**asked), **self.how)
        try:
            return [r.event.key.request_id for r in islice((r for r in stream if r.HasField("event")), count)]
        finally:
            stream.cancel()

    def delete(self, request_id: str) -> None:
        self.api.DeleteRequest(monitor_pb2.DeleteRequestRequest(request_id=request_id, all=True), **self.how)

    def page(self, path: str) -> httpx.Response:
        return self.monitor.get(path, self.name)


@pytest.fixture(params=["memory", "store"])
def monitor(start: Callable[..., Guarded], request: pytest.FixtureRequest, tmp_path: Path) -> Guarded:
    """Holds a request of each tenant; under `store` another monitor took them in, and this one's memory is empty."""
    settings = {} if request.param == "memory" else {"store": str(tmp_path / "monitor.db")}
    first = start(ACCESS, **settings)
    for tenant in OF:
        first.tell(of_tenant(tenant), "engine")
    if not settings:
        return first
    first.stop()
    return start(ACCESS, **settings)


def test_each_sees_what_is_its_own(monitor: Guarded) -> None:
    acme, beta, both, everybody = (Reader(monitor, name) for name in ("acme", "beta", "both", "all"))
    assert acme.listed() == [OF["acme"]]
    assert beta.listed() == [OF["beta"]]
    assert both.listed() == [OF["beta"], OF["acme"]]
    assert everybody.listed() == [OF[""], OF["beta"], OF["acme"]]
    # The id that both know means each one's own, and is not ambiguous for want of the other's.
    assert acme.trace("same").info.key.request_id == OF["acme"]
    assert beta.trace("same").info.tenant == "beta"
    assert acme.listed("same") == [OF["acme"]]
    assert code_of(lambda: everybody.trace("same")) is grpc.StatusCode.FAILED_PRECONDITION
    assert acme.events(1, last=10) == [OF["acme"]]
    assert both.events(2, last=10) == [OF["acme"], OF["beta"]]


def test_what_is_anothers_is_not_found_like_what_never_was(monitor: Guarded) -> None:
    acme = Reader(monitor, "acme")

    def answer(call: Callable[[], object], request_id: str) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as raised:
            call()
        return raised.value.code(), raised.value.details().replace(request_id, "ID")

    for call in (acme.trace, acme.delete):
        answers = {answer(partial(call, name), name) for name in (OF["beta"], OF[""], "nobody-dddddddd")}
        assert len(answers) == 1
        assert {code for code, _ in answers} == {NOT_FOUND}
    pages = [acme.page(f"/api/trace?request_id={name}") for name in (OF["beta"], OF[""], "nobody-dddddddd")]
    assert {page.status_code for page in pages} == {404}
    assert acme.listed(OF["beta"]) == []
    assert Reader(monitor, "all").listed() == [OF[""], OF["beta"], OF["acme"]]


def test_http_is_no_way_around(monitor: Guarded) -> None:
    acme = Reader(monitor, "acme")
    assert [one["key"]["requestId"] for one in acme.page("/api/requests").json()["requests"]] == [OF["acme"]]
    assert acme.page("/api/trace?request_id=same&download=1").json()["info"]["tenant"] == "acme"
    seen = []
    with monitor.browser() as client, client.stream("GET", "/api/events?last=10", headers=dict(as_("acme"))) as stream:
        data = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
        seen = [one["event"]["key"]["requestId"] for one in islice((one for one in data if "event" in one), 1)]
    assert seen == [OF["acme"]]
    # An engine that serves all tenants tells of others' requests by its counts alone.
    assert acme.page("/api/status").json()["engines"] == []


def test_deleting_is_a_right_of_its_own(monitor: Guarded) -> None:
    both = Reader(monitor, "both")
    # It may read acme's, and not delete it.
    assert code_of(lambda: both.delete(OF["acme"])) is NOT_FOUND
    both.delete("same")
    assert both.listed() == [OF["acme"]]
    assert Reader(monitor, "acme").listed() == [OF["acme"]]


def test_events_come_live_to_their_tenant_alone(start: Callable[..., Guarded]) -> None:
    monitor = start(ACCESS)
    acme = Reader(monitor, "acme")
    stream = acme.api.Subscribe(
        monitor_pb2.SubscribeRequest(kinds=[monitor_pb2.EVENT_KIND_REQUEST_FINISHED]), metadata=as_("acme")
    )
    next(stream)
    for tenant in ("beta", "", "acme"):
        monitor.tell(of_tenant(tenant), "engine")
    received = next(stream)
    assert (received.event.tenant, received.lost) == ("acme", 0)
    # The cursor of what acme saw last goes on over others' findings.
    monitor.tell(of_tenant("beta", "late-eeeeeeee"), "engine")
    monitor.tell(of_tenant("acme", "late-ffffffff"), "engine")
    assert acme.events(1, cursor=received.cursor) == ["late-ffffffff"]


def test_a_publisher_of_one_tenant_publishes_for_that_one(start: Callable[..., Guarded]) -> None:
    monitor = start(ACCESS)
    rank = Engine()
    # Whatever the engine says.
    monitor.tell(of_tenant("beta", "mine-aaaaaaaa", rank), "of-acme")
    assert Reader(monitor, "acme").listed() == ["mine-aaaaaaaa"]
    assert Reader(monitor, "beta").listed() == []
    # Another publisher gets nothing into an engine of acme's, nor acme's into one of another.
    refused = ingest_pb2.PUBLISH_OUTCOME_REFUSED
    (answer,) = monitor.tell([rank.summary()], "engine")
    assert (answer.outcome, answer.reason) == (refused, "other_tenant")
    tensor = Engine(engine(rank.info.instance, tensor_parallel_rank=1, tensor_parallel_size=2))
    (answer,) = monitor.tell([tensor.summary()], "engine")
    assert (answer.outcome, answer.reason) == (refused, "other_tenant")
    assert monitor.metric("stream_monitor_messages_total", outcome="refused", reason="other_tenant") == 2
    assert monitor.tell([rank.summary()], "of-acme")[0].outcome == ingest_pb2.PUBLISH_OUTCOME_ACCEPTED


def test_an_engine_of_one_tenant_and_requests_whose_start_was_not_seen(start: Callable[..., Guarded]) -> None:
    monitor = start(ACCESS)
    monitor.tell(of_tenant("", "default-aaaaaaaa", Engine(engine(tenant="acme"))), "engine")
    late = of_tenant("beta", "late-bbbbbbbb", Engine(engine(tenant="acme")))
    for summary in late:
        del summary.started[:]
    monitor.tell(late, "engine")
    # Where a gateway names tenants, it may have been any one's.
    named = of_tenant("beta", "named-dddddddd", Engine(engine(tenant="acme", tenants_by_request=True)))
    for summary in named:
        del summary.started[:]
    monitor.tell(named, "engine")
    # Nothing said whose it was: it is nobody's, not everybody's.
    unknown = of_tenant("beta", "unknown-cccccccc")
    for summary in unknown:
        del summary.started[:]
    monitor.tell(unknown, "engine")
    assert Reader(monitor, "acme").listed() == ["late-bbbbbbbb", "default-aaaaaaaa"]
    assert Reader(monitor, "beta").listed() == []
    assert Reader(monitor, "all").listed() == [
        "unknown-cccccccc",
        "named-dddddddd",
        "late-bbbbbbbb",
        "default-aaaaaaaa",
    ]
    assert [one["engine"] for one in Reader(monitor, "acme").page("/api/status").json()["engines"]] == ["0"]


@pytest.mark.parametrize("field", ["started", "engine"])
def test_what_is_no_tenant_is_refused(start: Callable[..., Guarded], field: str) -> None:
    monitor = start(ACCESS)
    summary = of_tenant("acme")[0] if field == "started" else Engine(engine(tenant="*")).summary()
    if field == "started":
        summary.started[0].tenant = "a" * 65
    assert code_of(lambda: monitor.tell([summary], "engine")) is grpc.StatusCode.INVALID_ARGUMENT
    assert monitor.metric("stream_monitor_messages_total", outcome="invalid", reason="value") == 1


@pytest.fixture
def spoken(start: Callable[..., Guarded], tmp_path: Path) -> Iterator[Guarded]:
    """A monitor with the text of one request of acme's and one of beta's."""
    tokenizer = byte_level(tmp_path)
    monitor = start(ACCESS, tokenizers=str(tokenizer))
    for tenant, number in (("acme", "a"), ("beta", "b")):
        speech = Speech(tokenizer, f"said-{8 * number}", "What is 3 + 4?")
        begun = speech.start()
        begun[0].started[0].tenant = tenant
        said = [speech.say(f" So it must be seven, Anna is older than Ben {tenant}.") for _ in range(8)]
        monitor.tell([*begun, *chain.from_iterable(said), *speech.finish()], "engine")
    return monitor


def test_text_is_read_by_whoever_may(spoken: Guarded) -> None:
    acme, both = Reader(spoken, "acme"), Reader(spoken, "both")
    for reader, name, may in (
        (acme, "said-aaaaaaaa", True),
        (both, "said-bbbbbbbb", True),
        (both, "said-aaaaaaaa", False),
    ):
        trace = reader.trace(name)
        assert any("seven" in sentence.text for sentence in trace.sentences) is may
        assert trace.info.no_text_reason == ("" if may else "not_permitted")
        assert ("seven" in str(trace)) is may
        # All the rest is the same.
        assert len(trace.matrix_share) == len(Reader(spoken, "all").trace(name).matrix_share) > 0
        page = reader.page(f"/api/trace?request_id={name}").text
        assert ("seven" in page) is may
        listed = reader.api.ListRequests(monitor_pb2.ListRequestsRequest(request_id=name), **reader.how)
        # Of the heaviest anchor, which is the question.
        assert ("What is" in str(listed)) is may
        assert listed.requests[0].HasField("top_anchor")


def test_events_come_without_the_text_that_may_not_be_read(spoken: Guarded, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    reader = Reader(spoken, "both")
    stream = reader.api.Subscribe(
        monitor_pb2.SubscribeRequest(kinds=[monitor_pb2.EVENT_KIND_SENTENCE_CLOSED]), metadata=as_("both")
    )
    whole = Reader(spoken, "all").api.Subscribe(
        monitor_pb2.SubscribeRequest(kinds=[monitor_pb2.EVENT_KIND_SENTENCE_CLOSED]), metadata=as_("all")
    )
    next(stream), next(whole)
    for tenant, number in (("acme", "c"), ("beta", "d")):
        speech = Speech(tokenizer, f"live-{8 * number}", "What is 3 + 4?")
        begun = speech.start()
        begun[0].started[0].tenant = tenant
        spoken.tell([*begun, *speech.say(" So it must be seven."), *speech.finish()], "engine")
    hidden, shown = next(stream).event, next(stream).event
    assert (hidden.tenant, hidden.sentence.text, hidden.no_text_reason) == ("acme", "", "not_permitted")
    assert (shown.tenant, shown.sentence.text, shown.no_text_reason) == ("beta", " So it must be seven.", "")
    # What was left out for one was left in for the other: they do not share the message.
    assert next(whole).event.sentence.text == " So it must be seven."


def test_an_export_of_one_tenant_holds_nothing_else(start: Callable[..., Guarded], tmp_path: Path) -> None:
    monitor = start(ACCESS, store=str(tmp_path / "monitor.db"))
    for tenant in OF:
        monitor.tell(of_tenant(tenant), "engine")
    monitor.stop()
    said = export(str(tmp_path / "monitor.db"), tmp_path / "out", "jsonl", "", "", "", "beta")
    assert said.endswith("1 events, 1 traces")
    for name in ("events", "traces"):
        (line,) = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(line)["request_id"] == OF["beta"]
