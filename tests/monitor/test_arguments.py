"""Arguments of requests that were not honoured come out as a metric, from the worker's ledger to the page."""

import grpc
import pytest

from stream_monitor.publisher.convert import engine_message, summary_message
from stream_monitor.records import EngineInfo, Geometry, Ledger, StepRecord
from tests.monitor.synthetic import Engine

METRIC = "stream_monitor_request_arguments_refused_total"


def summary(refused: dict[str, int]):
    info = Engine().info
    own = {name: getattr(info, name) for name in EngineInfo.__struct_fields__ if name != "geometry"}
    lists = {name: list(own[name]) for name in ("layers", "query_heads")}
    geometry = Geometry(**{name: getattr(info.geometry, name) for name in Geometry.__struct_fields__})
    record = StepRecord(step=1, wall_time_ns=0, ledger=Ledger(refused_arguments=refused))
    return summary_message(engine_message(EngineInfo(**(own | lists), geometry=geometry)), 1, record, record.ledger)


def test_refused_arguments_are_exported(monitor):
    monitor.publish([summary({"stream_monitor_untrusted:malformed": 2, "other:unknown": 3})])
    assert monitor.metric(METRIC, argument="stream_monitor_untrusted", reason="malformed") == 2
    assert monitor.metric(METRIC, argument="other", reason="unknown") == 3


@pytest.mark.parametrize("refused", [{"no reason": 1}, {f"a{n}:b": 1 for n in range(100)}, {"A:b": 1}, {"a:b:c": 1}])
def test_names_that_would_not_do_as_labels_are_refused(monitor, refused):
    with pytest.raises(grpc.RpcError) as refusal:
        monitor.publish([summary(refused)])
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
