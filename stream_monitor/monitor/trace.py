"""One request's trace: its sentences, its rows, and the sentence matrix they add up to.

A row waits with its token positions until the sentence it lies in is closed; then its mass is folded to sentences, some
dozen numbers. Folded rows stay apart (not summed into their sentence), so that a row recomputed after preemption can
replace the one it repeats.
"""

import bisect
from array import array
from collections import deque
from itertools import pairwise

import numpy as np

from stream_monitor.anchors.heads import HeadShares, weights
from stream_monitor.anchors.matrix import fold, sentences_of
from stream_monitor.anchors.panel import Observation, Panel
from stream_monitor.anchors.sentences import SentenceBuilder, Span, coarsen, prompt_sentences
from stream_monitor.monitor.identity import parse
from stream_monitor.monitor.ranks import Labels, Rank
from stream_monitor.monitor.request_heads import RequestHeads, sentences_of_entries
from stream_monitor.monitor.rows import Row, discard
from stream_monitor.monitor.sentence_row import SentenceRow
from stream_monitor.monitor.text import TokenText
from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2

MAX_PENDING_ROWS = 1024
"""Rows that may wait for tokens; twice what one sentence can hold when every row is captured."""
MAX_FINDINGS = 64
"""Findings kept with a trace, newest last; the event log has the others as long as it holds them."""

_TRACE_BYTES, _SPAN_BYTES, _ROW_BYTES = 4096, 136, 560
"""Sizes of the Python objects, by tracemalloc on 64-bit CPython 3.11, for the memory bound."""


