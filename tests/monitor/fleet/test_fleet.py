"""Monitors and a fleet over a real broker: what each process answers; kills lose nothing and repeat nothing."""

from collections.abc import Callable

import grpc
import pytest

from stream_monitor.v1alpha1 import monitor_pb2
from tests.monitor.fleet.broker import NatsServer
from tests.monitor.fleet.processes import SHIFTING, FleetProcess, metric, until
from tests.monitor.process import MonitorProcess
from tests.monitor.synthetic import Engine

pytestmark = pytest.mark.timeout(240)


def test_a_fleet_answers_for_all_monitors(
    sidecar: Callable[..., MonitorProcess], fleet: Callable[..., FleetProcess], broker: NatsServer
) -> None:
    one = fleet("one")
    cursor = next(one.follow()).cursor
    monitors = [sidecar(f"m{number}") for number in range(3)]
    for number, monitor in enumerate(monitors):
        monitor.publish(Engine().request(f"chatcmpl-r{number}-0a1b2c3d", SHIFTING))
    until(lambda: sorted(one.ids()) == ["chatcmpl-r0", "chatcmpl-r1", "chatcmpl-r2"], one.log.read_text)
    found, after = one.read(cursor, 3)
    assert sorted(found) == ["chatcmpl-r0", "chatcmpl-r1", "chatcmpl-r2"]
    # A process that begins later knows the same, under the same cursors.
    two = fleet("two")
    assert two.ids() == one.ids()
    assert two.read(cursor, 3) == (found, after)
    asked = monitor_pb2.GetTraceRequest(request_id="r1", with_heads=True)
    traces = [process.api.GetTrace(asked) for process in (one, two, monitors[1])]
    assert traces[0] == traces[1] == traces[2]
    assert traces[0].head_share
    assert one.metric("messages_total", record="finding", outcome="read") == 3
    assert metric(monitors[0].http, "stream_monitor_nats_sent_total", record="finding") == 1
    with pytest.raises(grpc.RpcError) as error:
        two.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="nobody"))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
