"""Real monitors on real sockets, with certificates made here."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from tests.security.guarded import Files, Guarded, guard


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def other_ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, ca: trustme.CA) -> Files:
    """Of a server called localhost."""
    made = Files(tmp_path / "tls")
    made.put(ca.issue_cert("localhost", "127.0.0.1"), client_ca=ca)
    return made


@pytest.fixture
def start(tmp_path: Path, ca: trustme.CA) -> Iterator[Callable[..., Guarded]]:
    """Starts monitors, over TLS where it is given files."""
    yield from guard(tmp_path, ca)
