"""What the pages in docs/ and the README claim must be so."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from stream_monitor.anchors.panel import Kind
from stream_monitor.anchors.profile import make_profile
from stream_monitor.v1alpha1 import summary_pb2
from tests.docs.blocks import PAGES, ROOT, unmarked
from tests.monitor.conftest import TIMEOUT, Running, Stream, starter
from tests.monitor.synthetic import Engine, Look, finished, started, tokens
from tests.security.guarded import Files

_METRIC_ROW = re.compile(r"^\| `(stream_monitor_\w+)` \| (counter|gauge|histogram) \|([^|]*)\| [^|]+\.[^|]* \|$", re.M)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    yield from starter(tmp_path_factory.mktemp("monitor"))


@pytest.mark.parametrize("page", ["configuration", "metrics", "wire"])
def test_a_page_made_from_code_is_current(page: str) -> None:
    printed = subprocess.run(
        [sys.executable, f"docs/{page}.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert (ROOT / "docs" / f"{page}.md").read_text() == printed, "run make docs"


def test_the_page_of_metrics_tells_what_a_monitor_shows(start: Callable[..., Running], tmp_path: Path) -> None:
    make_profile("another", "0" * 16, 1, {kind.value: [] for kind in Kind}, 399).write(tmp_path / "profile.json")
    files = Files(tmp_path / "tls")
    files.put((ca := trustme.CA()).issue_cert("localhost"), client_ca=ca)
    monitor = start(
        max_sentences=40,
        profiles=str(tmp_path / "profile.json"),
        store=str(tmp_path / "monitor.db"),
        metrics="127.0.0.1:0",
        metrics_insecure=True,
        nats="nats://127.0.0.1:1",
        **files.settings(mutual=True),
    )
    _held = _make_every_metric_appear(monitor)
    documented = documented_metrics()
    exposition = httpx.get(f"http://{monitor.server.metrics_address}/metrics", trust_env=False, timeout=TIMEOUT).text
    assert shown_metrics(exposition) == {
        name: told for name, told in documented.items() if not name.startswith("stream_monitor_fleet_")
    }


def shown_metrics(text: str, without_samples: Collection[str] = ()) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of each metric, as Prometheus gets them; of those without samples, no labels."""
    shown = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("process_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            assert family.samples or name in without_samples, f"{name}: no sample, so its labels are not known"
            shown[name] = (family.type, labels)
    return shown


def documented_metrics() -> dict[str, tuple[str, set[str]]]:
    """The same, as the page tells it."""
    rows = _METRIC_ROW.findall((ROOT / "docs" / "metrics.md").read_text())
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def _make_every_metric_appear(monitor: Running) -> Stream:
    """Some metrics are there as long as the stream that is returned."""
    engine = Engine()
    audit = summary_pb2.Audit(recall=0.9)
    unread = tokens("gap", 48, ids=[1, 2, 3, 4, 5, 6])
    summaries = [
        # A shift at the 15th sentence, and more sentences than are kept.
        *engine.request("shift", [4] * 14 + [30] * 30),
        engine.summary(started=[started("refused", refused="client_disabled"), started("gap")]),
        engine.summary([Look("gap", 48)], tokens=[unread], wall_time_ns=time.time_ns(), audits=[audit]),
        engine.summary(tokens=[tokens("gap", 60)]),
        engine.summary(finished=[finished("refused", 48), finished("gap", 66)]),
    ]
    monitor.publish(summaries)
    stream = Stream(monitor)
    stream.send(engine.summary())
    return stream


def test_the_page_on_upgrades_names_the_tested_versions() -> None:
    from stream_monitor.engine.compat.engine import TESTED_VERSIONS

    table = re.findall(r"^\| .+ \| ([\d., ]+) \|", (ROOT / "docs" / "upgrade.md").read_text(), re.MULTILINE)
    named = {version for cell in table for version in re.findall(r"\d+\.\d+", cell)}
    assert named == set(re.findall(r"'(\d+\.\d+)'", repr(TESTED_VERSIONS)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    """See tests/docs/blocks.py for what a block may say, and tests/docs/test_blocks.py for the running."""
    assert not unmarked(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    broken = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths in backticks, such as `stream_monitor/ring.py` or `engine/plan.py`."""
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|proto|md|toml))`", page.read_text())
    folders = (ROOT, ROOT / "stream_monitor", ROOT / "kernels")
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not missing
