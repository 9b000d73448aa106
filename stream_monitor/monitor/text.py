"""Sentence text from token ids, where an engine lets them leave (`send_token_ids`) and the monitor has the tokenizer.

A token stands for bytes, not for characters: byte-level vocabularies cut rare characters into several tokens, and a
sentence may end between them. So the bytes of the tokens are joined, and a character belongs to the sentence in which
it begins. Special tokens are part of the text, as the tokenizer writes them.
"""

import json
from array import array
from bisect import bisect_right
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_monitor.records import TokenFlag
from stream_monitor.token_bytes import BYTE_TOKEN, byte_level

UNKNOWN = "\ufffd".encode()
"""Stands for positions and ids that nothing is known of."""
NOT_SENT, NO_TOKENIZER, MISMATCH = "not_sent", "no_tokenizer", "tokenizer_mismatch"

_CHECKED_TOKENS = 256
"""Of a prompt or run of tokens: whether the tokenizer is the engine's shows within a few."""
_MISFITS = 0.05
"""Part of them that may disagree before the tokenizer is taken for another model's: at random, about half would."""
_RUN_BYTES = 120
"""Of the Python objects of a run of tokens."""
_COMPARED = TokenFlag.BEGINS_SPACE | TokenFlag.ENDS_NEWLINE | TokenFlag.BEGINS_NEWLINE


class TextError(ValueError):
    """The setting `tokenizers` cannot be used. One line."""


