"""Prints configuration.md from the settings model: `make docs` writes the file, a test compares the two."""

import socket
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from stream_monitor.config import PREFIX, TABLES, listed
from stream_monitor.config.places import default_fleet_store, default_store, default_target

HEAD = f"""# Configuration

Written by `make docs` from `stream_monitor/config`; edit the settings there.

A value comes, strongest first, from

1. the command line of `stream-monitor serve` and `stream-monitor fleet` (not capture settings): `--max-traces 500`;
2. an environment variable: `{PREFIX}MAX_TRACES=500`;
3. the TOML file that `{PREFIX}CONFIG` names, in table `[capture]`, `[monitor]` or `[fleet]`: `max_traces = 500`.

Capture settings belong in the environment of vLLM, monitor settings in that of `stream-monitor serve`, fleet settings
in that of `stream-monitor fleet`. Settings are read once, at start. A name that does not exist, or a value out of
range, is refused with one line that says what would be valid: `stream-monitor serve` and `stream-monitor vllm` do not
start then; vLLM's own server serves without capture and says so in its log.

If the variable `VLLM_PLUGINS` is set, it must contain `stream_monitor`, without a space beside it: vLLM loads no other
plug-ins than it lists. `stream-monitor vllm` does not start without it.
"""

SECTIONS = {
    "capture": (
        "## Capture: inside vLLM",
        "What a request may ask for itself, in `vllm_xargs` of its body: `stream_monitor_untrusted`, a flat list "
        "`[start, end, ...]` of token offsets in the rendered prompt that are not to be trusted, and, if "
        "`client_may_disable` is set, `stream_monitor_disable`. Whose a request is (`tenant_argument`) is for the "
        "gateway in front of vLLM to say. Anything else is not honoured.",
    ),
    "monitor": (
        "## Monitor: `stream-monitor serve`",
        "Beyond loopback and Unix sockets the monitor listens only with TLS (`tls_certificate`, `tls_key`), or "
        "`insecure`. The folder of a Unix socket must belong to the monitor's user and be closed to others (0770 or "
        "stricter). [security.md](security.md) says how these settings work together.",
    ),
    "fleet": (
        "## Fleet: `stream-monitor fleet`",
        "One of the interchangeable processes that answer for all monitors of a stream ([fleet.md](fleet.md)).",
    ),
}

DEFAULT_SOCKET = (
    "`unix:$XDG_RUNTIME_DIR/stream-monitor/ingest.sock`; without that variable, in `stream-monitor-<uid>` of the "
    "folder for temporary files"
)

DEFAULT_STORE = "`$XDG_STATE_HOME/stream-monitor/monitor.db`; without that variable, in `~/.local/state`"
DEFAULTS = {
    default_target: DEFAULT_SOCKET,
    default_store: DEFAULT_STORE,
    default_fleet_store: DEFAULT_STORE.replace("monitor.db", "fleet.db"),
    socket.gethostname: "the host's name",
}


def main() -> None:
    """The whole page."""
    print(HEAD)
    for name, table in TABLES.items():
        title, text = SECTIONS[name]
        print(f"{title}\n\n{text}\n\n| setting | default | valid | meaning |\n| --- | --- | --- | --- |")
        for key, field in listed(table):
            print(f"| `{key}` | {default(key, field)} | {valid(field)} | {field.description} |")
        print(end="\n" if name != list(TABLES)[-1] else "")


def default(key: str, field: FieldInfo) -> str:
    """The default as one would write it."""
    if field.default_factory is not None:
        return DEFAULTS[field.default_factory]  # type: ignore[index]
    value = field.default
    size = f" ({value >> 20} MiB)" if key.endswith("_bytes") else ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`{size}"


def valid(field: FieldInfo) -> str:
    """What the field's type and bounds allow."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if kind is str:
        return "text"
    noun = "whole number" if kind is int else "number"
    low = [f"from {bound.ge}" for bound in field.metadata if hasattr(bound, "ge")]
    low += [f"above {bound.gt}" for bound in field.metadata if hasattr(bound, "gt")]
    high = [f"to {bound.le}" for bound in field.metadata if hasattr(bound, "le")]
    high += [f"below {bound.lt}" for bound in field.metadata if hasattr(bound, "lt")]
    return " ".join([noun, *low, *high])


if __name__ == "__main__":
    main()
