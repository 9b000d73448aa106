"""The options by which a command reaches a monitor, in one place."""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream_monitor.cli_fail import fail

if TYPE_CHECKING:
    from stream_monitor.target import Target


def _reached(
    *,
    target: Annotated[str, typer.Option(help="Address of the monitor: host:port or unix:/path.")] = "127.0.0.1:9750",
    ca: Annotated[
        str, typer.Option(help="Speak TLS: file of the CAs that may have signed for the monitor, or `system`.")
    ] = "",
    certificate: Annotated[str, typer.Option(help="File of the certificate to show to the monitor.")] = "",
    key: Annotated[str, typer.Option(help="File of its key.")] = "",
    token_file: Annotated[str, typer.Option(help="File of the bearer token to show to the monitor.")] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="Speak without TLS beyond this host.")] = False,
) -> "Target":
    from stream_monitor.target import Target, TargetError

    try:
        return Target(target, ca, certificate, key, token_file, insecure)
    except TargetError as error:
        fail(f"--target: {error}; see --ca, --certificate, --key, --token-file and --insecure")


_OPTIONS = inspect.signature(_reached).parameters


def reaches_a_monitor(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter, `monitor_at`, is made of the options above; they become its own.

    What the monitor refuses, or that it is not there, ends the command with one line.
    """
    own = inspect.signature(command).parameters
    parameters = [each for name, each in own.items() if name != "monitor_at"] + list(_OPTIONS.values())
    keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]

    @functools.wraps(command)
    def reaching(**values: Any) -> None:
        from stream_monitor.client import MonitorError, TargetError

        monitor_at = _reached(**{name: values.pop(name) for name in _OPTIONS})
        try:
            command(monitor_at, **values)
        except (MonitorError, TargetError) as error:
            fail(error)

    # Typer reads its options off these.
    reaching.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    reaching.__annotations__ = {each.name: each.annotation for each in keyword_only}
    return reaching
