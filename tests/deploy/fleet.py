"""A monitor process and the publishers that feed it over real gRPC: calm traffic, and everything that can go wrong."""

import contextlib
import datetime
import queue
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import trustme

from stream_monitor.anchors.detachment import PromptDetachment
from stream_monitor.anchors.lock import AnchorLock
from stream_monitor.anchors.panel import Kind
from stream_monitor.anchors.profile import make_profile
from stream_monitor.anchors.shift import AnchorShift
from stream_monitor.anchors.untrusted import UntrustedAnchor
from stream_monitor.monitor import outcomes
from stream_monitor.monitor.calibration import capture_id
from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2, monitor_pb2_grpc, summary_pb2
from tests.monitor.synthetic import Engine, Look, engine, finished, started, tokens
from tests.monitor.test_findings import UNTRUSTED, request
from tests.security.guarded import Files

MAX_ENGINES, MAX_RANKS, MAX_REQUESTS, MAX_SENTENCES = 5, 2, 45, 64
_PUBLISH = "/stream_monitor.v1alpha1.IngestService/Publish"
OLD_PROFILE, NEW_PROFILE = 40 * 86400, 0
"""Ages in seconds."""
ENDING_CERTIFICATE, FRESH_CERTIFICATE = 3, 90
"""Days left."""


def write_profile(path: Path, info: summary_pb2.EngineInfo, age: int) -> None:
    """A profile whose thresholds are the detectors' own, made `age` seconds ago."""
    thresholds = {
        Kind.ANCHOR_SHIFT: AnchorShift().threshold,
        Kind.PROMPT_DETACHMENT: PromptDetachment().threshold,
        Kind.ANCHOR_LOCK: AnchorLock().threshold,
        Kind.UNTRUSTED_ANCHOR: UntrustedAnchor().threshold,
    }
    highest = {kind.value: [threshold] * 399 for kind, threshold in thresholds.items()}
    made = int(time.time()) - age
    make_profile(info.model_name, capture_id(info), made, highest, 399).write(path)


@dataclass
class Rank(Engine):
    """An engine rank that can be told to lose rows, fault and fill its queues."""

    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    arguments: Counter[str] = field(default_factory=Counter)
    fault: str = ""
    full: bool = False

    def ledger(self) -> summary_pb2.Ledger:
        lost = [summary_pb2.RowCount(outcome=key[0], reason=key[1], count=n) for key, n in self.lost.items()]
        expected = 4 * self.captured + self.lost.total()
        return summary_pb2.Ledger(
            token_rows=[
                summary_pb2.RowCount(outcome="expected", count=expected),
                summary_pb2.RowCount(outcome="captured", count=self.captured),
                summary_pb2.RowCount(outcome="sampled_out", count=2 * self.captured),
                summary_pb2.RowCount(outcome="sampled_out", reason="governor", count=self.captured),
                *lost,
            ],
            refused_arguments=self.arguments,
            estimates=self.step,
            estimate_seconds=0.001 * self.step,
            key_bytes=65536 * self.step,
            record_bytes=2300 * self.step,
            sent=self.sequence,
            fault=self.fault,
            queues=[
                summary_pb2.QueueState(name=name, size=9 if self.full else 1, capacity=10)
                for name in ("estimator", "ring", "backlog")
            ],
        )


