"""The operator's policy over what a request may ask for in its `vllm_xargs`.

vLLM passes `vllm_xargs` only as strings, numbers and flat lists (entrypoints/openai/chat_completion/protocol.py:511).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stream_monitor.tenants import check_tenant

DISABLE_KEY = "stream_monitor_disable"
UNTRUSTED_KEY = "stream_monitor_untrusted"
TENANT_KEY = "stream_monitor_tenant"
"""What the tenant's entry is counted under, whatever the operator named it."""


def disabled() -> bool:
    """Whether `STREAM_MONITOR_DISABLE` is set; read without the settings model, as plug-ins load early."""
    return os.environ.get("STREAM_MONITOR_DISABLE", "").strip().lower() in {"1", "true", "yes", "on"}


@dataclass(frozen=True)
class RequestPolicy:
    """What was granted to one request.

    Attributes:
        refused_reason: why its rows are not captured; empty when they are.
        untrusted: flat token offsets [start, end, ...] of the rendered prompt that the client labels untrusted.
        tenant: whose request it is, by the gateway's word; empty if that said nothing.
        refused_arguments: names of `vllm_xargs` entries that were not honoured, each with the reason, such as
            `stream_monitor_disable:not_allowed`; from a closed set, whatever the client sends.
    """

    refused_reason: str = ""
    untrusted: tuple[int, ...] = ()
    tenant: str = ""
    refused_arguments: tuple[str, ...] = ()


def decide(
    extra_args: Mapping[str, Any] | None, prompt_tokens: int, client_may_disable: bool, tenant_argument: str = ""
) -> RequestPolicy:
    """Judge a request's arguments. Labels may only add distrust; switching off needs the operator's leave.

    The tenant is in the entry that the operator named, since the gateway in front sets that one over what the client
    sent; nothing else says whose a request is.
    """
    if not extra_args and not tenant_argument:
        return RequestPolicy()
    extra_args = extra_args or {}
    refused: list[str] = []
    tenant = _tenant(extra_args, tenant_argument, refused)
    reason = ""
    if _truthy(extra_args.get(DISABLE_KEY)):
        if client_may_disable:
            reason = "client_disabled"
        else:
            refused.append(f"{DISABLE_KEY}:not_allowed")
    untrusted: tuple[int, ...] = ()
    if UNTRUSTED_KEY in extra_args:
        spans = extra_args[UNTRUSTED_KEY]
        if _valid_spans(spans, prompt_tokens):
            untrusted = tuple(spans)
        else:
            refused.append(f"{UNTRUSTED_KEY}:malformed")
    known = (DISABLE_KEY, UNTRUSTED_KEY, TENANT_KEY, tenant_argument)
    if any(key.startswith("stream_monitor") and key not in known for key in extra_args):
        # Not by its name: names the client makes up would make as many counters.
        refused.append("other:unknown")
    return RequestPolicy(reason, untrusted, tenant, tuple(refused))


def _tenant(extra_args: Mapping[str, Any], argument: str, refused: list[str]) -> str:
    if argument != TENANT_KEY and TENANT_KEY in extra_args:
        refused.append(f"{TENANT_KEY}:not_allowed")
    if not argument:
        return ""
    said = extra_args.get(argument)
    if said is None:
        refused.append(f"{TENANT_KEY}:missing")
        return ""
    try:
        return check_tenant(said if isinstance(said, str) else "?")
    except ValueError:
        refused.append(f"{TENANT_KEY}:malformed")
        return ""


def _truthy(value: object) -> bool:
    return value in (1, True) or (isinstance(value, str) and value.strip().lower() in {"1", "true", "yes", "on"})


def _valid_spans(spans: object, prompt_tokens: int) -> bool:
    """Flat, even, ascending, inside the prompt, whole numbers."""
    if not isinstance(spans, list | tuple) or len(spans) % 2 or not spans or len(spans) > 2048:
        return False
    if not all(isinstance(edge, int) and not isinstance(edge, bool) for edge in spans):
        return False
    edges = list(spans)
    return (
        edges[0] >= 0
        and edges[-1] <= prompt_tokens
        and all(a < b for a, b in zip(edges[::2], edges[1::2], strict=True))
        and all(a <= b for a, b in zip(edges[1::2], edges[2::2], strict=False))
    )
