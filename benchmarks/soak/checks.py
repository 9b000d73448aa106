"""Whose rows they are: each trace is held against what its prompt gave when it was served alone."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from stream_monitor.v1alpha1 import monitor_pb2

WRONG = 0.25
"""Total variation between two sentences' attention above which they are not the same. Rows of two prompts are 0.6 and
more apart; those of one prompt in two batches differ by rounding alone."""
LEAST = 0.05
"""Share of a sentence's attention, the sink's left out, below which a difference is not taken for more than it is."""
UNKNOWN = "\ufffd"


Rows = dict[int, "_Row"]
"""Of the sentence matrix, by the sentence's number; of sentences of the output alone."""


@dataclass(frozen=True)
class Reference:
    """A prompt served alone: its sampled tokens, and its trace at each of the times when rows are captured.

    Requests are sampled in the same engine steps, every so many, and so at positions that depend on the step in which
    the first token was: one alone may have had its rows captured between those of another.
    """

    tokens: list[int]
    traces: list[monitor_pb2.GetTraceResponse]

    @cached_property
    def rows(self) -> list[Rows]:
        """Of each trace."""
        return [rows_of(trace) for trace in self.traces]

    def of_as_many(self, index: int, count: int) -> list["_Row"]:
        """What a sentence reads by each trace that has so many rows of it."""
        return [rows[index] for rows in self.rows if index in rows and rows[index].count == count]


@dataclass
class Comparison:
    """What was held against references, and how far it was off.

    Attributes:
        distances: of each sentence of the output that could be compared, to the same one of its prompt alone.
        apart: the same where none alone has its rows at the same positions, as after a preemption.
        others: of both, to another prompt's, as far as both are long enough: what a wrong attribution looks like.
        texts: outputs whose text was compared. wrong_texts: those that are not what the engine answered.
    """

    distances: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    texts: int = 0
    wrong_texts: int = 0

    @property
    def wrong(self) -> int:
        """Sentences with another's attention, and outputs with another's text."""
        return sum(not distance <= WRONG for distance in self.distances + self.apart) + self.wrong_texts

    def hold(
        self,
        trace: monitor_pb2.GetTraceResponse,
        tokens: list[int],
        own: Reference,
        other: Reference,
        text: str,
    ) -> None:
        """Compare a request's trace.

        Args:
            trace: what the monitor has of it.
            tokens: what the engine sampled.
            own, other: of its prompt, and of another.
            text: of its sampled tokens.
        """
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, own.tokens, strict=False)))
        alone = own.traces[0]
        end = alone.info.prompt_tokens + known
        mine, (foreign, *_) = rows_of(trace), other.rows
        # Where the monitor did not see the request begin, its sentences are other ones, up to the last known.
        alike = takewhile(
            lambda pair: _span(pair[0]) == _span(pair[1]), zip(trace.sentences, alone.sentences, strict=False)
        )
        for sentence, _ in alike:
            row = mine.get(sentence.index)
            wanted = own.of_as_many(sentence.index, row.count) if row else []
            if row and wanted and sentence.end_token <= end:
                same = [each for each in wanted if each.positions == row.positions]
                found = self.distances if same else self.apart
                found.append(_variation(row.shares, (same or wanted)[0].shares))
                for each in list(foreign.values())[:1]:
                    self.others.append(_variation(row.shares, each.shares))
        whole = not trace.info.joined_late and trace.info.output_tokens == len(tokens)
        if whole and trace.info.state == monitor_pb2.REQUEST_STATE_FINISHED:
            prompt = trace.info.prompt_tokens
            said = "".join(each.text for each in trace.sentences if each.first_token >= prompt)
            self.texts += 1
            self.wrong_texts += said.strip(UNKNOWN) != text.strip(UNKNOWN)


@dataclass(frozen=True)
class _Row:
    """What a sentence reads, float64 [sentences]; how many rows say so, and where those stand from which a token was
    sampled."""

    shares: NDArray[np.float64]
    count: int
    positions: tuple[int, ...]


def _span(sentence: monitor_pb2.Sentence) -> tuple[int, int]:
    return sentence.first_token, sentence.end_token


def rows_of(trace: monitor_pb2.GetTraceResponse) -> Rows:
    """What each sentence of the output reads of which a row was captured."""
    size = len(trace.sentences)
    rows, columns = (np.frombuffer(raw, "<u4") for raw in (trace.matrix_row, trace.matrix_column))
    shares = np.frombuffer(trace.matrix_share, "<f4")
    counts, positions = (np.frombuffer(raw, "<u4") for raw in (trace.captured_rows, trace.row_positions))
    found = {}
    for index, sentence in enumerate(trace.sentences):
        first, end = _span(sentence)
        if first < trace.info.prompt_tokens or not counts[index]:
            continue
        dense = np.zeros(size)
        dense[columns[rows == index]] = shares[rows == index]
        inside = positions[(positions >= first) & (positions < end)]
        found[index] = _Row(dense, int(counts[index]), tuple(inside.tolist()))
    return found


def _variation(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """Half the sum of the differences, the first sentence left out: most of it is the attention sink of any prompt."""
    size = max(len(one), len(two))
    padded = [np.pad(each, (0, size - len(each)))[1:] for each in (one, two)]
    return float(0.5 * np.abs(padded[0] - padded[1]).sum() / max(padded[0].sum(), padded[1].sum(), LEAST))
