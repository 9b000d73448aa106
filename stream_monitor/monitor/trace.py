"""One request's trace: its sentences, its rows, and the sentence matrix they add up to."""

import math
from array import array
from collections import deque

import numpy as np
from numpy.typing import NDArray

from stream_monitor.anchors.heads import HeadShares
from stream_monitor.anchors.matrix import SentenceStarts
from stream_monitor.anchors.panel import Observation, Panel
from stream_monitor.anchors.sentences import SentenceBuilder, Span, coarsen, prompt_sentences
from stream_monitor.anchors.shift_probe import log_reading
from stream_monitor.anchors.untrusted_probe import log_shares
from stream_monitor.monitor.folding import Fold, Unfolded
from stream_monitor.monitor.identity import parse
from stream_monitor.monitor.ranks import Labels, Rank
from stream_monitor.monitor.request_heads import RequestHeads
from stream_monitor.monitor.rows import Row, discard
from stream_monitor.monitor.sentence_matrix import Captured, SentenceMatrix
from stream_monitor.monitor.text import TokenText
from stream_monitor.monitor.trace_rows import TraceRows
from stream_monitor.records import Role
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2

MAX_PENDING_ROWS = 1024
"""Rows that may wait for tokens; twice what one sentence can hold when every row is captured."""
MAX_FINDINGS = 64
"""Findings kept with a trace, newest last; the event log has the others as long as it holds them."""

_TRACE_BYTES, _SPAN_BYTES = 6144, 136
"""Sizes of the Python objects, by tracemalloc on 64-bit CPython 3.11, for the memory bound."""


