"""Sentence ends that no single token shows: full stops whose bytes are spread over tokens; and none in display math.

A table of flags knows a token by itself. A byte-level vocabulary may cut `。` or `？` in two, and a full stop inside
`$$ ... $$` or `\\[ ... \\]` belongs to a formula. So tokens that may have part in such marks are known by their bytes,
and a request remembers what it has begun. A blank line ends display math, as it does in TeX: two dollar signs that are
none of its marks hide no more than the rest of a paragraph.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stream_monitor.engine.vocabulary import CJK_STOPS, text_flags
from stream_monitor.records import TokenFlag
from stream_monitor.token_bytes import BYTE_TOKEN, byte_level

_STOPS = "|".join(CJK_STOPS).encode()
_BLANK_LINE = rb"\n[ \t\r]*\n"
# A backslash before a backslash or a dollar sign makes it another mark: `\\[2pt]` is a line's end in a formula.
_MARKS = re.compile(rb"\\[\\$]|\\[\[\]]|\$\$|" + _BLANK_LINE + b"|" + _STOPS)
_TELLING = re.compile(rb"\\|\$\$|\A[$\[\]]|\$\Z|" + _BLANK_LINE)
_BEGUN = re.compile(rb"(?:\\|\$|[\xe0-\xef][\x80-\xbf]?)\Z")
"""What the next token may make a mark of: all full stops here are three bytes long."""
_ENDED = re.compile(rb"(?:[.?!]|" + _STOPS + rb")\Z")

_SENTENCE_END = int(TokenFlag.ENDS_TERMINATOR | TokenFlag.BREAKS_INSIDE)
_TURN = int(TokenFlag.SPECIAL | TokenFlag.OPENS_REASONING | TokenFlag.CLOSES_REASONING)
_WHITE = int(TokenFlag.BEGINS_SPACE | TokenFlag.ENDS_NEWLINE)
_ENDS_NEWLINE, _BEGINS_NEWLINE = int(TokenFlag.ENDS_NEWLINE), int(TokenFlag.BEGINS_NEWLINE)


@dataclass(slots=True)
class Reading:
    """What the tokens of a request have begun.

    Attributes:
        math: whether display math is open.
        ended: whether a full stop is the last that was read in it.
        begun: bytes that the next token may make a mark of.
        begins_line: whether those, or the newest token, begin a line.
        due: whether a sentence ends with the line.
        last: flags of the newest token, by the table.
    """

    math: bool = False
    ended: bool = False
    begun: bytes = b""
    begins_line: bool = False
    due: bool = False
    last: int = 0

    @property
    def open(self) -> bool:
        """Whether the next token means something by what was read."""
        return self.math or self.due or bool(self.begun)


class Marks:
    """See the module.

    Args:
        pieces: token id to the bytes of each token that may have part in a mark.
    """

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self._pieces = pieces

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Marks":
        """Of a Hugging Face tokenizer; without any where it does not say what its tokens are made of."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return cls({})
        decoder = json.loads(backend.to_str())["decoder"] or {}
        added = set(backend.get_added_tokens_decoder())
        pieces = {}
        for name, token in backend.get_vocab(with_added_tokens=False).items():
            if token in added:
                continue
            if decoder.get("type") == "ByteLevel":
                piece = byte_level(name)
            elif byte := BYTE_TOKEN.fullmatch(name):
                piece = bytes.fromhex(byte[1])
            else:
                piece = name.replace("▁", " ").encode()
            if _TELLING.search(piece) or not _is_text(piece):
                pieces[token] = piece
        return cls(pieces)

    def revise(self, reading: Reading, tokens: Sequence[int], flags: bytes) -> bytes:
        """The flags of these tokens, one byte each, that came after what `reading` has read."""
        if not reading.open and self._pieces.keys().isdisjoint(tokens):
            reading.last = flags[-1] if flags else reading.last
            return flags
        places = [at for at, token in enumerate(tokens) if token in self._pieces]
        revised, at = bytearray(flags), 0
        while at < len(flags):
            if not reading.open:
                # On to the next token that may begin something.
                place = bisect_left(places, at)
                at = places[place] if place < len(places) else len(flags)
                reading.last = flags[at - 1] if at else reading.last
                if at == len(flags):
                    break
            revised[at] = self._read(reading, tokens[at], flags[at])
            at += 1
        return bytes(revised)

    def _read(self, reading: Reading, token: int, flag: int) -> int:
        before, reading.last = reading.last, flag
        if not reading.begun:
            reading.begins_line = bool(before & _ENDS_NEWLINE)
        if reading.due:
            reading.due = False
            if flag & _BEGINS_NEWLINE and flag & _ENDS_NEWLINE:
                return flag | TokenFlag.BREAKS_INSIDE
        if flag & _TURN or (before & _ENDS_NEWLINE and flag & _BEGINS_NEWLINE):
            reading.math = False
        piece = self._pieces.get(token)
        if piece is not None and not flag & _TURN:
            return self._read_piece(reading, piece, flag)
        reading.begun = b""
        if not reading.math:
            return flag
        reading.ended = bool(flag & _SENTENCE_END) or (reading.ended and flag & _WHITE == _WHITE)
        return flag & ~_SENTENCE_END

    def _read_piece(self, reading: Reading, piece: bytes, flag: int) -> int:
        joined, known, hidden = reading.begun + piece, len(reading.begun), reading.math
        after = end = 0
        for mark in _MARKS.finditer(joined):
            found, end = mark[0], mark.end()
            if found == b"\\[" or (found == b"$$" and not reading.math):
                reading.math, reading.ended, after = True, False, mark.end()
            elif reading.math and (found in (b"\\]", b"$$") or found[:1] == b"\n"):
                said = joined[after : mark.start()].strip()
                ended = bool(_ENDED.search(said)) if said else reading.ended
                after = mark.start() if found[:1] == b"\n" else mark.end()
                rest = joined[after:]
                # A formula that ends with a full stop ends its sentence behind its own mark. Where that has a line for
                # itself it ends with the line: what begins a line and is so short would go to the next sentence.
                reading.due = ended and reading.begins_line and not rest
                stop = "." if ended and not reading.due else ""
                flag = flag & ~_SENTENCE_END | text_flags(stop + rest.decode(errors="replace")) & _SENTENCE_END
                reading.math = hidden = False
            elif not reading.math and mark.start() < known and found[0] >= 0x80:
                flag |= TokenFlag.BREAKS_INSIDE
                if mark.end() == len(joined):
                    flag |= TokenFlag.ENDS_TERMINATOR
        begun = _BEGUN.search(joined[end:])
        reading.begun = begun[0] if begun else b""
        if reading.math and (said := joined[after : len(joined) - len(reading.begun)].strip()):
            reading.ended = bool(_ENDED.search(said))
        return flag & ~_SENTENCE_END if hidden else flag


def _is_text(piece: bytes) -> bool:
    """Whether these bytes are whole characters."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