class Vocabulary(dict[int, bytes]):
    """Token id -> the bytes it stands for in the middle of a text. Filled as ids are asked for.

    Args:
        path: a `tokenizer.json`, or the folder of a model that holds one.

    Raises:
        TextError: there is none, it cannot be read, or the package `tokenizers` is missing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise TextError("tokenizers: needs the package tokenizers: pip install 'stream-monitor[text]'") from None
        file = path
        try:
            file = path / "tokenizer.json" if path.is_dir() else path
            content = file.read_text(encoding="utf-8")
            decoder = json.loads(content)["decoder"]
            self._tokenizer = Tokenizer.from_str(content)
        except OSError as error:
            raise TextError(f"tokenizers: cannot read {file}: {error.strerror}") from None
        except Exception:  # `tokenizers` raises plain Exception
            raise TextError(f"tokenizers: {file} is not a tokenizer.json") from None
        self._byte_level = (decoder or {}).get("type") == "ByteLevel"
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        # Behind a letter: at the beginning of a text, SentencePiece decoders drop a leading space.
        self._letter = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._before = self._decode(self._letter)

    def __missing__(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return UNKNOWN  # Not kept: ids from outside must not make the table grow.
        if self._byte_level:
            piece = byte_level(name)
        elif (byte := BYTE_TOKEN.fullmatch(name)) and token not in self._added:
            piece = bytes.fromhex(byte[1])
        else:
            piece = self._decode([*self._letter, token]).removeprefix(self._before).encode()
        self[token] = piece
        return piece

    def agrees(self, ids: NDArray[np.uint32], flags: bytes) -> bool:
        """Whether these tokens, uint32 [n], have the flags (`TokenFlag`, one byte each) that the engine gave them."""
        checked = list(zip(ids[:_CHECKED_TOKENS].tolist(), flags, strict=False))
        return sum(self._misfits(*pair) for pair in checked) <= _MISFITS * len(checked)

    def _misfits(self, token: int, flags: int) -> bool:
        if flags & TokenFlag.SPECIAL:
            return token not in self._added
        text = self[token].decode("utf-8", "replace")
        own = TokenFlag.BEGINS_SPACE * text[:1].isspace() | TokenFlag.ENDS_NEWLINE * text.endswith("\n")
        own |= TokenFlag.BEGINS_NEWLINE * (text[:1] in ("\n", "\r"))
        return bool((own ^ flags) & _COMPARED)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


class Vocabularies:
    """The tokenizers that the monitor was given: by served model name, and one for all other models."""

    def __init__(self, named: dict[str, Vocabulary]) -> None:
        self._named = named

    @classmethod
    def read(cls, setting: str) -> "Vocabularies":
        """From `NAME=PATH` or `PATH` entries, separated by commas. Raises TextError."""
        named: dict[str, Vocabulary] = {}
        for entry in filter(None, map(str.strip, setting.split(","))):
            name, equals, path = entry.rpartition("=")
            if equals and not (name and path):
                raise TextError(f"tokenizers: {entry!r} is neither NAME=PATH nor PATH")
            if name in named:
                raise TextError(f"tokenizers: two for {name or 'all other models'}; name each model's with NAME=PATH")
            named[name] = Vocabulary(Path(path))
        return cls(named)

    def __len__(self) -> int:
        return len(self._named)

    def of(self, model_name: str) -> Vocabulary | None:
        """The one of a model, if there is one."""
        return self._named.get(model_name, self._named.get(""))


class TokenText:
    """The token ids of one request, as far as they are known, and the text of any stretch of them.

    Ids that no vocabulary can read are not kept.

    Attributes:
        reason: why there is no text; empty when there is.
    """

    def __init__(self, vocabulary: Vocabulary | None = None) -> None:
        self.reason = NOT_SENT
        self._vocabulary = vocabulary
        self._starts: list[int] = []
        self._runs: list[array[int]] = []

    def put(self, first: int, packed: bytes, flags: bytes) -> int:
        """Take in ids (packed uint32) at positions first, first + 1, ...; what is known already stays as it is.

        Returns the bytes of memory that it took.
        """
        if not packed or self.reason == MISMATCH:
            return 0
        ids = np.frombuffer(packed, "<u4").astype(np.uint32)
        if self._vocabulary is None or not self._vocabulary.agrees(ids, flags):
            self.reason = NO_TOKENIZER if self._vocabulary is None else MISMATCH
            return self.cut(0)
        self.reason = ""
        place = bisect_right(self._starts, first)
        end = self._starts[place - 1] + len(self._runs[place - 1]) if place else 0
        if place and end > first:
            ids, first = ids[end - first :], end
        if place < len(self._starts):
            ids = ids[: max(0, self._starts[place] - first)]
        if not len(ids):
            return 0
        if place and end == first:
            self._runs[place - 1].frombytes(ids.tobytes())
            return ids.nbytes
        self._starts.insert(place, first)
        self._runs.insert(place, array("I", ids.tobytes()))
        return ids.nbytes + _RUN_BYTES

    def cut(self, end: int) -> int:
        """Forget the tokens from position `end` on. Returns the bytes of memory that it took, so a negative number."""
        freed = 0
        while self._starts and self._starts[-1] + len(self._runs[-1]) > end:
            keep = max(0, end - self._starts[-1])
            run = self._runs[-1]
            freed += run.itemsize * (len(run) - keep)
            del run[keep:]
            if not keep:
                freed += _RUN_BYTES
                self._starts.pop()
                self._runs.pop()
        return -freed

    def between(self, start: int, end: int) -> str:
        """Text of positions [start, end); empty if none of them is known."""
        own = self._bytes(start, end)
        if not own:
            return ""
        own = own[_rest(self._bytes(max(0, start - 3), start)[-3:], own) :]
        return (own + (after := self._bytes(end, end + 3))[: _rest(own[-3:], after)]).decode("utf-8", "replace")

    def _bytes(self, start: int, end: int) -> bytes:
        """Bytes of positions [start, end); one replacement character for each stretch in between that is not known."""
        vocabulary = self._vocabulary
        if vocabulary is None:
            return b""
        parts: list[bytes] = []
        at = start
        for place in range(max(0, bisect_right(self._starts, start) - 1), bisect_right(self._starts, end)):
            first, run = self._starts[place], self._runs[place]
            known = run[max(0, start - first) : max(0, end - first)]
            if not known:
                continue
            if max(first, start) > at:
                parts.append(UNKNOWN)
            parts += map(vocabulary.__getitem__, known)
            at = max(first, start) + len(known)
        if parts and at < end:
            parts.append(UNKNOWN)
        return b"".join(parts)


def _rest(before: bytes, after: bytes) -> int:
    """How many bytes at the beginning of `after` belong to a character that `before` (its last 3 bytes) begins.

    >>> _rest("a€".encode()[:-1], "€b".encode()[2:])
    1
    """
    for back, byte in enumerate(reversed(before), 1):
        if byte & 0xC0 != 0x80:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            wanted = max(0, length - back)
            return next((n for n, other in enumerate(after[:wanted]) if other & 0xC0 != 0x80), min(wanted, len(after)))
    return 0


def shortened(text: str, longest: int) -> str:
    """At most `longest` characters of a text; an ellipsis stands for the rest."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def one_line(text: str, longest: int) -> str:
    """The beginning of a text for a terminal: one line, and no character that a terminal would obey."""
    return shortened("".join(c if c.isprintable() else UNKNOWN.decode() for c in " ".join(text.split())), longest)
