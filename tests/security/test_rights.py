"""Each right without its credential is refused by name and counted; the access file is read again when it changes."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from stream_monitor.monitor.access.book import AccessError, Book
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc
from tests.monitor.conftest import TIMEOUT
from tests.monitor.synthetic import Engine
from tests.security.guarded import EVERYTHING, REFUSED, SCRAPER, Guarded, as_, code_of, principal, token_of, wait_until

OK, UNAUTHENTICATED = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
DENIED, NOT_FOUND = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND
RELOADS = "stream_monitor_access_reloads_total"

EACH = SCRAPER + "".join(
    (
        principal("engine", publish="*"),
        principal("reader", subscribe="*"),
        principal("eraser", delete="*"),
        principal("all", **EVERYTHING),
    )
)


def calls(monitor: Guarded, name: str) -> dict[str, Callable[[], object]]:
    """Every call, on behalf of a principal; each ends by itself where it is allowed."""
    api = monitor_pb2_grpc.MonitorServiceStub(monitor.open())
    how = {"timeout": TIMEOUT, "metadata": as_(name)}
    return {
        "Publish": lambda: monitor.tell([Engine().summary()], name),
        "Subscribe": lambda: next(api.Subscribe(monitor_pb2.SubscribeRequest(), **how)),
        "GetTrace": lambda: api.GetTrace(monitor_pb2.GetTraceRequest(request_id="nobody"), **how),
        "ListRequests": lambda: api.ListRequests(monitor_pb2.ListRequestsRequest(), **how),
        "DeleteRequest": lambda: api.DeleteRequest(monitor_pb2.DeleteRequestRequest(request_id="nobody"), **how),
    }


# What each may do: the others are PERMISSION_DENIED. There is no such request to get or to delete.
MAY = {
    "engine": {"Publish": OK},
    "reader": {"Subscribe": OK, "GetTrace": NOT_FOUND, "ListRequests": OK},
    "eraser": {"DeleteRequest": NOT_FOUND},
    "all": {"Publish": OK, "Subscribe": OK, "GetTrace": NOT_FOUND, "ListRequests": OK, "DeleteRequest": NOT_FOUND},
    "nobody": {},
    "": {},
}


@pytest.mark.parametrize("name", MAY)
def test_a_call_needs_its_right(start: Callable[..., Guarded], name: str) -> None:
    monitor = start(EACH)
    # Whoever shows nothing may scrape; for all else a credential might help.
    otherwise = UNAUTHENTICATED if name in ("", "nobody") else DENIED
    ended = {method: code_of(call) for method, call in calls(monitor, name).items()}
    assert ended == dict.fromkeys(ended, otherwise) | MAY[name]
    denied = len(ended) - len(MAY[name])
    unknown = {"": ["no_credential"], "nobody": ["unknown_token"]}
    reasons = unknown.get(name, ["no_right_publish", "no_right_subscribe", "no_right_delete"])
    assert sum(monitor.refused("grpc", reason) for reason in reasons) == denied
    # And whoever may is served.
    assert code_of(calls(monitor, "all")["ListRequests"]) is OK


def test_without_any_credential_nothing_is_answered(start: Callable[..., Guarded]) -> None:
    monitor = start(principal("all", **EVERYTHING))
    assert {code_of(call) for call in calls(monitor, "").values()} == {UNAUTHENTICATED}
    for path in ("/api/requests", "/api/trace?request_id=r", "/api/status", "/api/events", "/metrics"):
        answer = monitor.get(path)
        assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED"), path
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert monitor.get(path, "nobody").status_code == 401
    assert [monitor.get(path).status_code for path in ("/healthz", "/readyz", "/", "/static/js/main.js")] == [200] * 4
    counted = monitor.get("/metrics", "all").text
    for where, reason in (("grpc", "no_credential"), ("http", "no_credential"), ("http", "unknown_token")):
        assert f'{REFUSED}{{reason="{reason}",where="{where}"}} 5.0' in counted.splitlines()


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("reader", "/api/requests", 200),
        ("engine", "/api/requests", 403),
        ("engine", "/api/events", 403),
        ("reader", "/metrics", 403),
        ("all", "/metrics", 200),
        ("", "/metrics", 200),
    ],
)
def test_http_goes_by_the_same_rights(start: Callable[..., Guarded], name: str, path: str, status: int) -> None:
    monitor = start(EACH)
    answer = monitor.get(path, name)
    assert answer.status_code == status
    if status == 403:
        right = "metrics" if path == "/metrics" else "subscribe"
        assert answer.json() == {"code": "PERMISSION_DENIED", "message": f"{name} does not have the right {right}"}
        assert monitor.refused("http", f"no_right_{right}") == 1


@pytest.mark.parametrize("header", ["Basic abc", "Bearer", "Bearer " + 2000 * "x"])
def test_a_credential_of_another_kind_is_named_so(start: Callable[..., Guarded], header: str) -> None:
    monitor = start(EACH)
    assert monitor.get("/api/requests", headers={"authorization": header}).status_code == 401
    api = monitor_pb2_grpc.MonitorServiceStub(monitor.open())
    asked = monitor_pb2.ListRequestsRequest()
    assert (
        code_of(lambda: api.ListRequests(asked, timeout=TIMEOUT, metadata=(("authorization", header),)))
        is UNAUTHENTICATED
    )
    assert monitor.refused("http", "malformed_credential") == monitor.refused("grpc", "malformed_credential") == 1


def test_over_a_unix_socket_one_may_be_known_by_that(start: Callable[..., Guarded]) -> None:
    monitor = start(SCRAPER + principal("beside", "unix = true", publish="*"))
    monitor.tell([Engine().summary()])
    with monitor.open() as channel:
        api = monitor_pb2_grpc.MonitorServiceStub(channel)
        asked = monitor_pb2.ListRequestsRequest()
        assert code_of(lambda: api.ListRequests(asked, timeout=TIMEOUT)) is UNAUTHENTICATED


def test_the_access_file_is_read_again(
    start: Callable[..., Guarded], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monitor, path = start(EACH), tmp_path / "access.toml"

    def ended(name: str) -> grpc.StatusCode:
        return code_of(calls(monitor, name)["ListRequests"])

    assert (ended("reader"), ended("late")) == (OK, UNAUTHENTICATED)
    path.write_text(SCRAPER + principal("late", subscribe="*"))
    wait_until(lambda: monitor.metric(RELOADS, file="access", outcome="done") == 1)
    assert (ended("reader"), ended("late")) == (UNAUTHENTICATED, OK)
    for number, broken in enumerate((f'token = "{token_of("late")}', None), 1):
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        wait_until(lambda number=number: monitor.metric(RELOADS, file="access", outcome="failed") == number)  # type: ignore[misc]
        assert (ended("reader"), ended("late")) == (UNAUTHENTICATED, OK)
    assert [line for line in caplog.messages if line.startswith("access: ")] == [
        f"access: {path} was read again",
        f"access: {path} is not TOML; what was read before holds on",
        f"access: cannot read {path}: No such file or directory; what was read before holds on",
    ]
    assert not [line for line in caplog.messages if token_of("late") in line]


SECRET = "a-secret-that-nobody-sees"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f'token = "{SECRET}', "is not TOML"),
        (f'[[principal]]\nname = "a"\ntoken = "{SECRET}"\n', "principal.0.rights: Field required"),
        (f'[[principal]]\nname = "a"\ntoken = "{SECRET}"\nrights = {{ fly = ["*"] }}\n', "principal.0.rights.fly"),
        (principal("a", f'token = "{SECRET}"\nanyone = true', subscribe="*"), "give one of token, token_sha256"),
        (principal("a", "unix = false", subscribe="*"), "give one of token, token_sha256"),
        (principal("a", f'token_sha256 = "{SECRET}"', subscribe="*"), "principal.0.token_sha256"),
        (principal("a", 'token = "short"', subscribe="*"), "at least 16 characters"),
        (principal("a", f'token = "{SECRET} "', subscribe="*"), "principal.0.token"),
        (principal("a", subscribe=[]), "principal.0.rights.subscribe"),
        (principal("a", subscribe="no such name!"), "subscribe: a tenant's name must be at most 64 letters"),
        (principal("a", subscribe=""), 'subscribe: a tenant has a name; "*" means all of them'),
        (principal("a", publish=["one", "two"]), "publish: name one tenant"),
        (principal("a", metrics="one"), 'metrics: only "*"'),
        (
            principal("a", f'token = "{SECRET}"', delete="*") + principal("b", f'token = "{SECRET}"', delete="*"),
            "token",
        ),
        (
            principal("a", delete="*") + principal("a", f'token = "{SECRET}"', delete="*"),
            "two principals have the same",
        ),
        (2 * SCRAPER.replace("scraper", "other"), "two principals"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "access.toml"
    path.write_text(content)
    with pytest.raises(AccessError) as raised:
        Book(str(path))
    assert says in str(raised.value)
    assert str(raised.value).startswith(f"{path}")
    assert "\n" not in str(raised.value)
    assert SECRET not in str(raised.value)


def test_all_tokens_are_compared_whatever_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time says nothing of how much of a token is right, nor of whose it might be."""
    path = tmp_path / "access.toml"
    path.write_text("".join(principal(f"p{number}", subscribe="*") for number in range(20)))
    book, compared = Book(str(path)), []
    import hmac

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    assert book.recognise(token_of("p0"), None).name == "p0"
    first = list(compared)
    compared.clear()
    assert book.recognise(token_of("p19"), None).name == "p19"
    assert compared == first == [(32, 32)] * 20


def test_a_session_ends_with_its_token(tmp_path: Path) -> None:
    from stream_monitor.monitor.access import sessions

    path = tmp_path / "access.toml"
    path.write_text(principal("a", subscribe="*"))
    book = Book(str(path))
    made = sessions.Sessions(book)
    cookie = made.cookie(book.recognise(token_of("a"), None))
    assert made.principal(cookie) == book.recognise(token_of("a"), None)
    for other in ("", "a.b", cookie[:-4] + "AAA=", "x" + cookie, cookie.replace(".", ""), cookie + "."):
        assert made.principal(other) is None
    assert sessions.Sessions(book).principal(cookie) is None  # Of another start.
    path.write_text(principal("a", 'token = "another-token-of-the-same"', subscribe="*"))
    book.refresh()
    assert made.principal(cookie) is None
    later = time.time() + sessions.SECONDS + 1
    renewed = made.cookie(book.recognise("another-token-of-the-same", None))
    assert made.principal(renewed) is not None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time", lambda: later)
        assert made.principal(renewed) is None
