"""A request that is deleted anywhere is gone everywhere: from the broker's files, each process and its monitor."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from nats.js import JetStreamContext

from stream_monitor.monitor import recorder
from stream_monitor.monitor.archive import StoreUnavailable
from stream_monitor.monitor.fleet.names import request_hash
from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.conftest import Running
from tests.monitor.fleet.broker import STREAM, NatsServer
from tests.monitor.fleet.processes import SHIFTING, FleetProcess, metric, until
from tests.monitor.process import MonitorProcess, free_port
from tests.monitor.synthetic import Engine, Look, finished
from tests.monitor.test_deletion import files, out_of_reach
from tests.monitor.test_store import names as store_names

pytestmark = pytest.mark.timeout(240)

GONE, KEPT = "chatcmpl-gone-0a1b2c3d", "chatcmpl-kept-4e5f6a7b"


def store_holds(process: FleetProcess | MonitorProcess, words: bytes) -> bool:
    return any(words in path.read_bytes() for path in process.store.parent.iterdir() if path.is_file())


@pytest.mark.parametrize("where", ["on a monitor", "on a process of the fleet"])
def test_nothing_of_it_is_left_anywhere(
    where: str, sidecar: Callable[..., MonitorProcess], fleet: Callable[..., FleetProcess], broker: NatsServer
) -> None:
    one, two, monitor = fleet("one"), fleet("two"), sidecar("m")
    start = next(one.follow()).cursor
    rank = Engine()
    monitor.publish(rank.request(GONE, SHIFTING) + rank.request(KEPT, SHIFTING))
    places: list[FleetProcess | MonitorProcess] = [one, two, monitor]
    for process in (one, two):
        until(lambda process=process: process.metric("position") == 4, process.log.read_text)
    assert broker.holds(b"chatcmpl-gone")
    assert all(store_holds(place, b"chatcmpl-gone") for place in places)

    asked = monitor if where == "on a monitor" else one
    answer = asked.api.DeleteRequest(monitor_pb2.DeleteRequestRequest(request_id="gone"), timeout=60)
    assert [key.request_id for key in answer.keys] == [GONE]

    assert not broker.holds(b"gone")
    for place in places:
        until(lambda place=place: not store_holds(place, b"gone"), place.log.read_text)
        with pytest.raises(grpc.RpcError) as error:
            place.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="gone"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
    for process in (one, two):
        assert process.ids() == ["chatcmpl-kept"]
        assert process.read(start, 1)[0] == ["chatcmpl-kept"]

    # What the engine still sends of it gets no further than the monitor; a process that begins now knows nothing of it.
    monitor.publish([rank.summary([Look(GONE, 200)]), rank.summary(finished=[finished(GONE, 210)])])
    assert metric(monitor.http, "stream_monitor_rows_total", outcome="discarded", reason="deleted") > 0
    three = fleet("three")
    assert three.ids() == ["chatcmpl-kept"]
    assert not store_holds(three, b"gone")
    assert not broker.holds(b"gone")
    broker.end()
    assert not broker.holds(b"gone")


def test_what_is_published_late_is_removed_again(
    sidecar: Callable[..., MonitorProcess], fleet: Callable[..., FleetProcess], broker: NatsServer
) -> None:
    one, monitor = fleet("one"), sidecar("m")
    monitor.publish(Engine().request(GONE, SHIFTING))
    until(lambda: one.metric("position") == 2)

    async def copies(context: JetStreamContext) -> list[tuple[str, bytes, dict[str, str]]]:
        held = [await context.get_msg(STREAM, seq=sequence) for sequence in (1, 2)]
        return [(each.subject, each.data, each.headers) for each in held]  # type: ignore[misc]

    messages = broker.ask(copies)
    one.api.DeleteRequest(monitor_pb2.DeleteRequestRequest(request_id=GONE), timeout=60)
    # As from a monitor that was cut off meanwhile; the process has been started anew since.
    one.kill()
    one.start()

    async def again(context: JetStreamContext) -> None:
        for subject, body, headers in messages:
            # Under no message id: the broker itself would recognise it for two minutes.
            kept = {name: value for name, value in headers.items() if name != "Nats-Msg-Id"}
            await context.publish(subject, body, headers=kept)

    broker.ask(again)
    until(lambda: one.metric("messages_total", outcome="late") == 2, one.log.read_text)
    until(lambda: not broker.holds(b"gone"))
    assert one.ids() == []
    assert not store_holds(one, b"gone")


def test_a_deletion_waits_for_a_broker_that_is_away(
    sidecar: Callable[..., MonitorProcess], fleet: Callable[..., FleetProcess], broker: NatsServer
) -> None:
    one, monitor = fleet("one"), sidecar("m")
    monitor.publish(Engine().request(GONE, SHIFTING))
    until(lambda: one.metric("position") == 2)
    broker.kill()
    asked = monitor_pb2.DeleteRequestRequest(request_id=GONE)
    for place, words in ((one, "nothing was deleted"), (monitor, "gone from this monitor")):
        until(lambda place=place: metric(place.http, _UP[type(place)]) == 0)
        with pytest.raises(grpc.RpcError) as error:
            place.api.DeleteRequest(asked, timeout=60)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert words in error.value.details()
    assert one.ids() == ["chatcmpl-gone"]
    # The monitor is killed before it could tell the broker.
    monitor.kill()
    monitor.start()
    broker.start()
    until(lambda: one.ids() == [], one.log.read_text)
    until(lambda: not broker.holds(b"gone"))
    until(lambda: not store_holds(one, b"gone"))


def test_what_others_deleted_before_the_store_is_open_leaves_it_then(
    run: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", (0.1,))
    store, rank = tmp_path / "store" / "monitor.db", Engine()
    monitor = run(store=str(store))
    monitor.publish(rank.request(GONE, SHIFTING)[:-1])
    monitor.stop()
    assert b"gone" in files(store)
    keys = [monitor_pb2.TraceKey(engine_instance=rank.info.instance, request_id=name) for name in (GONE, KEPT)]
    deleted = [request_hash(key) for key in keys]
    with out_of_reach(store):
        again = run(store=str(store), nats=f"nats://127.0.0.1:{free_port()}")
        again.publish([rank.summary([Look(KEPT, 200)])])
        with pytest.raises(StoreUnavailable):
            again.call(again.server.link._heard(deleted))
        assert store_names(again.api) == [], "from memory it is gone at once"
    until(lambda: again.metric("stream_monitor_store_up") == 1)
    again.call(again.server.link._heard(deleted))
    assert b"gone" not in files(store)


_UP = {FleetProcess: "stream_monitor_fleet_up", MonitorProcess: "stream_monitor_nats_up"}
