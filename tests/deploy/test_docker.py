"""The images, as far as can be seen without a container engine: the files, and the sidecar run as its image runs."""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import psutil
import pytest
import trustme

from stream_monitor import __version__
from tests.deploy.installed import CONTEXT, PREPARE, PROCESSOR, ROOT
from tests.security.guarded import Files

DOCKER = ROOT / "deploy" / "docker"
MONITOR, ENGINE = DOCKER / "monitor.Dockerfile", DOCKER / "engine.Dockerfile"
USER = 65532
READY_SECONDS = 2.0


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest)) for name, *rest in lines]


def last(file: Path, name: str) -> str:
    """The arguments that hold in the end."""
    return [arguments for instruction, arguments in instructions(file) if instruction == name][-1]


@pytest.mark.parametrize("file", [MONITOR, ENGINE], ids=lambda file: file.name)
def test_the_linter_has_nothing_to_say(file: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", [MONITOR, ENGINE], ids=lambda file: file.name)
def test_bases_are_pinned_and_the_version_is_ours(file: Path) -> None:
    arguments = dict(value.partition("=")[::2] for name, value in instructions(file) if name == "ARG")
    bases = [arguments[name] for name in re.findall(r"\$\{(\w+)\}", " ".join(_all(file, "FROM")))]
    assert bases
    assert all(":" in base and not base.endswith(":latest") for base in bases)
    assert arguments["VERSION"] == __version__
    labels = re.findall(r"org\.opencontainers\.image\.(\w+)=", last(file, "LABEL"))
    assert labels == ["title", "description", "licenses", "version", "revision"]


def _all(file: Path, name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions(file) if instruction == name]


def test_what_is_copied_exists_and_passes_the_ignore_file() -> None:
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    for file in (MONITOR, ENGINE):
        copied = {name for line in _all(file, "COPY") if "--from" not in line for name in line.split()[:-1]}
        assert set(CONTEXT) <= copied
        for name in copied:
            assert (ROOT / name).exists(), name
            assert any(fnmatch(name, pattern) for pattern in allowed), f"{name} is kept out by .dockerignore"


def test_the_engine_starts_as_vllm_does_with_our_worker() -> None:
    from stream_monitor.engine.compat.engine import TESTED_VERSIONS
    from stream_monitor.engine.launch import WORKER

    assert json.loads(last(ENGINE, "ENTRYPOINT")) == ["vllm", "serve", "--worker-cls", WORKER]
    (tag,) = re.findall(r"VLLM_IMAGE=vllm/vllm-openai:v(\d+\.\d+)\.\d+$", "\n".join(_all(ENGINE, "ARG")), re.MULTILINE)
    assert tag in TESTED_VERSIONS["cpu"], "the image for CPUs is of the same release"


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder in (ROOT, ROOT / "kernels"):
        package = "stream_monitor" if folder == ROOT else "stream_kernels"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", package],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        files = {name for name in listed.split("\0") if name and (folder / name).exists()}
        assert files <= held, f"not in the wheel: {sorted(files - held)}; see package-data in pyproject.toml"


def test_the_sidecar_has_no_engine(sidecar: Path) -> None:
    code = (
        "import importlib.util as u, stream_monitor.monitor.server, stream_monitor.cli\n"
        "print([n for n in ('torch', 'vllm', 'triton', 'transformers', 'scipy', 'river', 'pip') if u.find_spec(n)])"
    )
    done = subprocess.run([sidecar / "python", "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_image_has_machine_code_for_any_processor() -> None:
    settings = " ".join(f"{name}={value}" for name, value in PROCESSOR.items())
    assert [settings in line for line in _all(MONITOR, "ENV")] == [True, True], "where it is made, and where it runs"
    assert f'/opt/stream-monitor/bin/python -c "{PREPARE}"' in _all(MONITOR, "RUN")[0]


def test_the_sidecar_has_what_its_page_draws_with(sidecar: Path) -> None:
    code = "from stream_monitor.monitor.page.routes import plotly_script; print(plotly_script())"
    done = subprocess.run([sidecar / "python", "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("plotly.min.js")


def test_the_sidecar_is_ready_at_once(sidecar: Path, tmp_path: Path) -> None:
    """By processor time, which is what the clock says on an idle machine and not on a busy one; the best of three."""
    times = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir(mode=0o700)
        with serving([sidecar / "stream-monitor"], environment(sidecar, folder)) as process:
            spent = psutil.Process(process.pid).cpu_times()
            times.append(spent.user + spent.system)
    assert min(times) < READY_SECONDS, times


CONFINE = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=2777,gid={gid} volume "{run}"
mount --bind / / && mount -o remount,ro,bind /
cd /
exec "$@"
"""
"""In a mount namespace: one volume as Kubernetes mounts it (an emptyDir with an fsGroup), the rest read-only."""


def test_the_sidecar_runs_as_nobody_on_a_read_only_file_system(sidecar: Path, open_folder: Path) -> None:
    root = os.geteuid() == 0
    isolate = ["unshare", "--mount"] if root else ["unshare", "--map-root-user", "--mount"]
    drop = [f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    become = ["setpriv", *drop, "--inh-caps=-all"] if root else []
    if not shutil.which("unshare") or subprocess.run([*isolate, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us make a mount namespace")
    run = open_folder / "run"
    run.mkdir()
    group = USER if root else 0
    command = [*isolate, "sh", "-c", CONFINE.format(run=run, gid=group), "sh", *become]
    if root and subprocess.run([*become, sidecar / "python", "-c", "pass"], capture_output=True).returncode:
        pytest.skip("another user cannot run this machine's Python")
    settings = environment(sidecar, run) | {"STREAM_MONITOR_INGEST": f"unix:{run}/socket/ingest.sock"}
    probe = f"import os; print(os.geteuid()); open('{ROOT}/probe', 'w')"
    refused = subprocess.run([*command, sidecar / "python", "-c", probe], capture_output=True, text=True, env=settings)
    assert refused.stdout.strip() == str(USER if root else 0)
    assert "Read-only file system" in refused.stderr
    with serving([*command, sidecar / "stream-monitor"], settings) as process:
        assert healthy(settings)
        folder = Path(f"/proc/{process.pid}/root{run}/socket")
        assert oct(folder.stat().st_mode & 0o7777) == "0o770"
        held = (folder / "ingest.sock").stat()
        assert oct(held.st_mode & 0o777) == "0o660"
        assert held.st_gid == (group if root else os.getegid())
        if root:
            # An engine is another user; the group that Kubernetes gives to every container of the pod lets it in.
            assert connects(process.pid, folder / "ingest.sock", [USER])
            assert not connects(process.pid, folder / "ingest.sock", [])
    assert not healthy(settings)


def test_the_health_check_speaks_tls_where_the_monitor_does(sidecar: Path, tmp_path: Path) -> None:
    files = Files(tmp_path / "tls")
    files.put(trustme.CA().issue_cert("localhost"))
    secured = {f"STREAM_MONITOR_{name.upper()}": value for name, value in files.settings().items()}
    settings = environment(sidecar, tmp_path) | secured
    with serving([sidecar / "stream-monitor"], settings):
        assert healthy(settings)
    assert not healthy(settings)


def connects(pid: int, path: Path, groups: list[int]) -> bool:
    """Whether another user with these supplementary groups can open the socket, as seen from the process's mounts."""
    who = [
        "setpriv",
        "--inh-caps=-all",
        "--reuid=10001",
        "--regid=10001",
        f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
    ]
    inside = Path("/") / path.relative_to(f"/proc/{pid}/root")
    code = f"import socket; socket.socket(socket.AF_UNIX).connect('{inside}')"
    done = subprocess.run(
        ["nsenter", f"--target={pid}", "--mount", "--root", *who, sys.executable, "-I", "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or "PermissionError" in done.stderr, done.stderr
    return done.returncode == 0


def environment(sidecar: Path, folder: Path) -> dict[str, str]:
    """Only what an image sets: no PYTHONPATH, no home."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (one, two)]
    return {
        "PATH": f"{sidecar}:{os.environ['PATH']}",
        **PROCESSOR,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "STREAM_MONITOR_INGEST": f"unix:{folder / 'ingest.sock'}",
        "STREAM_MONITOR_STORE": str(folder / "monitor.db"),
        "STREAM_MONITOR_GRPC": f"127.0.0.1:{ports[0]}",
        "STREAM_MONITOR_HTTP": f"127.0.0.1:{ports[1]}",
    }


def healthy(settings: dict[str, str]) -> bool:
    """What the image's HEALTHCHECK says."""
    return (
        subprocess.run([sys.executable, DOCKER / "healthcheck.py"], env=settings, capture_output=True).returncode == 0
    )


@contextmanager
def serving(command: list[str | Path], settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """`stream-monitor serve` with these settings alone, once it says that it is ready."""
    process = subprocess.Popen(
        [*command, "serve"], env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        said = ""
        while "ready: " not in said:
            assert select.select([process.stdout], [], [], 30)[0], said
            line = process.stdout.readline()
            assert line, said
            said += line
        # No warning, such as of a store that cannot be written.
        assert said.startswith("ready: "), said
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0, output
