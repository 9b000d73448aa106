"""The name that an engine's ranks share. Engines of several ranks are in tests/e2e/test_ranks.py."""

import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from stream_monitor.engine.compat import parallel

CONFIG = SimpleNamespace(instance_id="4f0c2", parallel_config=SimpleNamespace(data_parallel_index=0))


@pytest.fixture(autouse=True)
def one_host(monkeypatch):
    monkeypatch.setattr(parallel, "hosts", lambda: 1)
    monkeypatch.delenv(parallel._START, raising=False)
    monkeypatch.setattr(parallel, "_marked", False)


def _name(queue, again: bool):
    if again:
        parallel.mark_start()
    queue.put(os.environ.get(parallel._START))


@pytest.mark.parametrize("again", [False, True])
def test_child_processes_inherit_the_name_of_the_start(again):
    parallel.mark_start()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_name, args=(queue, again))
    child.start()
    assert queue.get(timeout=60) == os.environ[parallel._START]
    child.join()


def test_another_main_process_is_another_start():
    parallel.mark_start()
    script = (
        "import os; from stream_monitor.engine.compat import parallel as p; p.mark_start(); print(os.environ[p._START])"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert len(other) == 36
    assert other != os.environ[parallel._START]


def test_ranks_of_one_front_end_share_a_name_whatever_their_rendezvous_and_other_engines_have_another():
    parallel.mark_start()
    one = parallel.engine_instance(CONFIG, "tcp://127.0.0.1:1")
    assert one == parallel.engine_instance(CONFIG, "tcp://127.0.0.1:2")
    second = SimpleNamespace(instance_id="90aa1", parallel_config=CONFIG.parallel_config)
    assert one != parallel.engine_instance(second, "tcp://127.0.0.1:1")


def test_without_a_front_end_above_them_ranks_share_that_of_their_rendezvous():
    one = parallel.engine_instance(CONFIG, "tcp://10.0.0.1:1")
    assert one == parallel.engine_instance(CONFIG, "tcp://10.0.0.1:1")
    assert one != parallel.engine_instance(CONFIG, "tcp://10.0.0.1:2")


def test_over_several_hosts_the_first_rank_s_name_counts(monkeypatch):
    torch = pytest.importorskip("torch")
    store = torch.distributed.HashStore()
    monkeypatch.setattr(parallel, "hosts", lambda: 2)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    names = []
    for rank in (0, 1):
        monkeypatch.setenv(parallel._START, f"front end {rank}")
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        names.append(parallel.engine_instance(CONFIG, "tcp://10.0.0.1:1"))
    assert names[0] == names[1]


def test_a_first_rank_that_says_nothing_is_waited_for_some_seconds_and_named(monkeypatch):
    torch = pytest.importorskip("torch")
    store = torch.distributed.HashStore()
    monkeypatch.setattr(parallel, "hosts", lambda: 2)
    monkeypatch.setattr(parallel, "_AGREE_SECONDS", 0.05)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(RuntimeError, match="first rank told no name within"):
        parallel.engine_instance(CONFIG, "tcp://10.0.0.1:1")
