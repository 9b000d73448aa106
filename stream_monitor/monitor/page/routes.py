"""The page's addresses."""

from collections.abc import Callable, Iterable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from stream_monitor.monitor.access.access import Access
from stream_monitor.monitor.access.rights import Right
from stream_monitor.monitor.access.signing_in import SigningIn
from stream_monitor.monitor.page.api import Api
from stream_monitor.monitor.page.guard import Guard
from stream_monitor.monitor.page.live import Live

VIEWS = ("/", "/events", "/trace")
"""Addresses of one and the same document; its script shows what the address names."""


def page(api: Api, live: Live, hosts: Iterable[str], refused: Callable[[str], None], access: Access) -> Guard:
    """The page, guarded; see `Guard` for `hosts` and `refused`. What holds no requests is for anybody."""
    static = Path(str(resources.files("stream_monitor.monitor.page"))) / "static"

    async def document(_: Request) -> Response:
        return FileResponse(static / "index.html", headers=_REVALIDATE)

    async def plotly(_: Request) -> Response:
        script = plotly_script()
        # Without it the page says what is missing and does without charts.
        return FileResponse(script, headers=_REVALIDATE) if script else Response(_NO_PLOTLY, media_type=_SCRIPT)

    async def shares(_: Request) -> Response:
        return FileResponse(Path(str(resources.files("stream_monitor.plots"))) / "shares.js", headers=_REVALIDATE)

    signing = SigningIn(access)
    routes: list[BaseRoute] = [Route(view, document) for view in VIEWS]
    routes += [
        *(
            Route(path, access.gate(Route(path, endpoint), Right.SUBSCRIBE))
            for path, endpoint in (
                ("/api/requests", api.requests),
                ("/api/trace", api.trace),
                ("/api/status", api.status),
                ("/api/events", live.events),
            )
        ),
        Route("/api/signin", signing.sign_in, methods=["POST"]),
        Route("/api/signout", signing.sign_out, methods=["POST"]),
        Route("/static/plotly.js", plotly),
        Route("/static/js/shares.js", shares),
        Mount("/static", _Static(directory=static)),
    ]
    return Guard(Starlette(routes=routes), hosts, refused)


def plotly_script() -> Path | None:
    """Plotly's script inside the installed package; None without the extra `page`."""
    found = find_spec("plotly")
    if found is None or found.origin is None:
        return None
    script = Path(found.origin).parent / "package_data" / "plotly.min.js"
    return script if script.is_file() else None


class _Static(StaticFiles):
    """Files that a browser keeps, and asks about each time: another version of the monitor has others."""

    def file_response(self, *args: object, **more: object) -> Response:
        response = super().file_response(*args, **more)  # type: ignore[arg-type]
        response.headers.update(_REVALIDATE)
        return response


_REVALIDATE = {"cache-control": "no-cache"}
_SCRIPT = "text/javascript"
_NO_PLOTLY = "// The package plotly is not installed on the monitor's host: pip install 'stream-monitor[page]'\n"
