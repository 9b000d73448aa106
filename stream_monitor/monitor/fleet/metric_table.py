"""Every metric of the fleet: those of its processes, and those by which a monitor tells of its part. docs/metrics.md is
written from it."""

from stream_monitor.monitor.metric_table import Definition, Kind

REASONS = ("unreachable", "credentials", "tls", "no_jetstream", "stream", "full", "timeout", "error")
"""What may be wrong with a broker, a label of metrics: `stream` is gone, or not one for us."""

FLEET_TABLE: list[Definition] = []
"""Those of a process of the fleet, in the order of the page."""

_SECTION = "A process of the fleet"


def _define(kind: Kind, name: str, labels: tuple[str, ...], text: str, buckets: tuple[float, ...] = ()) -> Definition:
    definition = Definition(_SECTION, kind, f"stream_monitor_fleet_{name}", labels, text, buckets)
    FLEET_TABLE.append(definition)
    return definition


UP = _define("gauge", "up", (), "1 while it is connected to the broker; without, it answers from what it has read.")
LAG = _define(
    "gauge", "lag_messages", (), "Messages of the stream that it has not read yet, as of the last one that it has."
)
POSITION = _define("gauge", "position", (), "Sequence in the stream up to which it has read; the same on all, in time.")
READ = _define(
    "counter",
    "messages_total",
    ("record", "outcome"),
    "Messages of the stream: `finding`, `trace`, `deleted` (a request is). `read`; `duplicate`: a finding that came "
    "before, left out; `late`: of a request that was deleted, removed; `malformed`: none of ours, left out.",
)
EXPIRED = _define(
    "counter",
    "expired_messages_total",
    (),
    "Messages, at most so many, that the stream let go before this process read them. Other processes may have.",
)
FAILURES = _define(
    "counter",
    "failures_total",
    ("reason",),
    "What went wrong with the broker: "
    "`unreachable`, `credentials`, `tls`, `no_jetstream`, `stream` (it is gone, or not one for us), `full`, `timeout`, "
    "`error`.",
)
HELD = _define("gauge", "held", ("record",), "Findings and traces in its store, counted every ten seconds.")
EVENT_DELAY = _define(
    "histogram",
    "event_delay_seconds",
    (),
    "From the engine step that closed a sentence to its finding on the way to this process's subscribers; those read "
    "after a restart or an outage, too. Compares the clocks of two hosts.",
    (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0),
)
COMMITS = _define(
    "histogram",
    "commit_seconds",
    (),
    "To keep what was read at once, in its store.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)
STORE_UP = _define("gauge", "store_up", (), "1 if its store can be written; while it cannot, nothing more is read.")
STORE_SET_ASIDE = _define(
    "counter", "store_set_aside_total", (), "Damaged stores that were set aside; what they held is read anew."
)
REQUESTS_DELETED = _define(
    "counter", "requests_deleted_total", (), "Requests removed from its store and memory, whoever asked."
)
SUBSCRIBERS = _define("gauge", "subscribers", (), "Subscribers connected to it.")
SUBSCRIBER_LOST = _define(
    "counter",
    "subscriber_events_lost_total",
    (),
    "Events lost to subscribers that read too slowly; each is told how many.",
)
PAGE_REFUSED = _define(
    "counter",
    "page_refused_total",
    ("reason",),
    "Requests for its page that were refused; reasons as of `stream_monitor_page_refused_total`.",
)
ACCESS_REFUSED = _define(
    "counter",
    "access_refused_total",
    ("where", "reason"),
    "Who was turned away; as `stream_monitor_access_refused_total`.",
)
ACCESS_RELOADS = _define(
    "counter",
    "access_reloads_total",
    ("file", "outcome"),
    "Files that were replaced while it ran; as `stream_monitor_access_reloads_total`.",
)
TLS_EXPIRY = _define(
    "gauge",
    "tls_expiry_timestamp_seconds",
    ("file",),
    "When the certificate in use expires; as `stream_monitor_tls_expiry_timestamp_seconds`.",
)
BUILD_INFO = _define("info", "build_info", ("version",), "Always 1: the version.")