class Publisher:
    """One open stream."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._requests: queue.SimpleQueue[ingest_pb2.PublishRequest | None] = queue.SimpleQueue()
        self._answers = ingest_pb2_grpc.IngestServiceStub(self._channel).Publish(iter(self._requests.get, None))

    def send(self, summaries: Sequence[summary_pb2.StepSummary]) -> None:
        """Returns when all of them are answered."""
        for summary in summaries:
            self._requests.put(ingest_pb2.PublishRequest(summary=summary))
        for _ in summaries:
            next(self._answers)

    def close(self) -> None:
        self._requests.put(None)
        self._answers.cancel()
        self._channel.close()


class Fleet:
    """The monitor, its publishers and a subscriber that does not read."""

    def __init__(self, folder: Path, metrics_port: int, grpc_port: int) -> None:
        self.folder = folder
        self.ingest = f"unix:{folder / 'ingest.sock'}"
        self.store = folder / "store" / "monitor.db"
        self.metrics, self.grpc = f"127.0.0.1:{metrics_port}", f"localhost:{grpc_port}"
        self._authority, self._files = trustme.CA(), Files(folder / "tls")
        self.main = Rank(engine(summary_bytes=1 << 20, kv_tokens_lost=512))
        instance = engine().instance
        self.wide = [
            Rank(
                engine(
                    instance, engine="1", tensor_parallel_size=2, tensor_parallel_rank=rank, first_query_head=2 * rank
                )
            )
            for rank in (0, 1)
        ]
        self.faulty = Rank(engine(engine="2"))
        self.uncalibrated = Rank(engine(model_name="uncalibrated"))
        self.retired = Rank(engine(engine="3"))
        self.streams: dict[int, Publisher] = {}
        self._monitor: subprocess.Popen[str] | None = None
        self._subscriber: grpc.Channel | None = None
        self._serial = 0

    def start_monitor(self, profile_age: int, certificate_days: int) -> None:
        profile = self.folder / "profile.json"
        write_profile(profile, self.main.info, profile_age)
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=certificate_days)
        self._files.put(self._authority.issue_cert("localhost", not_after=ends))
        self._monitor = subprocess.Popen(
            [
                *(sys.executable, "-m", "stream_monitor", "serve", "--ingest", self.ingest),
                *("--http", "127.0.0.1:0", "--metrics", self.metrics, "--metrics-insecure", "--grpc", self.grpc),
                *("--tls-certificate", str(self._files.certificate), "--tls-key", str(self._files.key)),
                *("--profiles", str(profile)),
                *("--max-engines", str(MAX_ENGINES), "--max-sentences", str(MAX_SENTENCES)),
                *("--max-ranks-per-engine", str(MAX_RANKS), "--max-requests-per-engine", str(MAX_REQUESTS)),
                *("--max-traces", "40", "--subscriber-queue", "16", "--store", str(self.store)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._monitor.stdout is not None
        assert self._monitor.stdout.readline().startswith("ready")

    def stop_monitor(self) -> None:
        assert self._monitor is not None
        self._monitor.send_signal(signal.SIGTERM)
        self._monitor.wait(10)

    def close(self) -> None:
        self.disconnect()
        self.forget_subscriber()
        if self._monitor is not None:
            self._monitor.kill()
            self._monitor.wait()

    def send(self, rank: Rank, summaries: Sequence[summary_pb2.StepSummary]) -> None:
        """On the rank's stream, which is opened when it is first used."""
        key = id(rank)
        if key not in self.streams:
            self.streams[key] = Publisher(self.ingest)
        self.streams[key].send(summaries)

    def disconnect(self) -> None:
        """All engines go."""
        for stream in self.streams.values():
            stream.close()
        self.streams.clear()

    def _open(self, options: Sequence[tuple[str, int]] = ()) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self._authority.cert_pem.bytes())
        return grpc.secure_channel(self.grpc, credentials, options)

    def subscribe_without_reading(self) -> None:
        """Ask for everything and take nothing."""
        self._subscriber = self._open([("grpc.http2.bdp_probe", 0)])
        wanted = monitor_pb2.SubscribeRequest(kinds=monitor_pb2.EventKind.values()[1:])
        self._unread = monitor_pb2_grpc.MonitorServiceStub(self._subscriber).Subscribe(wanted)

    def forget_subscriber(self) -> None:
        if self._subscriber is not None:
            self._subscriber.close()
            self._subscriber = None

    def name(self) -> str:
        self._serial += 1
        return f"chatcmpl-{self._serial}-aee6d49e"

    def calm(self, late: float = 0.0, recalls: Sequence[float] = (0.97,)) -> None:
        """One ordinary request, as it would have run `late` seconds ago, with audits of these recalls."""
        name = self.name()
        summaries = request(self.main, name, [28] * 10)
        # The ledger that travels is the one after the request: made after it, the account is as it will stand.
        now = time.time_ns() - int(late * 1e9)
        for summary in summaries:
            summary.wall_time_ns = now
        summaries[2].audits.extend(summary_pb2.Audit(recall=recall) for recall in recalls)
        self.send(self.main, summaries[:-1])
        if self._serial % 5:  # some are still running
            self.send(self.main, summaries[-1:])

    def connect_all(self) -> None:
        """Every rank; the one that came first is retired to make room."""
        self.send(self.retired, [self.retired.summary()])
        self.streams.pop(id(self.retired)).close()
        time.sleep(0.2)
        for rank in (self.main, *self.wide, self.faulty, self.uncalibrated):
            self.send(rank, [rank.summary()])

    def lose_rows(self) -> None:
        """Rows of every outcome and reason there is, and one that nobody knows; arguments that are not honoured."""
        for outcome in ("raced", "dropped", "refused"):
            for reason in outcomes.ROWS[outcome][1]:
                self.main.lost[outcome, reason] += 10
        self.main.lost["refused", "of_a_later_release"] += 10
        for name, reason in outcomes.ARGUMENTS:
            self.main.arguments[f"{name}:{reason}"] += 1

    def discard_rows(self) -> None:
        """Rows of every reason for which the monitor throws some away, and tokens that are missing."""
        rank, name = self.main, self.name()
        look = Look(name, 48, 4)
        summaries = [
            rank.summary([look], started=[started(name)]),
            rank.summary(tokens=[tokens(name, 48), tokens(name, 60)]),  # some tokens are missing
            rank.summary([Look(name, 48, 30, attempt=1)]),  # recomputed
            rank.summary([look]),  # stale
            rank.summary([Look(name, 48, 30, attempt=1)]),  # repeated
            rank.summary([Look(name, 65), Look(name, 66)]),
            rank.summary(started=[started(name, 60)]),  # readded
            rank.summary(tokens=[tokens(name, 60)]),
            rank.summary([Look(name, 64)]),
            rank.summary(finished=[finished(name, 62)]),  # past_end
        ]
        long, unplaced = self.name(), self.name()
        summaries += rank.request(long, [4] * (MAX_SENTENCES + 20))  # sentence_limit
        summaries.append(rank.summary([Look(unplaced, 48 + i) for i in range(1030)], started=[started(unplaced)]))
        summaries.append(rank.summary(finished=[finished(unplaced, 2000)]))
        many = [self.name() for _ in range(MAX_REQUESTS + 10)]  # engine_quota
        summaries.append(rank.summary([Look(each, 48, 4) for each in many], started=[started(each) for each in many]))
        summaries.append(rank.summary(finished=[finished(each, 49) for each in many]))
        rank.sequence += 1  # a message is lost
        for reason in (*outcomes.REQUESTS, "of_a_later_release"):
            summaries.append(rank.summary(started=[started(self.name(), refused=reason)]))
        self.send(rank, summaries)

    def delete(self) -> None:
        """A request that has rows is deleted, and more rows of it come."""
        name = self.name()
        self.send(self.main, [self.main.summary([Look(name, 48, 4), Look(name, 50, 4)], started=[started(name)])])
        time.sleep(0.5)  # until it is in the store
        with self._open() as channel:
            monitor_pb2_grpc.MonitorServiceStub(channel).DeleteRequest(
                monitor_pb2.DeleteRequestRequest(request_id=name), timeout=20
            )
        self.send(self.main, [self.main.summary([Look(name, 52, 4)])])

    @contextlib.contextmanager
    def locked_store(self) -> Iterator[None]:
        """Another program holds the store's lock."""
        with contextlib.closing(sqlite3.connect(self.store, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")

    def find(self) -> None:
        """A request for every kind of finding."""
        self.send(self.main, request(self.main, self.name(), [28] * 14 + [40] * 8))
        self.send(self.main, request(self.main, self.name(), [28] * 14 + [60] * 8))
        self.send(self.main, request(self.main, self.name(), [28] * 26, lag=29))
        self.send(self.main, request(self.main, self.name(), [UNTRUSTED] * 6, untrusted=True))

    def others(self) -> None:
        """A rank that faults, one that waits in vain for its sister, a model without a profile."""
        self.faulty.fault = "watched layer 3 left 0 query rows where the batch has 1"
        self.send(self.faulty, [self.faulty.summary()])
        name = self.name()
        self.send(self.wide[0], request(self.wide[0], name, [28] * 2))
        self.send(self.uncalibrated, request(self.uncalibrated, self.name(), [28] * 2))

    def break_the_contract(self) -> None:
        """A message for every reason for which one is turned away."""
        stranger = Engine(self.uncalibrated.info)
        again = self.uncalibrated.summary()
        self.send(self.uncalibrated, [again])
        changed = Rank(engine(self.main.info.instance, model_name="another"))
        shape = started("x")
        shape.role_starts = b"1"
        cells = [summary_pb2.RowCount(outcome="dropped", reason=f"r{index}") for index in range(65)]
        self._raw(b"\xff")
        self._raw(bytes(5 << 20))
        self._refused(Engine().summary(schema_version=9))
        self._refused(changed.summary())
        self._refused(stranger.summary(started=[shape]))
        self._refused(stranger.summary(sequence=0))
        self._refused(stranger.summary(ledger=summary_pb2.Ledger(token_rows=cells)))
        self._refused(again, again)  # a duplicate, and then out of order
        self._refused(again, changed.summary())  # a duplicate, and then of another rank
        self._refused(Engine().summary())  # one rank too many
        third = engine(self.wide[0].info.instance, engine="1", data_parallel_index=1)
        self._refused(Engine(third).summary())  # one too many of its engine
        self._refused(self.retired.summary())

    def _refused(self, *summaries: summary_pb2.StepSummary) -> None:
        self._raw(*(ingest_pb2.PublishRequest(summary=each).SerializeToString() for each in summaries))

    def _raw(self, *messages: bytes) -> None:
        with grpc.insecure_channel(
            self.ingest, [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            method = channel.stream_stream(_PUBLISH, None, ingest_pb2.PublishResponse.FromString)
            with contextlib.suppress(grpc.RpcError):
                list(method(iter(messages), timeout=10))


def every(seconds: float, interval: float = 0.5) -> Iterator[None]:
    """As often as `interval` allows for so long."""
    end = time.monotonic() + seconds
    due = time.monotonic()
    while time.monotonic() < end:
        yield
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
