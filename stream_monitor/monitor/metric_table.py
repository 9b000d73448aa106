"""Every metric of the monitor: its name, type, labels and meaning, in one table. docs/metrics.md is written from it.

Names are as Prometheus shows them: prefix `stream_monitor_`, base units, `_total` on counters. Request ids are never
labels; `model_name` and `engine` are vLLM's own labels.
"""

from dataclasses import dataclass
from typing import Literal

ENGINE = ("model_name", "engine")

Kind = Literal["counter", "gauge", "histogram", "info"]


@dataclass(frozen=True)
class Definition:
    """One metric.

    Attributes:
        section: heading of docs/metrics.md under which it stands.
        name: with its suffix.
        labels: all of them.
        text: what it means; HELP of the exposition, and the page.
        buckets: upper bounds of a histogram, +Inf left out.
        exemplars: whether samples carry the id of a request, in OpenMetrics.
    """

    section: str
    kind: Kind
    name: str
    labels: tuple[str, ...]
    text: str
    buckets: tuple[float, ...] = ()
    exemplars: bool = False


TABLE: list[Definition] = []
"""All of them, in the order of the page."""


def _define(
    section: str,
    kind: Kind,
    name: str,
    labels: tuple[str, ...],
    text: str,
    buckets: tuple[float, ...] = (),
    exemplars: bool = False,
) -> Definition:
    definition = Definition(section, kind, f"stream_monitor_{name}", labels, text, buckets, exemplars)
    TABLE.append(definition)
    return definition


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)

_S = "The account of rows"
ROWS_EXPECTED = _define(
    _S,
    "counter",
    "rows_expected_total",
    (*ENGINE, "phase"),
    "All rows of the watched layers and query heads since capture was armed.",
)
ROWS = _define(
    _S,
    "counter",
    "rows_total",
    (*ENGINE, "phase", "outcome", "reason"),
    "What became of them, one outcome each. The sum is that of stream_monitor_rows_expected_total when nothing is in "
    "flight.",
)

