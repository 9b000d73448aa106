"""Tokens and keys are in no log, no answer, no metric, no file of the store and no command line."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import trustme

from stream_monitor.publisher.launch import PublisherProcess
from stream_monitor.target import Target
from stream_monitor.v1alpha1 import ingest_pb2, ingest_pb2_grpc, monitor_pb2, monitor_pb2_grpc
from tests.monitor.process import LOCAL, MonitorProcess
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.publisher.fakes import INFO, Worker
from tests.security.guarded import EVERYTHING, Files, as_, principal, token_of

KNOWN, UNKNOWN, BROKEN = token_of("all"), token_of("stranger"), token_of("broken")


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[MonitorProcess]:
    (tmp_path / "access.toml").write_text(principal("all", **EVERYTHING))
    running = MonitorProcess(tmp_path, access=tmp_path / "access.toml")
    yield running
    running.kill()


def test_a_token_shows_nowhere(
    monitor: MonitorProcess, tmp_path: Path, ca: trustme.CA, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    asked = monitor_pb2.ListRequestsRequest()
    with grpc.insecure_channel(monitor.ingest, LOCAL) as channel:
        stub = ingest_pb2_grpc.IngestServiceStub(channel)
        summaries = [ingest_pb2.PublishRequest(summary=each) for each in Engine().request("r", SHIFTING)]
        assert len(list(stub.Publish(iter(summaries), metadata=as_("all"), timeout=20))) == len(summaries)
    for metadata in (as_("all"), as_("stranger"), (("authorization", f"Basic {BROKEN}"),), (("x-token", BROKEN),)):
        api = monitor_pb2_grpc.MonitorServiceStub(monitor.channel)
        try:
            api.ListRequests(asked, metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            seen.append(str(error))
    with httpx.Client(base_url=f"http://{monitor.http}", trust_env=False, timeout=20) as client:
        for path in ("/api/requests", "/api/status", "/metrics", f"/api/trace?token={BROKEN}"):
            for headers in (dict(as_("all")), dict(as_("stranger")), {"authorization": f"Token {BROKEN}"}):
                answer = client.get(path, headers=headers)
                seen += [answer.text, str(answer.headers)]
        for token in (KNOWN, UNKNOWN):
            answer = client.post("/api/signin", json={"token": token})
            seen += [answer.text, str(answer.headers)]
    # A publisher whose token is nobody's, and one that is given a file that is none.
    (tmp_path / "token").write_text(UNKNOWN)
    worker = Worker()
    publisher = PublisherProcess(worker.ring.fd, INFO, Target(monitor.ingest, token_file=str(tmp_path / "token")))
    publisher.start()
    worker.step()
    deadline = time.monotonic() + 60
    while "UNAUTHENTICATED" not in "".join(seen):
        seen.append(capfd.readouterr().err)
        assert time.monotonic() < deadline, seen
        time.sleep(0.02)
    for pid in (publisher.pid, monitor.process.pid if monitor.process else None):
        seen += [Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]
    publisher.stop()
    worker.ring.close()
    # A file that cannot be read, with a token in it, twice: once as it is no TOML, once as it makes no sense.
    for broken in (f'token = "{BROKEN}', f'[[principal]]\nname = "x"\ntoken = "{BROKEN}"\nrights = "{BROKEN}"\n'):
        before = monitor.log.read_text().count("what was read before holds on")
        (tmp_path / "access.toml").write_text(broken)
        while monitor.log.read_text().count("what was read before holds on") == before:
            assert time.monotonic() < deadline + 20, monitor.log.read_text()
            time.sleep(0.02)
    monitor.stop()
    seen.append(monitor.log.read_text())
    assert "unknown_token" in seen[-1]
    seen += [path.read_bytes().decode("latin-1") for path in monitor.store.parent.iterdir()]
    assert len(seen) > 30
    for secret in (KNOWN, UNKNOWN, BROKEN):
        # `/api/trace?token=...` is refused, and says which parameter it does not know, not what it held.
        assert [text[:300] for text in seen if secret in text] == []


def test_a_key_that_cannot_be_used_is_not_quoted(tmp_path: Path, ca: trustme.CA) -> None:
    import subprocess

    files = Files(tmp_path / "tls")
    files.put(ca.issue_cert("localhost"))
    key = files.key.read_text()
    files.key.write_text(key[:200] + key[210:])
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in files.settings().items()]
    ended = subprocess.run(
        [sys.executable, "-m", "stream_monitor", "serve", "--store=", *settings],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line == f"stream-monitor: {files.key} holds no PEM key without a pass phrase"
    assert ended.stdout == ""


def test_a_made_token_is_in_its_file_alone(tmp_path: Path) -> None:
    import hashlib
    import subprocess

    command = [sys.executable, "-m", "stream_monitor", "token", "--out", str(tmp_path / "token")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    token = (tmp_path / "token").read_text().strip()
    assert made.stdout == f'token_sha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
    assert (len(token), (tmp_path / "token").stat().st_mode & 0o777, made.stderr) == (43, 0o600, "")
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (again.returncode, (tmp_path / "token").read_text().strip()) == (2, token)
    assert again.stderr == f"stream-monitor: --out: cannot make {tmp_path / 'token'}: File exists\n"
