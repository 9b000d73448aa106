"""The worker class: whatever goes wrong while the capture is set up, the engine loads its model as before."""

import sys

import pytest

pytest.importorskip("vllm")


def test_a_capture_that_cannot_be_imported_leaves_the_engine_alone(monkeypatch, caplog):
    from stream_monitor.engine import worker as module

    loaded = []
    monkeypatch.setattr(module.NativeWorker, "load_model", lambda self: loaded.append(True))
    monkeypatch.setitem(sys.modules, "stream_monitor.engine.installation", None)
    worker = module.StreamWorker.__new__(module.StreamWorker)
    worker.load_model()
    assert loaded == [True]
    assert worker.stream_installation is None
    assert not worker.stream_monitor_status()["capturing"]
