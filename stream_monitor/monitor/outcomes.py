"""Closed sets: what may become of a row, a message, a request and its arguments, and why. They are metric labels.

A reason that is not listed here is counted as OTHER, so that no publisher can add series without bound, and every
listed one is exported from the start, as 0: the first loss would else go unseen by `rate`, which needs a value before.
"""

from stream_monitor.monitor.ledger import ENGINE_SILENT

OTHER = "other"
ENGINE_QUOTA = "engine_quota"
RANKS_REFUSED = ("too_many_ranks", "too_many_ranks_of_engine", "rank_retired", "message_rate", "other_tenant")
_ELSEWHERE = "a reason that this release of the monitor does not know"

ROWS: dict[str, tuple[str, dict[str, str]]] = {
    "captured": ("in the monitor and in use", {"": ""}),
    "sampled_out": (
        "left out on purpose: only one position in `stride` is searched",
        {"": "", "governor": "the stride was raised to keep the cost below `max_overhead`"},
    ),
    "raced": ("left out because the engine gave a key block away before the search was done with it", {"": ""}),
    "dropped": (
        "lost on the way",
        {
            "estimator_busy": "as many steps as `queue_steps` were waiting already",
            "estimator_error": "the search failed; the log of vLLM says how",
            "fault": "the step in which capture turned itself off; the log of vLLM says why",
            "invalid_row": "its block table held no such page",
            "record_too_large": "larger than the ring",
            "ring_full": "overwritten in the ring before the publisher read it",
            "torn": "damaged in the ring",
            "monitor_unreachable": "nobody took it in for too long",
            ENGINE_SILENT: "in hand when the engine ended without a word, or was not heard of for half a minute",
            OTHER: _ELSEWHERE,
        },
    ),
    "refused": (
        "not captured by decision",
        {
            "client_disabled": "the request switched its monitoring off, and `client_may_disable` allows that",
            "request_limit": "`max_requests` requests were captured already",
            "prompt_embeds": "a prompt without token ids",
            "id_too_long": "an id of over 1,024 characters",
            "unknown_request": "it was running when capture was armed",
            "capture_off": "after a fault",
            "paused": "capture was paused by `stream_monitor_pause`",
            "too_many_ranks": "the monitor holds `max_engines` ranks with open streams",
            "too_many_ranks_of_engine": "it holds `max_ranks_per_engine` ranks of this engine",
            "rank_retired": "the rank returned after the monitor had closed its account",
            "message_rate": "the rank sent more messages than `max_message_rate`",
            "other_tenant": "the engine was published for another tenant before",
            "monitor_invalid_argument": "the monitor found the message unsound",
            "monitor_resource_exhausted": "the message was larger than `max_message_bytes`",
            "monitor_failed_precondition": "the monitor is of another schema version",
            "monitor_out_of_range": "the monitor found the message out of order",
            "monitor_internal": "the monitor failed at it three times",
            "monitor_unknown": "the same",
            "monitor_data_loss": "the same",
            OTHER: _ELSEWHERE,
        },
    ),
    "discarded": (
        "captured, then thrown away by the monitor",
        {
            "recomputed": "computed again after preemption, the later one counts",
            "stale": "the earlier one came last",
            "repeated": "sent twice",
            "past_end": "beyond the end of the request",
            "readded": "the request started again with another prompt",
            "sentence_limit": "beyond `max_sentences`",
            "unplaced": "no sentence ever held it",
            "deleted": "its request was deleted",
            ENGINE_QUOTA: "the monitor followed `max_requests_per_engine` requests of its engine already",
        },
    ),
}
"""Outcome to what it means and its reasons."""

REPLACED = ("recomputed", "stale", "repeated", "past_end", "readded", "deleted")
"""Reasons of discarded rows that nothing was lost by: another row stands for the position, it is no position any more,
or somebody wished it."""

MESSAGES: dict[str, tuple[str, dict[str, str]]] = {
    "accepted": ("taken in", {"": ""}),
    "duplicate": ("sent again after a reconnection and taken in before", {"": ""}),
    "refused": (
        "sound, and not taken in",
        {reason: ROWS["refused"][1][reason] for reason in RANKS_REFUSED},
    ),
    "invalid": (
        "the contract is broken, and the stream ends",
        {
            "malformed": "no summary can be read from it",
            "oversized": "larger than `max_message_bytes`",
            "schema_version": "of a version that is not supported",
            "engine": "the rank describes itself unsoundly, or otherwise than before",
            "other_rank": "of another rank than those before on the stream",
            "shape": "an array's length contradicts its shape",
            "value": "a field is missing or out of its range",
            "limit": "more entries, or longer, than the contract allows",
            "out_of_order": "its number is not above the one before on the stream",
        },
    ),
}
"""The same of messages."""

REQUESTS = {reason: ROWS["refused"][1][reason] for reason in ("client_disabled", "request_limit", "prompt_embeds")} | {
    ENGINE_QUOTA: ROWS["discarded"][1][ENGINE_QUOTA],
    OTHER: _ELSEWHERE,
}
"""Why a request is not captured."""

ARGUMENTS = {
    ("stream_monitor_disable", "not_allowed"): "`client_may_disable` is off",
    ("stream_monitor_untrusted", "malformed"): "not a flat list of token offsets",
    ("stream_monitor_tenant", "not_allowed"): "`tenant_argument` names no such entry: a client has no say in this",
    ("stream_monitor_tenant", "malformed"): "what the gateway sent is no tenant; the engine's own `tenant` holds",
    ("stream_monitor_tenant", "missing"): "the gateway sent none; the engine's own `tenant` holds",
    (OTHER, "unknown"): "no such argument",
}
"""Argument of a request and why it was not honoured."""


def known_row(outcome: str, reason: str) -> tuple[str, str]:
    """The cell under which rows of this outcome and reason are exported."""
    reasons = ROWS[outcome][1]
    return outcome, reason if reason in reasons else (OTHER if OTHER in reasons else next(iter(reasons)))


def known_request(reason: str) -> str:
    """The label under which a request refused for this reason is counted."""
    return reason if reason in REQUESTS else OTHER


def known_argument(argument: str, reason: str) -> tuple[str, str]:
    """The labels under which an argument that was not honoured is counted."""
    return (argument, reason) if (argument, reason) in ARGUMENTS else (OTHER, "unknown")
