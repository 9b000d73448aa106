"""The page's addresses without a browser: who is answered, what an answer may do, and streams that end."""

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from google.protobuf.json_format import Parse, ParseDict

from stream_monitor.monitor.page import routes
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import TIMEOUT, Running, starter
from tests.monitor.synthetic import SENTENCE, Engine, started, tokens

SHIFT = [4] * 14 + [30] * 8


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    yield from starter(tmp_path)


@pytest.fixture
def monitor(run: Callable[..., Running]) -> Running:
    return run(http_hosts="monitor.example, other.example")


def get(monitor: Running, path: str, **headers: str) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=TIMEOUT) as client:
        return client.get(f"http://{monitor.server.http_address}{path}", headers=headers)


def events(monitor: Running, query: str = "", most: int = 1, **headers: str) -> list[dict[str, str]]:
    """The first `most` server-sent events, by field."""
    found: list[dict[str, str]] = []
    with (
        httpx.Client(trust_env=False, timeout=TIMEOUT) as client,
        client.stream("GET", f"http://{monitor.server.http_address}/api/events?{query}", headers=headers) as response,
    ):
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "event" in fields:
                found.append(fields)
                fields = {}
                if len(found) == most:
                    return found
            else:
                fields = {}
    return found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:9751", 200),
        ("127.0.0.1", 200),
        ("[::1]:9751", 200),
        ("10.1.2.3:80", 200),
        ("Monitor.Example:9751", 200),
        ("other.example", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:9751", 421),
        ("notlocalhost", 421),
        ("", 421),
    ],
)
def test_browsers_ask_by_an_address_or_a_known_name(monitor: Running, host: str, status: int) -> None:
    for path in ("/", "/events", "/trace", "/api/status", "/api/requests", "/static/style.css"):
        assert get(monitor, path, host=host).status_code == status
    assert monitor.metric("stream_monitor_page_refused_total", reason="host") == (6 if status == 421 else 0)
    # Machines are not fooled by names, and these tell nothing of any request.
    for path in ("/metrics", "/healthz", "/readyz"):
        assert get(monitor, path, host=host).status_code == 200


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)]
)
def test_pages_of_other_sites_get_nothing(monitor: Running, site: str, status: int) -> None:
    assert get(monitor, "/api/status", **{"sec-fetch-site": site}).status_code == status
    assert monitor.metric("stream_monitor_page_refused_total", reason="cross_site") == (status == 403)
    assert get(monitor, "/", **{"sec-fetch-site": site}).status_code == 200, "a link may lead here"


def test_every_answer_forbids_what_the_page_does_not_need(monitor: Running) -> None:
    for path in ("/", "/static/js/main.js", "/api/status", "/api/trace?request_id=none", "/nowhere"):
        answer = get(monitor, path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert get(monitor, "/api/status").headers["cache-control"] == "no-store"
    assert "<script>" not in get(monitor, "/").text.replace(" ", "")
    assert get(monitor, "/static/../api.py").status_code == get(monitor, "/static/%2e%2e/api.py").status_code == 404


def test_the_api_is_the_service_as_json(monitor: Running) -> None:
    monitor.publish(Engine().request("a/b", SHIFT))
    monitor.publish(Engine().request("second", [4] * 3))
    trace = get(monitor, "/api/trace?request_id=a/b")
    expected = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="a/b"))
    assert Parse(trace.text, monitor_pb2.GetTraceResponse()) == expected
    file = get(monitor, "/api/trace?request_id=a/b&download=1")
    assert file.content == trace.content
    assert file.headers["content-disposition"] == 'attachment; filename="trace-a_b.json"'
    listed = get(monitor, "/api/requests?page_size=1")
    answer = monitor.api.ListRequests(monitor_pb2.ListRequestsRequest(page_size=1))
    assert Parse(listed.text, monitor_pb2.ListRequestsResponse()) == answer
    more = get(monitor, f"/api/requests?page_size=1&page_token={answer.next_page_token}").json()
    assert [info["externalId"] for info in more["requests"]] == ["a/b"]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/trace?request_id=nobody", 404, "no trace of request 'nobody': unknown"),
        ("/api/trace?request_id=twice", 409, "2 traces carry"),
        ("/api/requests?page_size=many", 400, "page_size"),
        ("/api/requests?page_size=5000", 400, "at most 1000"),
        ("/api/requests?size=5", 400, "size: no such parameter; valid: engine, model_name, page_size"),
        ("/api/events?kinds=NO_KIND", 400, "NO_KIND"),
        ("/api/events?cursor=!!", 400, "cursor is not one"),
        ("/api/events?last=1001", 400, "at most 1000"),
    ],
)
def test_a_bad_question_is_one_named_line(monitor: Running, path: str, status: int, message: str) -> None:
    for _ in range(2):
        monitor.publish(Engine().request("twice", [4]))
    answer = get(monitor, path)
    assert answer.status_code == status
    assert message in answer.json()["message"]
    assert "\n" not in answer.json()["message"]


