"""What the plug-in knows of text without sending any: flags of every token id, and the roles inside a prompt.

Both are made once, at load, from the model's Hugging Face tokenizer.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stream_monitor.records import Role, TokenFlag

CJK_STOPS = "。？！．｡"
_CLOSERS = r"""["'”’»)\]}）】》」』*_`]*"""
_ENDS = re.compile(rf"[.?!{CJK_STOPS}]{_CLOSERS}\Z")
# CJK text has no white space after a full stop: the sentence ends there whatever follows, if only the end of the token.
# A code fence ends what is before the code, and the code.
_BREAKS = re.compile(rf"[.?!]{_CLOSERS}\s|\n[ \t\r]*\n|[{CJK_STOPS}]|```")
# <think>, </think>, [THINK], ◁think▷, <seed:think>, <|begin_of_thought|>, <|end_of_thinking|>, <reasoning>, ...
_REASONING = re.compile(
    r"[<\[◁]\|?(?P<close>/|end_of_)?(?:begin_of_|start_of_)?(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)\|?[>\]▷]",
    re.IGNORECASE,
)


def token_flags(tokenizer: Any, vocab_size: int) -> NDArray[np.uint8]:
    """`TokenFlag`s of every token id, uint8 [vocab_size]; 0 for ids that the tokenizer does not know.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the model's output layer; may exceed the tokenizer's.

    A piece of a character (byte-level BPE cuts rare characters into tokens) is not text by itself and has no flags.
    """
    flags = np.zeros(vocab_size, np.uint8)
    texts = _texts(tokenizer, min(vocab_size, len(tokenizer)))
    for token, text in enumerate(texts):
        flags[token] = text_flags(text)
    template = _template(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    for token, text in enumerate(texts):
        if text[:1] in "<[◁" and (match := _REASONING.fullmatch(text)) and (token in added or text in template):
            opens = match["close"] is None
            flags[token] = TokenFlag.OPENS_REASONING if opens else TokenFlag.CLOSES_REASONING
    special = {token for token, entry in added.items() if entry.special} | set(tokenizer.all_special_ids)
    for token in special:
        if token < vocab_size:
            tags = flags[token] & (TokenFlag.OPENS_REASONING | TokenFlag.CLOSES_REASONING)
            flags[token] = tags | TokenFlag.SPECIAL
    return flags


def text_flags(text: str) -> int:
    """`TokenFlag`s of a token with this text."""
    if text.lstrip(" ").isalnum():  # most of a vocabulary; saves half the time
        return TokenFlag.BEGINS_SPACE if text[0] == " " else 0
    flags = 0
    if text[:1].isspace():
        flags |= TokenFlag.BEGINS_SPACE
        if text[0] in "\n\r":
            flags |= TokenFlag.BEGINS_NEWLINE
    if text.endswith("\n"):
        flags |= TokenFlag.ENDS_NEWLINE
    if _ENDS.search(text):
        flags |= TokenFlag.ENDS_TERMINATOR
    if _BREAKS.search(text):
        flags |= TokenFlag.BREAKS_INSIDE
    return flags


def _texts(tokenizer: Any, count: int) -> list[str]:
    """Text of token ids 0 .. count - 1 in the middle of a text.

    Each is decoded behind a letter: at the beginning of a text, SentencePiece decoders drop a leading space.
    """
    letter = tokenizer.encode("a", add_special_tokens=False)[-1:]
    pairs = [[*letter, token] for token in range(count)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Not through the Hugging Face object: that is slower by ten, and may clean up spaces before punctuation.
        texts = backend.decode_batch(pairs, skip_special_tokens=False)
        before = backend.decode(letter, skip_special_tokens=False)
    else:
        plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        texts = [tokenizer.decode(pair, **plain) for pair in pairs]
        before = tokenizer.decode(letter, **plain)
    return [text.removeprefix(before) for text in texts]


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(template.values())
    return template or ""


_ROLES = {"user": Role.USER, "assistant": Role.ASSISTANT, "system": Role.SYSTEM, "tool": Role.UNTRUSTED}
"""In order of precedence, where a template begins the turns of two roles alike."""
_CALL = {"id": "call00001", "type": "function", "function": {"name": "lookup", "arguments": {}}}
# Templates raise for orders of roles that their model never saw, so several are tried. "call": an assistant that calls.
_CONVERSATIONS = (
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("user", "assistant", "tool", "assistant"),
    ("user", "call", "tool", "assistant"),
    ("user", "call", "tool"),
)
_SENTINEL = "Qz{}vk"


class PromptRoles:
    """Finds the turns of a chat in a prompt's token ids, by the token ids that begin them.

    `headers`: (token ids, Role) of each way in which a turn may begin; empty where there is no chat template, and then
    a prompt is one USER span. Text that imitates a header with special tokens passes for one, as for the model.
    """

    def __init__(self, headers: Sequence[tuple[tuple[int, ...], Role]]) -> None:
        self.headers = tuple(headers)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "PromptRoles":
        """Learn the headers from what the tokenizer's chat template makes of sentinel messages. Never raises."""
        rendered = [chat for names in _CONVERSATIONS if (chat := _render(tokenizer, names)) is not None]
        ends = {chat.after.strip() for chat in rendered} - {""}
        turns = [
            (name, _header_ids(tokenizer, chat.text, *edges)) for chat in rendered for name, edges in chat.turns(ends)
        ]
        owner: dict[tuple[int, ...], Role] = {}
        for name, role in _ROLES.items():
            for ids in (ids for other, ids in turns if other == name and ids):
                owner.setdefault(ids, role)
        return cls([(ids, role) for ids, role in owner.items() if not _redundant(ids, role, owner)])

    def spans(self, prompt_token_ids: ArrayLike) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        """First position and `Role` of each turn, which begins with its header: uint32 [n] ascending from 0, uint8 [n].

        What is before the first header is the system's, unless it is a token or two that begin every text.
        """
        ids = np.asarray(prompt_token_ids)
        turns = _without_overlaps([match for ids_, role in self.headers for match in _matches(ids, ids_, role)])
        if not turns:
            return np.zeros(1, np.uint32), np.full(1, Role.USER, np.uint8)
        starts, roles = [start for start, _, _ in turns], [role for _, _, role in turns]
        if starts[0] > _MOST_BEGIN_TOKENS:
            starts, roles = [0, *starts], [Role.SYSTEM, *roles]
        starts[0] = 0
        return np.array(starts, np.uint32), np.array(roles, np.uint8)


_MOST_BEGIN_TOKENS = 2


class _Rendered:
    """A chat as the template shows it, and where the contents of its messages are."""

    def __init__(self, names: Sequence[str], text: str) -> None:
        sentinels = [_SENTINEL.format(number) for number in range(len(names))]
        starts = [text.index(sentinel) for sentinel in sentinels]  # raises ValueError where one is left out
        self._names = names
        self._edges = list(
            zip([0, *(s + len(t) for s, t in zip(starts, sentinels, strict=True))], starts, strict=False)
        )
        self.text = text
        self.after = text[starts[-1] + len(sentinels[-1]) :]

    def turns(self, ends: Collection[str]) -> Iterator[tuple[str, tuple[int, int]]]:
        """(role, [start, end) in `text` of what comes before its content and after the end of the turn before)."""
        for name, (start, end) in zip(self._names, self._edges, strict=True):
            if name == "call":
                continue  # arguments and content may come in any order
            between = self.text[start:end]
            cut = max((between.rfind(marker) + len(marker) for marker in ends if marker in between), default=0)
            yield name, (start + (cut if between[cut:].strip() else 0), end)


def _render(tokenizer: Any, names: Sequence[str]) -> _Rendered | None:
    messages: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        message: dict[str, Any] = {"role": "assistant" if name == "call" else name, "content": _SENTINEL.format(number)}
        if name == "call":
            message["tool_calls"] = [_CALL]
        if name == "tool":
            message |= {"name": "lookup", "tool_call_id": _CALL["id"]}
        messages.append(message)
    try:
        return _Rendered(names, tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:
        return None  # there is none, or it refuses this order; it is a program of the model's and may raise anything


def _header_ids(tokenizer: Any, text: str, start: int, end: int) -> tuple[int, ...]:
    """Token ids of text[start:end] as they are within `text`, without white space at either end.

    The content that follows may begin with white space, which then shares a token with the header's own.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tuple(tokenizer.encode(text[start:end].strip(), add_special_tokens=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = [
        (token, text[a:b])
        for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if start <= a < b <= end
    ]
    while tokens and not tokens[0][1].strip():
        del tokens[0]
    while tokens and (not tokens[-1][1].strip() or (len(tokens) > 2 and tokens[-1][1][-1].isspace())):
        del tokens[-1]
    return tuple(token for token, _ in tokens)


def _redundant(ids: tuple[int, ...], role: Role, owner: dict[tuple[int, ...], Role]) -> bool:
    """A shorter header of the same role ends `ids`: what is before it, such as a default system prompt, is not its."""
    return any(
        role == other and len(short) < len(ids) and ids[-len(short) :] == short for short, other in owner.items()
    )


def _matches(ids: NDArray[Any], header: tuple[int, ...], role: Role) -> list[tuple[int, int, Role]]:
    """(start, end, role) of each place where `header` is in `ids`."""
    last = max(0, len(ids) - len(header) + 1)
    places = np.flatnonzero(ids[:last] == header[0])
    for offset, token in enumerate(header[1:], 1):
        places = places[ids[places + offset] == token]
    return [(start, start + len(header), role) for start in places.tolist()]


def _without_overlaps(matches: list[tuple[int, int, Role]]) -> list[tuple[int, int, Role]]:
    """Of headers that overlap, the longest: a tool's answer may lie inside a user's turn."""
    kept: list[tuple[int, int, Role]] = []
    for match in sorted(matches):
        if not kept or match[0] >= kept[-1][1]:
            kept.append(match)
        elif match[1] - match[0] > kept[-1][1] - kept[-1][0]:
            kept[-1] = match
    return kept


def overlay_untrusted(
    starts: ArrayLike, roles: ArrayLike, offsets: Sequence[int], prompt_len: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Mark the stretches [start, end) of flat `offsets` [start, end, start, end, ...] as UNTRUSTED, whatever they were.

    `starts` (uint32 [n]) and `roles` (uint8 [n]) as from `PromptRoles.spans`; the same is returned. Stretches may
    come in any order and overlap. Raises ValueError, one line, unless 0 <= start < end <= prompt_len for each.
    """
    if len(offsets) % 2:
        raise ValueError(f"untrusted spans need an end for each start, got {len(offsets)} numbers")
    for start, end in zip(offsets[::2], offsets[1::2], strict=True):
        whole = all(isinstance(edge, int) and not isinstance(edge, bool) for edge in (start, end))
        if not whole or not 0 <= start < end <= prompt_len:
            raise ValueError(f"untrusted span [{start!r}, {end!r}) is not inside the prompt's {prompt_len} tokens")
    old_starts, old_roles = np.asarray(starts, np.int64), np.asarray(roles, np.uint8)
    begins, ends = np.sort(np.array(offsets[::2], np.int64)), np.sort(np.array(offsets[1::2], np.int64))
    cuts = np.unique(np.concatenate((old_starts, begins, ends)))
    cuts = cuts[cuts < prompt_len]
    covered = np.searchsorted(begins, cuts, "right") > np.searchsorted(ends, cuts, "right")
    merged = np.where(covered, np.uint8(Role.UNTRUSTED), old_roles[np.searchsorted(old_starts, cuts, "right") - 1])
    keep = np.isin(cuts, old_starts)
    keep[1:] |= merged[1:] != merged[:-1]
    return cuts[keep].astype(np.uint32), merged[keep]