class RequestTrace:
    """State of one request; `instance` and `request_id` are its key.

    `started_by` are the ranks that told of its start. `to_store` says that it has news for the store: it is new,
    has a finding, or has ended; `stored`, that the store has something of it; `cut`, that its engine went away
    while it ran.
    """

    def __init__(
        self, instance: str, request_id: str, labels: Labels, serial: int, now_ns: int, max_sentences: int
    ) -> None:
        self.instance = instance
        self.request_id = request_id
        self.identity = parse(request_id)
        self.labels = labels
        self.serial = serial
        self.first_seen_ns = self.last_seen_ns = now_ns
        self.max_sentences = max_sentences
        self.joined_late = True
        self.finished = False
        self.cut = False
        self.to_store = True
        self.stored = False
        self.prompt_tokens = 0
        self.prompt_sentences = 0
        self.output_tokens = 0
        self.total_tokens = 0
        self.refused_reason = ""
        self.tenant = ""
        self.missing_ranks: set[str] = set()
        self.spans: list[Span] = []
        self.dropped_sentences = 0
        self.findings: deque[monitor_pb2.Event] = deque(maxlen=MAX_FINDINGS)
        self.finding_count = 0
        self.panel = Panel()
        self.model_name = ""
        self.text = TokenText()
        self.capture = ""
        self.top_anchor: tuple[int, float] | None = None
        self.heads = RequestHeads()
        self._bytes = _TRACE_BYTES
        self.token_source: Rank | None = None
        self.started_by: tuple[Rank, ...] = ()
        self._starts = SentenceStarts()
        self.rows = TraceRows(self._starts, self.heads)
        self._closed_ns = array("q")
        self._roles = bytearray()
        self._builder: SentenceBuilder | None = None
        self._settled = 0
        self._opening = -1
        self._late = False
        self._prompt_split = False

    @property
    def bytes(self) -> int:
        """Memory of all of it, estimated."""
        return self._bytes + self.heads.bytes + self.rows.bytes + self._starts.nbytes

    @property
    def token_rows(self) -> int:
        """Kept rows from which a token was sampled."""
        return self.rows.token_rows

    @property
    def missing_tokens(self) -> int:
        """Token positions that were jumped over."""
        return self._builder.missing if self._builder else 0

    def start(self, started: summary_pb2.RequestStarted) -> None:
        """The request was scheduled. The same prompt again is the same start, told by another rank or after
        preemption; another prompt is a session going on: what it replaces is cut off and discarded as `readded`."""
        if not self.joined_late and started.prompt_tokens == self.prompt_tokens:
            if started.prompt_flags and not self._prompt_split and self.output_tokens == 0:
                # Rows that are folded already into a prompt of one sentence know no other.
                self.rows.remove_from(0, "readded")
                self._split_prompt(started, 0)
            self._take_prompt_text(started)
            return
        end = min(self._builder.end - 1, started.prompt_tokens) if self._builder else 0
        self._truncate(0 if self.joined_late and self.rows else max(0, end))
        self._split_prompt(started, len(self.spans))
        self._builder = SentenceBuilder(started.prompt_tokens)
        self._take_prompt_text(started)
        self.joined_late = False
        self.prompt_tokens = started.prompt_tokens
        self.refused_reason = started.refused_reason

    def ended_without(self, rank: Rank, started: summary_pb2.RequestStarted) -> bool:
        """Whether this start is of a rank that lags so far behind that the request has ended meanwhile; otherwise that
        of a finished request says that its id is used again."""
        late = self.finished and started.prompt_tokens == self.prompt_tokens and rank not in self.started_by
        if late:
            self.told_of_start(rank)
        return late

    def told_of_start(self, rank: Rank) -> None:
        """Note which rank told of the start; see `ended_without`."""
        if rank not in self.started_by:
            self.started_by += (rank,)

    def add_tokens(self, run: summary_pb2.TokenRun) -> None:
        """Sampled tokens; close the sentences they end."""
        if self.finished:
            return
        if self._builder is None:
            self._begin_late(run.first_position)
        assert self._builder is not None
        before = self._builder.end
        if len(self.spans) < self.max_sentences:
            self._bytes += self.text.put(run.first_position, run.token_ids, run.flags)
        for span in self._builder.extend(run.first_position, run.flags):
            self._close(span)
        self.output_tokens += min(len(run.flags), self._builder.end - before)

    def add_row(self, row: Row) -> None:
        """Keep a row, or discard it or the one it repeats."""
        held = self.rows.held(row.position)
        if self.finished and row.position >= self.total_tokens:
            discard(row, "past_end")
        elif held is None:
            self._insert(row)
        elif row.attempt < held.attempt:
            discard(row, "stale")
        elif row.attempt > held.attempt:
            self.rows.remove(row.position, "recomputed")
            self._insert(row)
        elif held.shares_source(row):
            discard(row, "repeated")
        else:
            self._insert(self.rows.pop(row.position).joined(row))

    def finish(self, total: int) -> None:
        """The request left with `total` tokens: rows past them are discarded, the open sentence closes."""
        if self.finished:
            return
        self.finished, self.total_tokens = True, total
        self.rows.remove_from(total, "past_end")
        # What was folded together with those waits to be folded anew.
        self._late = self._settled > 0
        if self._builder is None:
            self._begin_late(total)
        assert self._builder is not None
        for span in self._builder.finish(total):
            self._close(span)
        # What lies beyond the last sentence kept has nowhere to go.
        self.rows.remove_waiting(self._closed_end, None, "unplaced")
        self._starts.release()

    def settle(self) -> list[int]:
        """What is to be scored, in order: sentences of the output whose rows are all in, as a later row arrived, a
        later sentence closed, or the request ended; and before the first the opening, by the prompt's last sentence."""
        if self._late:
            # All rows of a message at once: it may bring many of a prompt.
            self.rows.fold_late(self.spans[self._settled - 1].end, self._opening)
            self._late = False
        opening, first = self._settle_opening(), self._settled
        while self._settled < len(self.spans) and (
            self.finished or self._settled + 1 < len(self.spans) or self.rows.newest >= self.spans[self._settled].end
        ):
            self._settled += 1
        return [*opening, *range(first, self._settled)]

    def matrix(self) -> SentenceMatrix:
        """The sentence matrix."""
        return self.rows.matrix(self.spans)

    def unfolded(self, index: int) -> Unfolded:
        """The rows of a settled sentence, to be folded, once."""
        return self.rows.unfolded(self.spans[index], self.panel.receivers)

    def closed_ns(self, index: int) -> int:
        """When the step ran that closed sentence `index`: Unix time in nanoseconds, by the engine host's clock."""
        return self._closed_ns[index]

    def observation(self, index: int, captured: Captured, fold: Fold) -> Observation:
        """What detectors are shown of sentence `index`: of all its rows, and what they said when folded. Of the
        prompt's last sentence, that is the opening alone."""
        opening = index < self.prompt_sentences
        # A copy: what is lent out could not grow.
        roles = np.frombuffer(self._roles, np.uint8)[: index + 1].copy()
        return Observation(
            prompt=self.prompt_sentences,
            index=index,
            mass=fold.mass,
            roles=roles,
            starts=self._starts.positions[: index + 1],
            rows=fold.telling if opening else captured.rows,
            lags=captured.lags,
            lag_mass=captured.lag_mass,
            log_odds=self._log_odds(fold.shares, roles, index if opening else -1),
            reading=self._reading(index, fold.shares),
            opening=opening,
        )

    def _log_odds(self, shares: HeadShares, roles: NDArray[np.uint8], but: int) -> float | None:
        """By the profile's probe, if there is one and anything is untrusted; see `untrusted_probe.log_shares`."""
        probe = self.panel.probe
        if probe is None or Role.UNTRUSTED not in self._roles:
            return None
        return float(self.heads.probed(probe) @ log_shares(shares, roles, len(self.heads.heads), but)) + probe.bias

    def _reading(self, index: int, shares: HeadShares) -> float:
        """By the profile's probe of ANCHOR_SHIFT; NaN without one."""
        probe = self.panel.shift_probe
        if probe is None:
            return math.nan
        shown = log_reading(index, shares, len(self.heads.heads))
        return float(self.heads.probed(probe) @ shown)

    def _take_prompt_text(self, started: summary_pb2.RequestStarted) -> None:
        self._bytes += self.text.put(0, started.prompt_token_ids, started.prompt_flags)

    def _split_prompt(self, started: summary_pb2.RequestStarted, keep: int) -> None:
        """Sentences of the prompt, from the end of the first `keep` sentences held."""
        self._drop_spans(keep)
        begin = self.spans[-1].end if self.spans else 0
        spans = prompt_sentences(
            started.prompt_tokens,
            np.frombuffer(started.role_starts, "<u4"),
            np.frombuffer(started.roles, np.uint8),
            started.prompt_flags,
        )
        fresh = [Span(max(begin, span.start), span.end, span.role) for span in spans if span.end > begin]
        # Half of the sentences stay free for the output, however long the prompt is.
        for span in coarsen(fresh, max(1, self.max_sentences // 2 - len(self.spans))):
            self._close(span)
        self._prompt_split = bool(started.prompt_flags)
        self._opening = started.prompt_tokens - 1 if Role.UNTRUSTED in self._roles else -1
        self._settle_all()

    def _begin_late(self, first: int) -> None:
        if first:
            self._close(Span(0, first, 0))
        self._settle_all()
        self._builder = SentenceBuilder(first)

    def _settle_all(self) -> None:
        """What there is of sentences is the prompt's, which are not scored."""
        self.prompt_sentences = self._settled = len(self.spans)
        self.rows.fold_late(self._closed_end, self._opening)

    def _settle_opening(self) -> list[int]:
        """The prompt's last sentence, once: when the row of its last token, from which the first of the output is
        sampled, is all in. Where nothing is untrusted it has nothing to say."""
        if self._opening < 0 or not (
            self.rows.newest > self._opening or self.finished or len(self.spans) > self.prompt_sentences
        ):
            return []
        sampled = self.output_tokens > 0 or self.rows.held(self._opening) is not None
        self._opening = -1
        return [self.prompt_sentences - 1] if sampled else []

    @property
    def _closed_end(self) -> int:
        """End of the last sentence."""
        return self.spans[-1].end if self.spans else 0

    def _insert(self, row: Row) -> None:
        self.rows.newest = max(self.rows.newest, row.position)
        end = self._closed_end
        if row.position >= end:
            if len(self.spans) >= self.max_sentences:
                discard(row, "sentence_limit")
                return
            if self.finished or (
                self.rows.waiting() >= MAX_PENDING_ROWS and self.rows.waiting_from(end) >= MAX_PENDING_ROWS
            ):
                discard(row, "unplaced")
                return
        self.rows.add(row)
        if row.position == self._opening:
            # The prompt's last sentence is over when the row of its last token is taken.
            self._closed_ns[self.prompt_sentences - 1] = self.last_seen_ns
        elif self._settled and row.position < self.spans[self._settled - 1].end:
            self._late = True

    def _close(self, span: Span) -> None:
        if len(self.spans) >= self.max_sentences:
            self.dropped_sentences += 1
            self.rows.remove_waiting(self._closed_end, span.end, "sentence_limit")
            return
        self.spans.append(span)
        self._starts.append(span.start, span.end)
        self._closed_ns.append(self.last_seen_ns)
        self._roles.append(span.role)
        self._bytes += _SPAN_BYTES

    def _truncate(self, end: int) -> None:
        """Forget everything from position `end` on; the sentence that holds it is open again."""
        self.rows.remove_from(end, "readded")
        self._drop_spans(sum(span.end <= end for span in self.spans))
        self._bytes += self.text.cut(end)
        self.rows.newest = min(self.rows.newest, end - 1)
        # Sentences the reference knows may be gone.
        self.panel, self.top_anchor = self.panel.fresh(), None

    def _drop_spans(self, keep: int) -> None:
        self.rows.unfold_from(keep)
        self._starts.cut(keep)
        while len(self.spans) > keep:
            self.spans.pop()
            self._closed_ns.pop()
            self._roles.pop()
            self._bytes -= _SPAN_BYTES
        self.heads.drop_from(keep)