def test_status_tells_which_engines_are_there(monitor: Running) -> None:
    nothing = {"version": "test", "text": False, "engines": [], "principal": "", "fleet": False}
    assert get(monitor, "/api/status").json() == nothing
    monitor.publish(Engine().request("r", [4] * 4))
    (engine,) = get(monitor, "/api/status").json()["engines"]
    assert (engine["modelName"], engine["engine"]) == ("tiny", "0")
    assert [rank["name"] for rank in engine["ranks"]] == ["tp0"]
    assert not engine["ranks"][0]["connected"], "its stream has ended"
    assert engine["rows"]["expected"] == sum(count for name, count in engine["rows"].items() if name != "expected")


def test_a_stream_goes_on_after_the_last_event_it_sent(monitor: Running) -> None:
    for name in ("one", "two", "three"):
        monitor.publish(Engine().request(name, SHIFT))
    opening, first, second = events(monitor, "last=2", most=3)
    assert "event" not in json.loads(opening["data"])
    found = [ParseDict(json.loads(each["data"]), monitor_pb2.SubscribeResponse()) for each in (first, second)]
    assert [response.event.external_id for response in found] == ["two", "three"]
    _, again = events(monitor, "last=2", most=2, **{"last-event-id": first["id"]})
    assert json.loads(again["data"])["event"]["externalId"] == "three"


def test_a_cursor_of_another_start_is_told_and_gone_on_from(monitor: Running) -> None:
    monitor.publish(Engine().request("one", SHIFT))
    foreign = base64.urlsafe_b64encode(b"0123:7").decode()
    gone, opening, replayed = events(monitor, "last=5", most=3, **{"last-event-id": foreign})
    assert gone["event"] == "gone"
    assert "event" not in json.loads(opening["data"])
    assert json.loads(replayed["data"])["event"]["externalId"] == "one"


def test_streams_are_counted_and_their_subscriptions_end(run: Callable[..., Running]) -> None:
    monitor = run(max_live_pages=2)

    def stream() -> httpx.Response:
        client = httpx.Client(trust_env=False, timeout=TIMEOUT)
        url = f"http://{monitor.server.http_address}/api/events"
        return client.send(client.build_request("GET", url), stream=True)

    opened = [stream(), stream()]
    assert [each.status_code for each in opened] == [200, 200]
    refused = get(monitor, "/api/events")
    assert refused.status_code == 503
    assert "max_live_pages" in refused.json()["message"]
    assert monitor.metric("stream_monitor_page_refused_total", reason="too_many_pages") == 1
    for each in opened:
        each.close()
    end = time.monotonic() + TIMEOUT
    while monitor.metric("stream_monitor_subscribers"):
        assert time.monotonic() < end, "a closed page is still a subscriber"
    assert get(monitor, "/api/status").status_code == 200
    assert events(monitor)


def test_stopping_ends_the_streams(monitor: Running) -> None:
    with (
        httpx.Client(trust_env=False, timeout=TIMEOUT) as client,
        client.stream("GET", f"http://{monitor.server.http_address}/api/events") as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("retry:")
        begun = time.monotonic()
        monitor.stop()
        assert time.monotonic() - begun < 5
        assert not any(line.startswith("event: gone") for line in lines)


def test_a_page_that_falls_behind_loses_the_oldest_and_is_told(run: Callable[..., Running]) -> None:
    monitor = run(subscriber_queue=4)
    url = f"http://{monitor.server.http_address}/api/events?kinds=EVENT_KIND_SENTENCE_CLOSED"
    with httpx.Client(trust_env=False, timeout=TIMEOUT) as client, client.stream("GET", url) as response:
        engine = Engine()
        # All in one message, so that nothing is sent before the last sentence is closed.
        burst = engine.summary(started=[started("r")], tokens=[tokens("r", 48, SENTENCE * 300)])
        monitor.publish([burst])
        data = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))
        _, first, *others = [next(data) for _ in range(5)]
    # The last sentence is open, and the last closed one waits for its rows.
    assert int(first["lost"]) == 298 - 4 == monitor.metric("stream_monitor_subscriber_events_lost_total")
    assert [each["event"]["sentence"]["index"] for each in (first, *others)] == [302, 303, 304, 305]


def test_without_plotly_the_page_is_served_and_says_so(monitor: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(get(monitor, "/static/plotly.js").content) > 1 << 20
    monkeypatch.setattr(routes, "find_spec", lambda name: None)
    answer = get(monitor, "/static/plotly.js")
    assert answer.status_code == 200
    assert "stream-monitor[page]" in answer.text
    assert "plotly" not in sys.modules, "its 64 MB are never imported"
