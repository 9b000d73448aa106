"""Cuts a request's tokens into sentences, from one byte of boundary flags per token, as the tokens arrive.

Source of the rule: thought-anchors cuts after `.`, `?`, `!` followed by white space and at blank lines, and merges very
short pieces into the next. Text never gets here, so a piece is short by its tokens (`MIN_TOKENS`), not its characters.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_monitor.records import Role, TokenFlag

MIN_TOKENS = 4
"""A shorter piece merges into the next; about the 10 characters of thought-anchors."""
MAX_TOKENS = 512
"""A longer piece (code, a table, a loop without full stops) is cut, so that what waits for its end stays bounded."""

_ENDS_NEWLINE = int(TokenFlag.ENDS_NEWLINE)
"""A plain number: operations on members of an enumeration take ten times as long."""
_REASONING = TokenFlag.OPENS_REASONING | TokenFlag.CLOSES_REASONING
_WHITE = TokenFlag.BEGINS_SPACE | TokenFlag.BEGINS_NEWLINE


class Span(NamedTuple):
    """Token positions [start, end) and their `summary.proto` Role (0 where unknown)."""

    start: int
    end: int
    role: int


class SentenceBuilder:
    """Closes sentences of the output while it is sampled.

    A sentence closes before a token that begins with white space after a terminator, before the second newline of a
    blank line, after a token with a break inside, and at reasoning tags. What is sampled counts as reasoning until a
    closing tag, then as the answer; without tags everything is reasoning. The number of a list's item ends with a full
    stop too, but stays with its item: what is shorter than MIN_TOKENS and begins a line is cut off before that line.

    Parameters
    ----------
    start
        Position of the first token.
    role
        Role of what comes first.

    Examples
    --------
    >>> builder = SentenceBuilder(start=100)
    >>> builder.extend(100, bytes([0, 2, 2, 2, 1]))  # "So it must be seven."
    []
    >>> builder.extend(105, bytes([2]))  # " Wait": the space after the full stop closes the sentence
    [Span(start=100, end=105, role=4)]
    >>> builder.finish(106)
    [Span(start=105, end=106, role=4)]
    """

    def __init__(self, start: int, role: int = Role.REASONING) -> None:
        self.start = start
        self.end = start
        self.role = role
        self.missing = 0
        self._newest = b"\0"

    def extend(self, first: int, flags: bytes) -> list[Span]:
        """Take in tokens at positions first, first + 1, ...; return the sentences they closed.

        Tokens seen before are skipped. Positions that were jumped over are counted in `missing` and stay in the open
        sentence, as no boundary inside them is known; a jump longer than MAX_TOKENS ends it.
        """
        flags = flags[max(0, self.end - first) :]
        if not flags:
            return []
        first = max(first, self.end)
        closed: list[Span] = []
        if gap := first - self.end:
            self.missing += gap
            self.end, self._newest = first, b"\0"
            if gap > MAX_TOKENS:
                closed.append(self._close(first))
        for index, tag in _cuts(self._newest[-1], flags):
            position = first + index
            self._cut_long(position, closed)
            short = 0 if tag else _begun_line(self._newest + flags[:index])
            if position - short > self.start and (tag or position - short - self.start >= MIN_TOKENS):
                closed.append(self._close(position - short))
            if tag:
                self.role = Role.REASONING if flags[index] & TokenFlag.OPENS_REASONING else Role.ANSWER
        self.end, self._newest = first + len(flags), (self._newest + flags)[-MIN_TOKENS:]
        self._cut_long(self.end, closed)
        return closed

    def finish(self, total: int) -> list[Span]:
        """Close what is open at the end of a request of `total` tokens, those not seen included."""
        self.end = max(self.end, total)
        return [self._close(self.end)] if self.end > self.start else []

    def _cut_long(self, position: int, closed: list[Span]) -> None:
        while position - self.start > MAX_TOKENS:
            closed.append(self._close(self.start + MAX_TOKENS))

    def _close(self, end: int) -> Span:
        span = Span(self.start, end, int(self.role))
        self.start = end
        return span


def prompt_sentences(
    tokens: int, role_starts: NDArray[np.uint32], roles: NDArray[np.uint8], flags: bytes
) -> list[Span]:
    """Sentences of a prompt; none crosses a role span.

    Args:
        tokens: length of the prompt.
        role_starts: uint32 [n], first position of each role span, ascending from 0; empty if the roles are not known.
        roles: uint8 [n].
        flags: one byte of boundary flags a token; reasoning tags in a prompt belong to earlier turns and do not cut.
    """
    starts = [int(s) for s in role_starts] or [0]
    kinds = [int(r) for r in roles] or [0]
    plain = (np.frombuffer(flags, np.uint8) & ~np.uint8(_REASONING)).tobytes()
    spans: list[Span] = []
    for start, end, role in zip(starts, [*starts[1:], tokens], kinds, strict=True):
        builder = SentenceBuilder(start, role)
        spans += builder.extend(start, plain[start:end])
        spans += builder.finish(end)
    return spans


def coarsen(spans: list[Span], limit: int) -> list[Span]:
    """Join neighbours until at most `limit` are left: a very long prompt in fewer, longer pieces. Those of one role, as
    far as that suffices; of several, what is untrusted stays so, and then what is the user's.

    >>> coarsen([Span(0, 4, 2), Span(4, 9, 2), Span(9, 12, 1)], 2)
    [Span(start=0, end=9, role=2), Span(start=9, end=12, role=1)]
    >>> coarsen([Span(0, 4, 2), Span(4, 9, 1), Span(9, 12, 2)], 2)
    [Span(start=0, end=9, role=2), Span(start=9, end=12, role=2)]
    """
    alike = _coarsen_alike(spans, limit)
    if len(alike) <= limit:
        return alike
    stride = -(-len(alike) // limit)
    parts = (alike[first : first + stride] for first in range(0, len(alike), stride))
    return [Span(part[0].start, part[-1].end, _role_of(part)) for part in parts]


def _role_of(spans: list[Span]) -> int:
    roles = [span.role for span in spans]
    return next((int(role) for role in (Role.UNTRUSTED, Role.USER) if role in roles), roles[0])


def _coarsen_alike(spans: list[Span], limit: int) -> list[Span]:
    """Join neighbours of one role; more than `limit` are left where roles alternate."""
    if len(spans) <= limit:
        return spans
    stride = -(-len(spans) // limit)
    joined: list[Span] = []
    members = 0
    for span in spans:
        if joined and joined[-1].role == span.role and members < stride:
            joined[-1] = Span(joined[-1].start, span.end, span.role)
            members += 1
        else:
            joined.append(span)
            members = 1
    return joined


def _begun_line(before: bytes) -> int:
    """Tokens at the end of these that begin a line and are fewer than MIN_TOKENS; 0 where a line has more."""
    for count, token in enumerate(reversed(before[-MIN_TOKENS:])):
        if token & _ENDS_NEWLINE:
            return count
    return 0


def _boundaries(before: NDArray[np.uint8], token: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a sentence may end before `token`, `before` being the token ahead of each. uint8 [n] -> bool [n]."""
    spaced: NDArray[np.bool_] = (before & TokenFlag.ENDS_TERMINATOR != 0) & (token & _WHITE != 0)
    blank_line: NDArray[np.bool_] = (before & TokenFlag.ENDS_NEWLINE != 0) & (token & TokenFlag.BEGINS_NEWLINE != 0)
    inside: NDArray[np.bool_] = before & TokenFlag.BREAKS_INSIDE != 0
    return spaced | blank_line | inside


def _cut_table() -> bytes:
    """For each pair of neighbours, 256 * before + token: 1 where a sentence may end between them, 2 at a tag."""
    before, token = (axis.ravel() for axis in np.indices((256, 256)).astype(np.uint8))
    tags = ((before & TokenFlag.CLOSES_REASONING) | (token & TokenFlag.OPENS_REASONING)) != 0
    return np.where(tags, 2, _boundaries(before, token)).astype(np.uint8).tobytes()


_CUTS = _cut_table()
"""Looked up token by token: runs are of one or a few tokens, for which arrays take longer to make than to use."""


def _cuts(last: int, flags: bytes) -> list[tuple[int, bool]]:
    """Offsets of the tokens before which a sentence may end, and whether that is for a tag; `last` is ahead of all."""
    found = []
    for index, token in enumerate(flags):
        if kind := _CUTS[last << 8 | token]:
            found.append((index, kind == 2))
        last = token
    return found
