"""A browser's way in: a token once, then a cookie."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.monitor.page.conftest import CHROMIUM, FLAGS
from tests.monitor.synthetic import Engine
from tests.monitor.test_service import SHIFTING
from tests.security.guarded import SCRAPER, Files, Guarded, principal, token_of

ACCESS = SCRAPER + principal("engine", publish="*") + principal("me", subscribe="*")


def signed_in(client: httpx.Client, token: str = token_of("me")) -> httpx.Response:
    return client.post("/api/signin", json={"token": token})


@pytest.mark.parametrize("tls", [False, True])
def test_the_cookie_is_for_this_host_and_not_for_scripts(
    start: Callable[..., Guarded], files: Files, tls: bool
) -> None:
    monitor = start(ACCESS, files if tls else None)
    with monitor.browser() as client:
        assert client.get("/api/requests").status_code == 401
        answer = signed_in(client)
        assert (answer.status_code, answer.json()) == (200, {"name": "me"})
        name, *attributes = answer.headers["set-cookie"].split("; ")
        assert name.startswith("__Host-stream-monitor=" if tls else "stream-monitor=")
        assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(attributes)
        assert ("Secure" in attributes) is tls
        assert token_of("me") not in answer.headers["set-cookie"]
        assert client.get("/api/status").json()["principal"] == "me"
        # A right that it does not have is not had by signing in.
        assert client.get("/metrics").status_code == 403
        signed_out = client.post("/api/signout")
        assert "Max-Age=0" in signed_out.headers["set-cookie"]
        client.cookies.clear()
        assert client.get("/api/requests").status_code == 401


def test_what_does_not_sign_in(start: Callable[..., Guarded], tmp_path: Path) -> None:
    monitor = start(ACCESS)
    with monitor.browser() as client:
        assert signed_in(client, token_of("stranger")).status_code == 401
        for body in (b"", b"{", b"[]", b'{"token": 1}', b'{"other": "x"}'):
            answer = client.post("/api/signin", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 401
        # What a form of another site can send.
        form = {"token": token_of("me")}
        assert client.post("/api/signin", data=form).status_code == 401
        text = client.post("/api/signin", content=json.dumps(form), headers={"content-type": "text/plain"})
        assert text.status_code == 401
        crossing = client.post("/api/signin", json=form, headers={"sec-fetch-site": "cross-site"})
        assert crossing.status_code == 403
        assert client.post("/api/signin", content=b"x" * 5000).status_code == 413
        assert client.get(f"/api/signin?token={token_of('me')}").status_code == 405
        assert client.cookies == httpx.Cookies()
        assert monitor.refused("http", "unknown_token") == 1
        assert monitor.refused("http", "malformed_credential") == 7
        assert monitor.refused("http", "too_large") == 1
        # A cookie that is not ours is none.
        forged = client.get("/api/requests", headers={"cookie": "stream-monitor=MTpt.AAAA"})
        assert forged.status_code == 401


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def test_a_real_browser_signs_in_and_out_over_tls(
    start: Callable[..., Guarded], files: Files, browser: Browser, tmp_path: Path
) -> None:
    monitor = start(ACCESS, files)
    monitor.tell(Engine().request("chatcmpl-secret-aaaaaaaa", SHIFTING), "engine")
    context = browser.new_context(ignore_https_errors=True)
    page = context.new_page()
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(f"https://localhost:{monitor.server.http_address.rpartition(':')[2]}/")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.get_by_label("Token").fill(token_of("stranger"))
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("the token is nobody's who has access")).to_be_visible()
    page.get_by_label("Token").fill(token_of("me"))
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("chatcmpl-secret").first).to_be_visible()
    assert page.evaluate("document.cookie") == ""
    (cookie,) = context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (
        "__Host-stream-monitor",
        True,
        True,
        "Strict",
    )
    page.reload()
    expect(page.get_by_text("chatcmpl-secret").first).to_be_visible()
    page.get_by_role("button", name="Sign me out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    # Taken back while the page looks on: it asks again by itself.
    page.get_by_label("Token").fill(token_of("me"))
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_text("chatcmpl-secret").first).to_be_visible()
    (tmp_path / "access.toml").write_text(SCRAPER)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert not [address for address in addresses if "token-0123456789" in address]
    context.close()
