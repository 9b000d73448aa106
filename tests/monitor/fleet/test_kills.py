"""Anything may be killed at any time: no finding that a monitor's store had is lost, and none comes twice."""

from collections.abc import Callable

import pytest

from tests.monitor.fleet.broker import NatsServer
from tests.monitor.fleet.processes import SHIFTING, FleetProcess, metric, until
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import Engine

pytestmark = pytest.mark.timeout(240)


class Traffic:
    """Requests with one finding each, told to several monitors in turn."""

    def __init__(self, monitors: list[MonitorProcess]) -> None:
        self.monitors = monitors
        self.expected: list[str] = []

    def tell(self, count: int) -> None:
        """So many requests more; returns when the monitors' stores have them."""
        for _ in range(count):
            number = len(self.expected)
            monitor = self.monitors[number % len(self.monitors)]
            before = stored(monitor)
            monitor.publish(Engine().request(f"chatcmpl-r{number:03}-0a1b2c3d", SHIFTING))
            self.expected.append(f"chatcmpl-r{number:03}")
            until(lambda monitor=monitor, before=before: stored(monitor) > before, monitor.log.read_text)


def stored(monitor: MonitorProcess) -> float:
    return metric(monitor.http, "stream_monitor_store_written_total", record="event")


def test_a_subscriber_that_goes_from_process_to_process_has_each_finding_once(
    sidecar: Callable[..., MonitorProcess], fleet: Callable[..., FleetProcess], broker: NatsServer
) -> None:
    one, two = fleet("one"), fleet("two")
    monitors = [sidecar(f"m{number}") for number in range(3)]
    traffic = Traffic(monitors)
    start = next(one.follow()).cursor
    traffic.tell(6)

    # A process of the fleet is killed while it is read from: the other goes on where it ended.
    seen, cursor = one.read(start, 4)
    one.kill()
    more, cursor = two.read(cursor, 2)
    seen += more
    traffic.tell(3)

    # The broker is killed; monitors serve on, and one of them is killed with what waits for the broker in its store.
    broker.kill()
    traffic.tell(3)
    monitors[0].kill()
    monitors[0].start()
    broker.start()
    one.start()
    more, cursor = one.read(cursor, 6)
    seen += more
    assert sorted(seen) == traffic.expected
    assert len(set(seen)) == len(seen)

    # Both know the same, in the same order, also after all of it.
    until(lambda: two.metric("position") == one.metric("position"), two.log.read_text)
    assert one.read(start, 12) == two.read(start, 12) == (seen, cursor)
    assert two.ids() == one.ids()
    assert sorted(two.ids()) == traffic.expected
    for monitor in monitors:
        until(lambda monitor=monitor: metric(monitor.http, "stream_monitor_nats_outbox_records") == 0)
        assert metric(monitor.http, "stream_monitor_nats_lost_total") == 0


def test_a_process_that_lost_its_store_reads_the_stream_anew(
    sidecar: Callable[..., MonitorProcess], fleet: Callable[..., FleetProcess]
) -> None:
    one = fleet("one")
    start = next(one.follow()).cursor
    Traffic([sidecar("m")]).tell(2)
    known = one.read(start, 2)
    until(lambda: len(one.ids()) == 2)
    listed = one.ids()
    one.kill()
    for path in one.store.parent.iterdir():
        path.unlink()
    one.start()
    assert one.read(start, 2) == known
    assert one.ids() == listed


def test_a_damaged_store_is_set_aside_and_read_anew(
    sidecar: Callable[..., MonitorProcess], fleet: Callable[..., FleetProcess]
) -> None:
    one = fleet("one")
    start = next(one.follow()).cursor
    Traffic([sidecar("m")]).tell(2)
    known = one.read(start, 2)
    one.end()
    one.store.write_bytes(b"not a database" * 1000)
    one.start()
    assert one.read(start, 2) == known
    assert one.metric("store_set_aside_total") == 1
    assert list(one.store.parent.glob("fleet.db.corrupt-*"))