class RequestTrace:
    """State of one request; `instance` and `request_id` are its key.

    `to_store` says that it has news for the store: it is new, has a finding, or has ended; `cut`, that its engine went
    away while it ran.
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
        self.prompt_tokens = 0
        self.prompt_sentences = 0
        self.output_tokens = 0
        self.total_tokens = 0
        self.refused_reason = ""
        self.tenant = ""
        self.missing_ranks: set[str] = set()
        self.spans: list[Span] = []
        self.dropped_sentences = 0
        self.token_rows = 0
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
        self._starts = array("q")
        self._closed_ns = array("q")
        self._roles = bytearray()
        self._builder: SentenceBuilder | None = None
        self._pending: dict[int, Row] = {}
        self._kept: dict[int, tuple[Row, bytes, bytes]] = {}
        self._positions: list[int] = []
        self._newest_row = -1
        self._settled = 0
        self._prompt_split = False

    @property
    def bytes(self) -> int:
        """Memory of all of it, estimated."""
        return self._bytes + self.heads.bytes

    @property
    def missing_tokens(self) -> int:
        """Token positions that were jumped over."""
        return self._builder.missing if self._builder else 0

    def start(self, started: summary_pb2.RequestStarted) -> None:
        """The request was scheduled. The same prompt again is the same start, told by another rank or after
        preemption; another prompt is a session going on: what it replaces is cut off and discarded as `readded`."""
        if not self.joined_late and started.prompt_tokens == self.prompt_tokens:
            if started.prompt_flags and not self._prompt_split and not self._kept and self.output_tokens == 0:
                self._split_prompt(started, 0)
            self._take_prompt_text(started)
            return
        end = min(self._builder.end - 1, started.prompt_tokens) if self._builder else 0
        self._truncate(0 if self.joined_late and self._kept else max(0, end))
        self._split_prompt(started, len(self.spans))
        self._builder = SentenceBuilder(started.prompt_tokens)
        self._take_prompt_text(started)
        self.joined_late = False
        self.prompt_tokens = started.prompt_tokens
        self.refused_reason = started.refused_reason

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
        held = self._held(row.position)
        if self.finished and row.position >= self.total_tokens:
            discard(row, "past_end")
        elif held is None:
            self._insert(row)
        elif row.attempt < held.attempt:
            discard(row, "stale")
        elif row.attempt > held.attempt:
            self._remove(row.position, "recomputed")
            self._insert(row)
        elif held.shares_source(row):
            discard(row, "repeated")
        else:
            self._join(held, row)

    def finish(self, total: int) -> None:
        """The request left with `total` tokens: rows past them are discarded, the open sentence closes."""
        if self.finished:
            return
        self.finished, self.total_tokens = True, total
        self._discard_from(total)
        if self._builder is None:
            self._begin_late(total)
        assert self._builder is not None
        for span in self._builder.finish(total):
            self._close(span)
        # What lies beyond the last sentence kept has nowhere to go.
        for position in list(self._pending):
            self._remove(position, "unplaced")

    def settle(self) -> list[int]:
        """Output sentences, in order, whose rows are all in: a later row arrived, a later sentence closed, or the
        request ended."""
        first = self._settled
        while self._settled < len(self.spans) and (
            self.finished or self._settled + 1 < len(self.spans) or self._newest_row >= self.spans[self._settled].end
        ):
            self._settled += 1
        return list(range(first, self._settled))

    def sentence_row(self, index: int) -> SentenceRow:
        """Row `index` of the sentence matrix, averaged over the heads of each row, then over the rows."""
        rows = self._rows_of(index)
        kept = [self._kept[row.position] for row in rows]
        columns = np.frombuffer(b"".join(packed for _, packed, _ in kept), np.uint32)
        mass = np.frombuffer(b"".join(packed for _, _, packed in kept), np.float32)
        heads = np.repeat(
            np.array([row.heads for row in rows], np.float32), [len(packed) // 4 for _, packed, _ in kept]
        )
        sums = np.bincount(columns, mass / heads, index + 1)
        count = len(rows)
        columns_used = np.flatnonzero(sums).astype(np.uint32)
        return SentenceRow(
            columns=columns_used,
            shares=sums[columns_used] / max(1, count),
            unobserved=sum(row.unobserved / row.heads for row in rows) / count if count else float("nan"),
            rows=count,
            sink=sum(row.sink / row.heads for row in rows) / max(1, count),
            lags=np.array([row.lag for row in rows], np.int64),
            lag_shares=np.array([row.lag_mass / row.heads for row in rows]),
        )

    def closed_ns(self, index: int) -> int:
        """When the step ran that closed sentence `index`: Unix time in nanoseconds, by the engine host's clock."""
        return self._closed_ns[index]

    def _rows_of(self, index: int) -> list[Row]:
        """Kept rows of a sentence, by position."""
        span = self.spans[index]
        low, high = (bisect.bisect_left(self._positions, edge) for edge in (span.start, span.end))
        return [row for position in self._positions[low:high] if (row := self._kept[position][0]).heads]

    def close_heads(self, index: int) -> HeadShares:
        """Join what the rows of a settled sentence say of the heads, once; the rows keep only their sums."""
        rows = self._rows_of(index)
        self._bytes -= sum(row.by_head.nbytes for row in rows if row.by_head)
        return self.heads.close(index, rows)

    def observation(self, index: int, row: SentenceRow, shares: HeadShares) -> Observation:
        """What detectors are shown of sentence `index`: its row of the matrix, and its shares by head, of which the
        profile's receiver heads count, or all alike."""
        return Observation(
            index=index,
            mass=shares.mean_over(weights(self.heads.heads, self.panel.receivers)),
            # Copies: what is lent out could not grow.
            roles=np.frombuffer(self._roles, np.uint8)[: index + 1].copy(),
            starts=np.frombuffer(self._starts, np.int64)[: index + 1].copy(),
            rows=row.rows,
            lags=row.lags,
            lag_shares=row.lag_shares,
        )

    def token_row_keys(self) -> tuple[list[int], list[int]]:
        """Positions, ascending, and attempts of the kept rows from which a token was sampled."""
        rows = [row for row, _, _ in self._kept.values()] + list(self._pending.values())
        pairs = sorted((row.position, row.attempt) for row in rows if row.token)
        return [position for position, _ in pairs], [attempt for _, attempt in pairs]

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
        self.prompt_sentences = self._settled = len(self.spans)

    def _begin_late(self, first: int) -> None:
        if first:
            self._close(Span(0, first, 0))
        self.prompt_sentences = self._settled = len(self.spans)
        self._builder = SentenceBuilder(first)

    def _held(self, position: int) -> Row | None:
        kept = self._kept.get(position)
        return kept[0] if kept else self._pending.get(position)

    def _insert(self, row: Row) -> None:
        self._newest_row = max(self._newest_row, row.position)
        if row.position < (self.spans[-1].end if self.spans else 0):
            self._fold([row])
        elif len(self.spans) >= self.max_sentences:
            discard(row, "sentence_limit")
            return
        elif self.finished or len(self._pending) >= MAX_PENDING_ROWS:
            discard(row, "unplaced")
            return
        else:
            self._pending[row.position] = row
            self._bytes += _ROW_BYTES + row.nbytes
        self.token_rows += row.token

    def _fold(self, rows: list[Row]) -> None:
        """Keep rows that lie in closed sentences; together, as each step costs as much for one as for all of them."""
        keys = np.concatenate([row.keys for row in rows])
        edges = np.cumsum([0, *(len(row.keys) for row in rows)])
        of_keys = sentences_of(keys, np.frombuffer(self._starts, np.int64))
        of_entries = sentences_of_entries(of_keys, keys)
        columns, mass, folded = fold(of_keys, np.concatenate([row.mass for row in rows]), edges)
        scored = self.spans[self._settled - 1].end if self._settled else 0
        for row, (first, end), (low, high) in zip(
            rows, pairwise(edges.tolist()), pairwise(folded.tolist()), strict=True
        ):
            if row.by_head and row.position >= scored:
                row.by_head = row.by_head._replace(places=of_entries[first:end][row.by_head.places])
            else:
                # Its sentence was scored before, or is the prompt's.
                row.by_head = None
            row.keys, row.mass = _NO_KEYS, _NO_MASS
            self._kept[row.position] = kept = (row, columns[low:high].tobytes(), mass[low:high].tobytes())
            bisect.insort(self._positions, row.position)
            self._bytes += _ROW_BYTES + row.nbytes + len(kept[1]) + len(kept[2])

    def _join(self, held: Row, row: Row) -> None:
        folded = self._kept.get(row.position)
        self._pop(row.position)
        if folded:
            # The held part is in sentences already; the first position of each stands for its mass.
            _, columns, mass = folded
            held.keys = np.frombuffer(self._starts, np.int64)[np.frombuffer(columns, np.uint32)].astype(np.uint32)
            held.mass = np.frombuffer(mass, np.float32)
            held.by_head = None
        self._insert(held.joined(row))

    def _close(self, span: Span) -> None:
        full = len(self.spans) >= self.max_sentences
        if full:
            self.dropped_sentences += 1
        else:
            self.spans.append(span)
            self._starts.append(span.start)
            self._closed_ns.append(self.last_seen_ns)
            self._roles.append(span.role)
            self._bytes += _SPAN_BYTES
        waited = [position for position in self._pending if position < span.end]
        if full:
            for position in waited:
                self._remove(position, "sentence_limit")
        elif waited:
            rows = [self._pop(position) for position in waited]
            self._fold(rows)
            self.token_rows += sum(row.token for row in rows)

    def _truncate(self, end: int) -> None:
        """Forget everything from position `end` on; the sentence that holds it is open again."""
        self._discard_from(end, "readded")
        self._drop_spans(sum(span.end <= end for span in self.spans))
        self._bytes += self.text.cut(end)
        self._newest_row = min(self._newest_row, end - 1)
        # Sentences the reference knows may be gone.
        self.panel, self.top_anchor = self.panel.fresh(), None

    def _drop_spans(self, keep: int) -> None:
        while len(self.spans) > keep:
            self.spans.pop()
            self._starts.pop()
            self._closed_ns.pop()
            self._roles.pop()
            self._bytes -= _SPAN_BYTES
        self.heads.drop_from(keep)

    def _discard_from(self, end: int, reason: str = "past_end") -> None:
        for position in self._positions[bisect.bisect_left(self._positions, end) :]:
            self._remove(position, reason)
        for position in [p for p in self._pending if p >= end]:
            self._remove(position, reason)

    def _remove(self, position: int, reason: str) -> None:
        discard(self._pop(position), reason)

    def _pop(self, position: int) -> Row:
        row = self._pending.pop(position, None)
        if row is not None:
            self._bytes -= _ROW_BYTES + row.nbytes
        else:
            row, columns, mass = self._kept.pop(position)
            del self._positions[bisect.bisect_left(self._positions, position)]
            self._bytes -= _ROW_BYTES + row.nbytes + len(columns) + len(mass)
        self.token_rows -= row.token
        return row


_NO_KEYS = np.zeros(0, np.uint32)
_NO_MASS = np.zeros(0, np.float32)