_S = "How good the capture is"
RECALL = _define(
    _S,
    "histogram",
    "audit_recall_ratio",
    ENGINE,
    "Of one row, layer and head in every `audit_every` searched steps, recomputed exactly: attention mass on the "
    "blocks that the search kept over the mass on the best `top_k` blocks. The always-kept first and last blocks do "
    "not count.",
    (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0),
)
UNOBSERVED = _define(
    _S,
    "histogram",
    "unobserved_share_ratio",
    ENGINE,
    "Share of attention mass that lies in blocks which were not kept, as the search estimates it; mean of each output "
    "sentence.",
    (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
    exemplars=True,
)

_S = "Requests, sentences, findings"
REQUESTS_STARTED = _define(_S, "counter", "requests_started_total", ENGINE, "Requests seen to start.")
REQUESTS_FINISHED = _define(_S, "counter", "requests_finished_total", ENGINE, "Requests seen to leave the engine.")
REQUESTS_REFUSED = _define(
    _S,
    "counter",
    "requests_refused_total",
    (*ENGINE, "reason"),
    "Of those started, requests that the engine does not capture, by why.",
)
REQUESTS_WITHOUT_TEXT = _define(
    _S,
    "counter",
    "requests_without_text_total",
    (*ENGINE, "reason"),
    "Of those finished, requests whose sentences have no text although they should: `no_tokenizer` (token ids came, "
    "`tokenizers` names none for the model), `tokenizer_mismatch` (the one it names is another model's), `not_sent` "
    "(`tokenizers` is set, the engine's `send_token_ids` is not).",
)
REQUESTS_ACTIVE = _define(
    _S, "gauge", "requests_active", ENGINE, "Requests that run now, as far as they were seen, on connected engines."
)
ARGUMENTS_REFUSED = _define(
    _S,
    "counter",
    "request_arguments_refused_total",
    (*ENGINE, "argument", "reason"),
    "Entries of requests' `vllm_xargs` that were not honoured, by name and why.",
)
SENTENCES = _define(_S, "counter", "sentences_total", ENGINE, "Sentences of the output that were closed and scored.")
SENTENCES_DROPPED = _define(
    _S, "counter", "sentences_dropped_total", ENGINE, "Sentences beyond `max_sentences` of their request."
)
TOKENS_MISSING = _define(
    _S,
    "counter",
    "tokens_missing_total",
    ENGINE,
    "Tokens that were never reported, so that sentence ends among them are unknown.",
)
ANCHOR_MASS = _define(
    _S,
    "counter",
    "anchor_mass_total",
    (*ENGINE, "role"),
    "Attention of scored sentences on candidate anchors (sentences at least four back), summed, by role of the anchor. "
    "Over stream_monitor_sentences_total: the mean share of attention; over the sum of all roles: what the output "
    "rests on.",
)
VERDICTS = _define(
    _S,
    "counter",
    "verdicts_total",
    (*ENGINE, "kind", "verdict"),
    "What each detector said of each scored sentence: `insufficient` (it abstains: too few captured rows, or nothing "
    "to look at), `warm_up`, `steady` or `alarm`. `untrusted_anchor` also looks at the opening, the row from which the "
    "first token is sampled, of each request with an untrusted stretch.",
)
EVENTS = _define(
    _S,
    "counter",
    "events_total",
    (*ENGINE, "kind", "severity"),
    "Findings raised, by kind, such as ANCHOR_SHIFT.",
    exemplars=True,
)
EVENT_DELAY = _define(
    _S,
    "histogram",
    "event_delay_seconds",
    ENGINE,
    "From the engine step that closed a sentence, by the engine host's clock, until the sentence's events were "
    "published, findings or none. Needs clocks that agree.",
    _SECONDS,
    exemplars=True,
)
PROFILE_MADE = _define(
    _S,
    "gauge",
    "profile_timestamp_seconds",
    ("model_name", "capture"),
    "When the calibration profile of a model and capture was made, Unix time: `time()` less it is the profile's age.",
)
UNCALIBRATED = _define(
    _S,
    "counter",
    "uncalibrated_requests_total",
    ("model_name",),
    "Requests of a model and capture without a profile: their findings have no known rate of false alarms.",
)

_S = "What it costs the engine"
ESTIMATES = _define(
    _S, "counter", "estimates_total", ENGINE, "Searches: one for all sampled rows, watched layers and heads of a step."
)
ESTIMATE_SECONDS = _define(
    _S, "counter", "estimate_seconds_total", ENGINE, "Their run time, on a thread beside decoding."
)
HOOK_SECONDS = _define(
    _S,
    "counter",
    "hook_seconds_total",
    ENGINE,
    "Time that capture took on the thread that runs the engine's steps, over all ranks: what a user can feel of it.",
)
DEVICE_WAITS = _define(
    _S,
    "counter",
    "device_waits_total",
    ENGINE,
    "Engine steps that a GPU held back until a search had read a KV block that they were to rewrite. 0 on CPUs, where "
    "such a row is raced instead.",
)
STRIDE = _define(
    _S,
    "gauge",
    "stride",
    ENGINE,
    "One row in every so many positions is searched now, on the connected rank that searches least; above the setting "
    "where the governor keeps the cost below `max_overhead`. 0 while every rank is paused or faulty, or none is there.",
)
KEY_BYTES = _define(
    _S,
    "counter",
    "estimate_read_bytes_total",
    ENGINE,
    "Bytes of keys and block summaries that they read from the KV cache, at the size of its keys.",
)
RECORD_BYTES = _define(
    _S,
    "counter",
    "estimate_written_bytes_total",
    ENGINE,
    "Bytes of the records that they wrote to the shared-memory ring.",
)
SUMMARY_BYTES = _define(
    _S,
    "gauge",
    "block_summaries_bytes",
    ENGINE,
    "Engine memory that block summaries take, over all connected ranks. 0 under `descent` and `exact`.",
)
KV_TOKENS_LOST = _define(
    _S,
    "gauge",
    "kv_cache_tokens_lost",
    ENGINE,
    "Tokens that the KV cache would hold more without block summaries, on the rank that lost most. 0 where the cache's "
    "size was given and summaries came from free memory.",
)

_S = "Messages, queues and ranks"
QUEUE_SIZE = _define(
    _S,
    "gauge",
    "queue_size",
    (*ENGINE, "queue"),
    "What waits, on the rank whose queue is fullest, as of its newest message: `estimator` steps, `ring` bytes, "
    "`backlog` bytes in the publisher, `merge` bytes of steps whose ranks have not all arrived.",
)
QUEUE_CAPACITY = _define(_S, "gauge", "queue_capacity", (*ENGINE, "queue"), "How much may, in the same unit.")
SENT = _define(
    _S,
    "counter",
    "messages_sent_total",
    ENGINE,
    "Messages that publishers sent, by their own count; one that is sent again counts again.",
)
MESSAGES = _define(
    _S, "counter", "messages_total", ("outcome", "reason"), "Messages that arrived, by their fate and why."
)
MESSAGE_BYTES = _define(_S, "counter", "message_bytes_total", (), "Their size.")
MESSAGES_LOST = _define(
    _S,
    "counter",
    "messages_lost_total",
    ENGINE,
    "Numbers missing in a rank's sequence: records that were lost with what they said of requests (starts, tokens, "
    "ends). Their rows are in the account as `dropped`.",
)
STEP_DELAY = _define(
    _S,
    "histogram",
    "step_delay_seconds",
    ENGINE,
    "From the end of a step's forward pass, by the engine host's clock, until the monitor took it in. Needs clocks "
    "that agree.",
    _SECONDS,
    exemplars=True,
)
STEPS = _define(
    _S,
    "counter",
    "steps_total",
    (*ENGINE, "result"),
    "Engine steps with rows: `complete`; `partial` where a rank was missing after `merge_deadline_seconds`, or there "
    "without one of the rows; and, beside these, `late`: what a rank sent of a step that went on without it.",
)
ENGINES_CONNECTED = _define(
    _S, "gauge", "engines_connected", ENGINE, "Engines of which at least one rank has an open stream."
)
RANKS_CONNECTED = _define(_S, "gauge", "ranks_connected", ENGINE, "Engine ranks with an open stream.")
RANKS_FAULTY = _define(
    _S, "gauge", "ranks_faulty", ENGINE, "Of these, ranks whose capture a fault turned off; vLLM serves on."
)
ENGINE_INFO = _define(
    _S,
    "info",
    "engine_info",
    (*ENGINE, "vllm_version", "plugin_version", "strategy"),
    "Always 1: what the connected ranks run.",
)

_S = "The monitor itself"
TRACES = _define(_S, "gauge", "traces", ("state",), "Request traces held: `running`, `finished`.")
TRACES_LIMIT = _define(_S, "gauge", "traces_limit", (), "How many may be, setting `max_traces`.")
TRACES_BYTES = _define(_S, "gauge", "traces_bytes", (), "Their memory, estimated.")
TRACES_BYTES_LIMIT = _define(
    _S, "gauge", "traces_limit_bytes", (), "How much they may take, setting `max_trace_bytes`."
)
TRACES_EVICTED = _define(
    _S,
    "counter",
    "traces_evicted_total",
    ("limit",),
    "Traces that made room, by the limit that was reached: `count` or `bytes`.",
)
TRACES_LATE = _define(_S, "counter", "traces_late_total", (), "Traces of requests whose start the monitor did not see.")
TRACES_REPLACED = _define(_S, "counter", "traces_replaced_total", (), "Finished traces whose id was used again.")
SUBSCRIBERS = _define(_S, "gauge", "subscribers", (), "Open subscriptions, those of live pages included.")
PAGE_REFUSED = _define(
    _S,
    "counter",
    "page_refused_total",
    ("reason",),
    "What browsers asked of the page and did not get: `host`, by a name that is not one of `http_hosts`; `cross_site`, "
    "from a page of another site; `too_many_pages`, beyond `max_live_pages`.",
)
ACCESS_REFUSED = _define(
    _S,
    "counter",
    "access_refused_total",
    ("where", "reason"),
    "Who was turned away: over `grpc` or `http`, and why ([security.md](security.md#refusals) has the reasons).",
)
ACCESS_RELOADS = _define(
    _S,
    "counter",
    "access_reloads_total",
    ("file", "outcome"),
    "Files that were replaced while the monitor ran: `certificate` (with its key and the client CA) or `access`; "
    "`done`, or `failed`: what was read before stays in use.",
)
TLS_EXPIRY = _define(
    _S,
    "gauge",
    "tls_expiry_timestamp_seconds",
    ("file",),
    "When the certificate in use expires, in Unix seconds: `certificate`, the earliest of its chain, and `client_ca`, "
    "the latest of them.",
)
SUBSCRIBER_QUEUE = _define(
    _S, "gauge", "subscriber_queue_events", (), "Events that wait for the subscriber that is furthest behind."
)
SUBSCRIBER_QUEUE_LIMIT = _define(
    _S, "gauge", "subscriber_queue_limit_events", (), "How many may, setting `subscriber_queue`."
)
SUBSCRIBER_LOST = _define(
    _S,
    "counter",
    "subscriber_events_lost_total",
    (),
    "Events lost to subscribers that read too slowly; each is told how many.",
)
REQUESTS_DELETED = _define(_S, "counter", "requests_deleted_total", (), "Requests removed for good, by DeleteRequest.")
BUILD_INFO = _define(_S, "info", "build_info", ("version",), "Always 1: the monitor's version.")

_S = "The store"
STORE_UP = _define(
    _S,
    "gauge",
    "store_up",
    (),
    "1 if it can be written, 0 while it cannot: findings and traces then stay in memory, and it is tried again.",
)
STORE_BYTES = _define(_S, "gauge", "store_bytes", (), "Bytes in use in its file, looked up once a minute.")
STORE_LIMIT = _define(_S, "gauge", "store_limit_bytes", (), "How many may be, setting `store_bytes`.")
STORE_QUEUE = _define(_S, "gauge", "store_queue_records", ("record",), "What waits to be written: `event`, `trace`.")
STORE_WRITTEN = _define(
    _S,
    "counter",
    "store_written_total",
    ("record",),
    "What was written; a trace at its start, at its findings and at its end.",
)
STORE_LOST = _define(
    _S,
    "counter",
    "store_lost_total",
    ("record", "reason"),
    "What found no room in that queue and was never written, by what kept the store from being written: `disk_full`, "
    "`read_only`, `cannot_open`, `busy`, `io_error`, `corrupt`, `refused` (the file is not ours, or of a newer "
    "version), `error` (a fault of the monitor; its log has it), or `queue_full` (it is too slow).",
)
STORE_REMOVED = _define(
    _S,
    "counter",
    "store_removed_total",
    ("record", "reason"),
    "What was removed: `age` (`store_days`), `size` (`store_bytes`), `deleted` (DeleteRequest).",
)
STORE_SET_ASIDE = _define(
    _S, "counter", "store_set_aside_total", (), "Damaged files that were set aside and replaced by a new one."
)
STORE_COMMITS = _define(
    _S,
    "histogram",
    "store_commit_seconds",
    (),
    "Its commits, each of what arrived in 50 ms; a finding is sent to subscribers after its commit.",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
)

_S = "The fleet's stream"
NATS_UP = _define(
    _S,
    "gauge",
    "nats_up",
    (),
    "1 while the monitor is connected to the broker and its messages are taken. While not, they wait in the outbox.",
)
NATS_FAILURES = _define(
    _S,
    "counter",
    "nats_failures_total",
    ("reason",),
    "What went wrong with the broker; reasons as of `stream_monitor_fleet_failures_total`.",
)
NATS_SENT = _define(
    _S,
    "counter",
    "nats_sent_total",
    ("record",),
    "Messages that the broker acknowledged: `finding`, `trace` (again when something was added), `deleted`.",
)
NATS_SHORTENED = _define(
    _S,
    "counter",
    "nats_shortened_total",
    (),
    "Traces published without the matrices of single heads, as they were too large for the broker with them.",
)
NATS_OUTBOX = _define(
    _S, "gauge", "nats_outbox_records", ("record",), "What waits for the broker, counted every five seconds."
)
NATS_LOST = _define(
    _S,
    "counter",
    "nats_lost_total",
    ("record", "reason"),
    "What was not published: `too_large` for the broker; `expired`, the store let it go before the broker took it; "
    "`queue_full`, without a store; `deleted`, as it should be.",
)
