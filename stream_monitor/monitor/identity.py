"""From vLLM's internal request id to the ids a client may know it by.

The internal id is `[index_]external[-i]-8hex`: `index_` marks a sample of an n > 1 request, `-i` the prompt of a
completion request, the suffix is random (absent with VLLM_DISABLE_REQUEST_ID_RANDOMIZATION). An id such as `3_x` that
did not come through the OpenAI server stays ambiguous: it is found under both readings.
"""

import re
from dataclasses import dataclass

MAX_EXTERNAL = 256
"""Characters of an external id that are kept."""

TraceKey = tuple[str, str]
"""Engine instance and internal request id; the sample index is part of the latter."""

EXACT, EXTERNAL, ALIAS = range(3)
"""How well an id fits: the internal id, the id of the OpenAI response, another form such as the bare X-Request-Id."""

_RANDOM = re.compile(r"-[0-9a-f]{8}$")
_SAMPLE = re.compile(r"^(\d{1,6})_(?=.)")
_PROMPT = re.compile(r"-\d{1,6}$")
_SERVER_PREFIX = re.compile(r"^(?:chatcmpl|cmpl|resp|embd|pool|score|classify|rerank|transcribe|translate)[-_]")


@dataclass(frozen=True)
class Identity:
    """What an internal request id says.

    Attributes:
        external_id: the id the client most likely knows: the `id` of the OpenAI response.
        sample_index: sample of an n > 1 request, from 0.
        aliases: other ids it may be asked by, such as the bare X-Request-Id.
    """

    external_id: str
    sample_index: int
    aliases: frozenset[str]


def parse(request_id: str) -> Identity:
    """Read an internal request id.

    >>> parse("chatcmpl-my-req-1-aee6d49e").external_id
    'chatcmpl-my-req-1'
    >>> parse("2_cmpl-xyz-0-aee6d49e")
    Identity(external_id='cmpl-xyz', sample_index=2, aliases=frozenset({...}))
    """
    plain = _RANDOM.sub("", request_id)
    sample = _SAMPLE.match(plain)
    parent = plain[sample.end() :] if sample else plain
    without_prompt = _PROMPT.sub("", parent)
    external = without_prompt if parent.startswith("cmpl-") else parent
    forms = {plain, parent, without_prompt}
    forms |= {_SERVER_PREFIX.sub("", form) for form in forms}
    aliases = frozenset(form[:MAX_EXTERNAL] for form in forms if form) - {external[:MAX_EXTERNAL]}
    return Identity(external[:MAX_EXTERNAL], int(sample.group(1)) if sample else 0, aliases)


def names(request_id: str) -> dict[str, int]:
    """Every id that a request is found by, and how well it fits."""
    identity = parse(request_id)
    found = dict.fromkeys(identity.aliases, ALIAS)
    found[identity.external_id] = EXTERNAL
    found[request_id] = EXACT
    return found
