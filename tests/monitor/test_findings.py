"""Every kind of finding over a real socket, calibration from a monitor's own requests, and `explain`."""

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from stream_monitor.anchors.panel import Kind, Panel
from stream_monitor.anchors.probe import Probe
from stream_monitor.anchors.profile import VERSION, Profile, ProfileError, make_profile
from stream_monitor.anchors.untrusted_fitting import score
from stream_monitor.cli import app
from stream_monitor.monitor.calibrate import served
from stream_monitor.monitor.labels import read_joints, read_labels
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2
from tests.monitor.conftest import Running, starter
from tests.monitor.synthetic import SENTENCE, Engine, Look, engine, finished, started, tokens

UNTRUSTED = 10
"""Token of the prompt's second sentence, which `labelled` says is untrusted."""


def labelled(name: str) -> summary_pb2.RequestStarted:
    """The start of a request whose prompt is partly untrusted."""
    start = started(name)
    start.role_starts = np.array([0, 6, 24], "<u4").tobytes()
    start.roles = bytes([summary_pb2.ROLE_SYSTEM, summary_pb2.ROLE_UNTRUSTED, summary_pb2.ROLE_USER])
    return start


def request(
    rank: Engine, name: str, targets: list[int], *, lag: int = 0, untrusted: bool = False
) -> list[summary_pb2.StepSummary]:
    """One sentence of six tokens for each target, with three rows that look at it; from sentence 12 on at the token
    `lag` back instead, if that is given."""
    summaries = [rank.summary(started=[labelled(name) if untrusted else started(name)])]
    position = 48
    for index, target in enumerate(targets):
        summaries.append(rank.summary(tokens=[tokens(name, position)]))
        for offset in (0, 2, 4):
            at = position + offset
            looked = at - lag if lag and index >= 12 else target
            summaries.append(rank.summary([Look(name, at, looked)]))
        position += len(SENTENCE)
    return [*summaries, rank.summary(finished=[finished(name, position)])]


def kinds(monitor: Running, name: str) -> list[str]:
    events = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id=name)).events
    return [monitor_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_") for event in events]


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_every_kind_is_raised(monitor: Running) -> None:
    rank = Engine()
    monitor.publish(request(rank, "shift", [28] * 14 + [40] * 8))
    monitor.publish(request(rank, "lost", [28] * 14 + [60] * 8))
    monitor.publish(request(rank, "loop", [28] * 26, lag=29))
    monitor.publish(request(rank, "taken", [UNTRUSTED] * 6, untrusted=True))
    monitor.publish(request(rank, "calm", [28] * 26, untrusted=True))
    assert kinds(monitor, "shift") == ["ANCHOR_SHIFT"]
    assert set(kinds(monitor, "lost")) == {"ANCHOR_SHIFT", "PROMPT_DETACHMENT"}
    assert "ANCHOR_LOCK" in kinds(monitor, "loop")
    assert kinds(monitor, "taken") == ["UNTRUSTED_ANCHOR"]
    assert kinds(monitor, "calm") == []
    (event,) = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="taken")).events
    assert event.to_anchors[0].sentence.role == summary_pb2.ROLE_UNTRUSTED
    assert "labelled untrusted" in event.summary
    assert not event.HasField("p_value")
    assert monitor.metric("stream_monitor_events_total", kind="UNTRUSTED_ANCHOR") == 1
    assert monitor.metric("stream_monitor_verdicts_total", kind="untrusted_anchor", verdict="alarm") == 1
    assert monitor.metric("stream_monitor_uncalibrated_requests_total", model_name="tiny") == 5


def test_the_attention_sink_is_no_anchor(monitor: Running) -> None:
    """What rows read on the first token stays in the matrix and is in no list of anchors."""
    monitor.publish(request(Engine(), "sink", [0] * 14))
    trace = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="sink"))
    first = np.frombuffer(trace.matrix_column, "<u4") == 0
    assert np.frombuffer(trace.matrix_share, "<f4")[first][-1] == pytest.approx(0.5, abs=0.01)
    assert trace.info.top_anchor.sentence.index != 0 or not trace.info.HasField("top_anchor")
    assert monitor.metric("stream_monitor_verdicts_total", kind="anchor_shift", verdict="insufficient") == 14


@pytest.fixture
def run_monitors(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts monitors; `run` is the command line here."""
    yield from starter(tmp_path)


def test_a_profile_made_of_a_monitors_requests_calibrates_the_next(
    run_monitors: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, rank, path = run_monitors(), Engine(), tmp_path / "profile.json"
    address = first.server.grpc_address
    code, _, errors = run("calibrate", "--out", path, "--target", address)
    assert (code, path.exists()) == (2, False)
    assert "no finished request" in errors
    draw = np.random.default_rng(0)
    for number in range(40):
        targets = [28 if draw.random() < 0.7 else 22 for _ in range(16)]
        first.publish(request(rank, f"calm-{number}", targets))
    code, text, errors = run("calibrate", "--out", path, "--target", address, "--trim", 0)
    assert code == 0, errors
    assert "tiny, capture " in text
    assert "40 requests" in text
    assert "nothing is left out" in text
    stored = json.loads(path.read_text())
    assert (stored["requests"], len(stored["highest"]["anchor_shift"])) == (40, 40)
    assert stored["highest"]["untrusted_anchor"] == []

    second = run_monitors(profiles=str(path), false_alarm_rate=0.1, ingest=f"unix:{tmp_path / 'second.sock'}")
    second.publish(request(Engine(), "shift", [28] * 14 + [16] * 30))
    (event,) = second.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="shift")).events[:1]
    assert event.kind == monitor_pb2.EVENT_KIND_ANCHOR_SHIFT
    assert event.p_value == pytest.approx(1 / 41)
    assert event.threshold == pytest.approx(stored["highest"]["anchor_shift"][-1])
    assert event.began.index == 8 + 14
    assert second.metric("stream_monitor_profile_timestamp_seconds", model_name="tiny") == stored["made_unix"]
    second.publish(request(Engine(engine(layers=(1, 2))), "elsewhere", [28] * 14))
    assert second.metric("stream_monitor_uncalibrated_requests_total", model_name="tiny") == 1
    assert "no profile fits tiny, capture " in caplog.text


def test_calibrating_a_model_that_is_not_held_names_those_that_are(monitor: Running, tmp_path: Path) -> None:
    asked = ("calibrate", "--out", tmp_path / "p.json", "--target", monitor.server.grpc_address, "--model-name")
    code, _, errors = run(*asked, "tniy")
    assert (code, errors) == (2, "stream-monitor: the monitor holds no finished request of tniy that was captured\n")
    for name in ("tiny", "small", "tiny"):
        monitor.publish(request(Engine(engine(model_name=name)), f"{name}-1", [28] * 6))
    running = Engine(engine(model_name="running"))
    monitor.publish(request(running, "unfinished", [28] * 6)[:-1])
    code, _, errors = run(*asked, "tniy")
    assert code == 2
    assert errors.endswith(" no finished request of tniy that was captured; it holds some of small, tiny\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"requests": 40}, "a rate of 0.01 for 4 detectors needs 399"), ({"version": 9}, "profile of version 9")],
)
def test_a_profile_that_cannot_serve_is_one_line(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    content = {"version": VERSION, "model_name": "m", "capture": "c", "made_unix": 1, "requests": 400, "trimmed": 0}
    content |= {"receivers": [], "reliability": None, "references": {}, "probe": None, "shift_probe": None}
    highest = {kind.value: [1.0] for kind in Kind}
    (tmp_path / "p.json").write_text(json.dumps(content | {"highest": highest} | changes))
    code, _, errors = run("serve", "--profiles", tmp_path / "p.json", "--ingest", f"unix:{tmp_path / 'i.sock'}")
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_a_request_is_explained(monitor: Running) -> None:
    monitor.publish(request(Engine(), "shift", [28] * 14 + [40] * 8))
    address = monitor.server.grpc_address
    code, text, _ = run("explain", "shift", "--target", address)
    assert code == 0
    assert "48 prompt tokens" in text
    assert "1. at sentence 22" in text or "1. at sentence 23" in text
    assert "█" in text
    code, text, _ = run("explain", "shift", "1", "--target", address)
    assert "began at sentence 22" in text
    assert "ANCHOR_SHIFT: score" in text
    assert "carried by heads (layer.head): 3.0 (25%), 3.1 (25%), 5.0 (25%), 5.1 (25%)" in " ".join(text.split())
    code, _, errors = run("explain", "shift", "2", "--target", address)
    assert (code, "has 1 findings; there is no number 2" in errors) == (2, True)
    code, _, errors = run("explain", "nobody", "--target", address)
    assert (code, "no trace of request 'nobody'" in errors) == (2, True)
    code, _, errors = run("explain", "shift", "--target", "127.0.0.1:1")
    assert (code, "no monitor at 127.0.0.1:1" in errors) == (2, True)


def by_head(
    rank: Engine, name: str, targets: list[np.ndarray], *, untrusted: bool = False
) -> list[summary_pb2.StepSummary]:
    """Like `request`, each (layer, head) with a target of its own: [2, 2] for each sentence."""
    summaries = [rank.summary(started=[labelled(name) if untrusted else started(name)])]
    position = 48
    for target in targets:
        summaries.append(rank.summary(tokens=[tokens(name, position)]))
        summaries += [rank.summary([Look(name, position + offset, by_head=target)]) for offset in (0, 2, 4)]
        position += len(SENTENCE)
    return [*summaries, rank.summary(finished=[finished(name, position)])]


def test_the_heads_that_carry_a_finding_are_named(monitor: Running) -> None:
    """Three of four heads move; the matrix of every head is there if asked for."""
    before, after = np.full((2, 2), 28), np.array([[28, 40], [40, 40]])
    monitor.publish(by_head(Engine(), "moved", [before] * 14 + [after] * 8))
    asked = monitor_pb2.GetTraceRequest(request_id="moved", with_heads=True)
    trace = monitor.api.GetTrace(asked)
    (event,) = [event for event in trace.events if event.kind == monitor_pb2.EVENT_KIND_ANCHOR_SHIFT]
    carrying = {(one.head.layer, one.head.query_head): one.share for one in event.heads}
    assert carrying == pytest.approx({(3, 1): 1 / 3, (5, 0): 1 / 3, (5, 1): 1 / 3}, abs=0.02)
    assert [(one.head.layer, one.head.query_head) for one in trace.heads] == [(3, 0), (3, 1), (5, 0), (5, 1)]
    assert not any(one.receiver for one in trace.heads)
    row, column = (np.frombuffer(part, "<u4") for part in (trace.head_row, trace.head_column))
    head, share = np.frombuffer(trace.head_index, np.uint8), np.frombuffer(trace.head_share, "<f4")
    last = (row == row.max()) & (head == 1)
    assert dict(zip(column[last].tolist(), share[last].tolist(), strict=True))[40 // 6] == pytest.approx(0.5, abs=0.01)
    # All heads alike are the whole matrix.
    whole = np.frombuffer(trace.matrix_row, "<u4") == row.max()
    assert share[row == row.max()].sum() / 4 == pytest.approx(np.frombuffer(trace.matrix_share, "<f4")[whole].sum())
    assert not monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="moved")).head_row


def test_heads_of_two_ranks_are_told_apart(monitor: Running) -> None:
    instance = str(uuid.uuid4())
    ranks = [
        Engine(
            engine(
                instance, heads=(0, 1), tensor_parallel_size=2, tensor_parallel_rank=number, first_query_head=2 * number
            )
        )
        for number in (0, 1)
    ]
    for one, other in zip(*(request(rank, "split", [28 + 12 * n] * 20) for n, rank in enumerate(ranks)), strict=True):
        monitor.publish([one])
        monitor.publish([other])
    trace = monitor.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="split", with_heads=True))
    heads = [(one.head.layer, one.head.query_head) for one in trace.heads]
    assert sorted(heads) == [(layer, head) for layer in (3, 5) for head in range(4)]
    index, column, share = (
        np.frombuffer(trace.head_index, np.uint8),
        *(np.frombuffer(part, kind) for part, kind in ((trace.head_column, "<u4"), (trace.head_share, "<f4"))),
    )
    for place, (_, head) in enumerate(heads):
        there = (index == place) & (column == (28 if head < 2 else 40) // 6)
        assert share[there] == pytest.approx(0.5, abs=0.01)
        assert there.any()


def test_a_probe_is_fitted_to_labels(run_monitors: Callable[..., Running], tmp_path: Path) -> None:
    """One head of four reads the document when it is followed; by the profile the next finding names it."""
    first, rank = run_monitors(), Engine()
    address, path = first.server.grpc_address, tmp_path / "profile.json"
    none = np.full((2, 2), 28)
    one = none.copy()
    one[1, 0] = UNTRUSTED  # layer 5, head 0
    others = np.where(one == UNTRUSTED, 28, UNTRUSTED)
    labels = []
    for number in range(8):
        for group, looks in (("followed", one), ("ignored", others), ("question", none)):
            first.publish(by_head(rank, f"{group}-{number}", [looks] * 3, untrusted=True))
            row = {"request": f"{group}-{number}", "group": group, "wording": f"w{number % 4}"}
            labels.append(json.dumps(row))
    for number in range(24):
        first.publish(request(rank, f"calm-{number}", [28] * 6, untrusted=True))
    named, absent = tmp_path / "labels.jsonl", tmp_path / "absent.jsonl"
    named.write_text("\n".join([*labels, json.dumps({"request": "gone", "group": "followed", "wording": "w0"})]))
    code, text, errors = run("calibrate", "--out", path, "--target", address, "--trim", 0, "--injections", named)
    assert code == 0, errors
    assert "24 requests" in text, "those that are labelled are no ordinary traffic"
    assert "24 of 25 labelled requests are held" in text
    assert "by a probe of 4 heads" in text
    assert "on the others: 1.00 against ignored, 1.00 against question" in text
    probe = json.loads(path.read_text())["probe"]
    assert probe["heads"][np.argmax(probe["weights"])] == [5, 0]
    code, _, errors = run("calibrate", "--out", path, "--target", address, "--injections", absent)
    assert (code, f"cannot read {absent}" in errors) == (2, True)

    second = run_monitors(profiles=str(path), false_alarm_rate=0.2, ingest=f"unix:{tmp_path / 'second.sock'}")
    second.publish(by_head(Engine(), "taken", [one] * 3, untrusted=True))
    second.publish(by_head(Engine(), "calm", [others] * 3, untrusted=True))
    (event,) = second.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="taken")).events
    assert event.kind == monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR
    assert [(head.head.layer, head.head.query_head, head.share) for head in event.heads] == [(5, 0, 1.0)]
    assert event.to_anchors[0].sentence.role == summary_pb2.ROLE_UNTRUSTED
    assert "as before an instruction in it is followed" in event.summary
    assert kinds(second, "calm") == []
    trace = second.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="calm", with_heads=True))
    (live,) = [one.highest for one in trace.info.scores if one.kind == monitor_pb2.EVENT_KIND_UNTRUSTED_ANCHOR]
    assert live == pytest.approx(score(served(trace), Profile.read(path).probe), abs=1e-5), "as calibration scores it"

    address = second.server.grpc_address
    second.publish(by_head(Engine(), "more", [one] * 3))
    code, text, errors = run("calibrate", "--out", tmp_path / "new.json", "--target", address, "--probe-of", path)
    assert code == 0, errors
    assert f"untrusted_anchor: by the probe of 4 heads of {path}" in text
    assert json.loads((tmp_path / "new.json").read_text())["probe"] == probe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "other"}, "is a profile of other; the requests are of tiny"),
        ({"probe": {"heads": [[7, 1]], "weights": [1.0], "bias": 0.0}}, "head 7.1 (layer.head) of"),
        ({"probe": None}, "has no probe; fit one with --injections or --joints"),
        (
            {"probe": None, "shift_probe": {"heads": [[5, 0], [7, 1]], "weights": [1.0] * 8, "bias": 0.0}},
            "head 7.1 (layer.head) of",
        ),
    ],
)
def test_a_probe_that_does_not_fit_is_refused(
    monitor: Running, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    monitor.publish(request(Engine(), "calm", [28] * 6))
    made = replace(make_profile("tiny", "c", 1, {}, 1), probe=Probe(((5, 0),), (1.0,), 0.0))
    made.write(tmp_path / "old.json")
    content = json.loads((tmp_path / "old.json").read_text()) | changes
    (tmp_path / "old.json").write_text(json.dumps(content))
    arguments = ["--out", tmp_path / "new.json", "--target", monitor.server.grpc_address]
    code, _, errors = run("calibrate", *arguments, "--probe-of", tmp_path / "old.json")
    assert (code, message in errors) == (2, True), errors
    code, _, errors = run("calibrate", *arguments, "--probe-of", "x", "--injections", "y", "--joints", "z")
    assert (code, "no probe would be left to keep" in " ".join(errors.split())) == (2, True)
    assert not (tmp_path / "new.json").exists()


def test_a_shift_probe_is_fitted_to_labels(run_monitors: Callable[..., Running], tmp_path: Path) -> None:
    """Behind a joint one head of four goes over to its own sentence; by the profile the next finding names it."""
    first, rank = run_monitors(), Engine()
    address, path = first.server.grpc_address, tmp_path / "profile.json"
    draw = np.random.default_rng(0)

    def output(joint: int | None, count: int = 24) -> list[np.ndarray]:
        """Heads read three sentences of the prompt by turns."""
        targets = draw.choice([22, 28, 40], (count, 2, 2))
        if joint is not None:
            targets[joint:, 1, 0] = 48 + len(SENTENCE) * np.arange(joint, count)
        return list(targets)

    labels = []
    for number in range(24):
        first.publish(by_head(rank, f"joined-{number}", output(16)))
        first.publish(by_head(rank, f"stays-{number}", output(None)))
        first.publish(by_head(rank, f"calm-{number}", output(None)))
        row = {"request": f"joined-{number}", "subject": f"s{number % 6}", "token": 48 + 16 * len(SENTENCE)}
        labels += [json.dumps(row), json.dumps(row | {"request": f"stays-{number}", "token": None})]
    named = tmp_path / "joints.jsonl"
    named.write_text("\n".join([*labels, json.dumps({"request": "gone", "subject": "s0", "token": 9})]))
    arguments = ["calibrate", "--out", path, "--target", address, "--trim", 0]
    code, text, errors = run(*arguments, "--joints", named)
    assert code == 0, errors
    assert "24 requests" in text, "those that are labelled are no ordinary traffic"
    assert "anchor_shift: 48 of 49 labelled requests are held" in text
    assert "by a probe of 4 heads, too" in text
    assert "100% of the changes score above nine of ten" in text
    assert "anchor_shift_probe: 24 requests could be scored" in text
    probe = json.loads(path.read_text())["shift_probe"]
    assert len(probe["weights"]) == 4 * len(probe["heads"])

    second = run_monitors(profiles=str(path), false_alarm_rate=0.2, ingest=f"unix:{tmp_path / 'second.sock'}")
    second.publish(by_head(Engine(), "joined", output(16)))
    second.publish(by_head(Engine(), "stays", output(None)))
    (event,) = second.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="joined")).events
    assert event.kind == monitor_pb2.EVENT_KIND_ANCHOR_SHIFT
    assert event.by_probe
    assert event.score > event.threshold
    assert event.p_value <= 0.2 / 3
    assert (event.heads[0].head.layer, event.heads[0].head.query_head) == (5, 0)
    assert "heads read as where the subject changes" in event.summary
    joint = 8 + 16
    assert event.began.index <= joint <= event.sentence.index <= joint + 3
    assert kinds(second, "stays") == []
    code, text, _ = run("explain", "joined", "1", "--target", second.server.grpc_address)
    assert (code, "log odds" in text) == (0, True)
    trace = second.api.GetTrace(monitor_pb2.GetTraceRequest(request_id="joined", with_heads=True))
    panel = Panel(Profile.read(path), 0.2)
    again = [
        alarm
        for seen in served(trace).observations(panel.receivers, None, panel.shift_probe)
        for alarm in panel.update(seen)
    ]
    assert [alarm.score for alarm in again] == [pytest.approx(event.score, abs=1e-5)], "as calibration scores it"

    new = tmp_path / "new.json"
    code, text, errors = run("calibrate", "--out", new, "--target", address, "--probe-of", path)
    assert code == 0, errors
    assert f"anchor_shift: by the probe of 4 heads of {path}, too" in text
    assert json.loads(new.read_text())["shift_probe"] == probe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "line 1: not JSON"),
        ('{"request": "a", "subject": "s"}', "line 1: not an object with the strings request and subject and a token"),
        ('{"request": "a", "subject": "s", "token": -1}', "line 1: not an object"),
        ('{"request": "a", "subject": "s", "token": true}', "line 1: not an object"),
        ('{"request": "", "subject": "s", "token": 1}', "line 1: not an object"),
        ('[{"request": "a"}]', "line 1: not an object"),
        ('{"request": "a", "subject": "s", "token": null}', "names no request with a token from which"),
        (
            '{"request": "a", "subject": "s", "token": 4}\n{"request": "a", "subject": "s", "token": 5}',
            "line 2: a has another label above",
        ),
    ],
)
def test_joints_that_are_none_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "joints.jsonl").write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_joints(tmp_path / "joints.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "line 1: not JSON"),
        ('{"request": "a", "group": "followed"}', "line 1: not an object with the strings request, group and wording"),
        ('{"request": "a", "group": "ignored", "wording": "w"}', "names no request of the group 'followed'"),
        (
            '{"request": "a", "group": "followed", "wording": "w"}\n{"request": "a", "group": "x", "wording": "w"}',
            "line 2: a has another label above",
        ),
    ],
)
def test_labels_that_are_none_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_labels(tmp_path / "labels.jsonl")
