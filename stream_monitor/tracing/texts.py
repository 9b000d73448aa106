"""Recorded reasoning from a file of JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stream_monitor.tracing.errors import TracingError
from stream_monitor.tracing.model import TracedModel, read_file


@dataclass(frozen=True)
class Text:
    """One line: `prompt`, with the chat template and an opening reasoning tag if there is one, and what followed."""

    name: str
    prompt: str
    reasoning: str

    def tokens(self, model: TracedModel, most: int) -> tuple[list[int], int]:
        """At most `most` token ids, no more than the model's limit, and how many tokens the prompt has by itself."""
        ids = model.tokenizer(self.prompt + self.reasoning)["input_ids"]
        prompt = len(model.tokenizer(self.prompt)["input_ids"]) if self.prompt else 0
        return ids[: min(most, model.limit or most)], prompt


def read_texts(path: Path) -> list[Text]:
    """Texts of a file whose lines are objects with the strings `prompt` and `reasoning`, and perhaps `id`.

    Raises:
        TracingError: it cannot be read, or holds something else, or nothing.
    """
    found = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TracingError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "reasoning")):
            raise TracingError(f"{path}, line {number}: not an object with the strings prompt and reasoning")
        if not row["reasoning"].strip():
            raise TracingError(f"{path}, line {number}: the reasoning is empty")
        found.append(Text(str(row.get("id", number)), row["prompt"], row["reasoning"]))
    if not found:
        raise TracingError(f"{path} holds no texts")
    return found


def evenly(texts: Sequence[Text], count: int) -> list[Text]:
    """At most `count` of them, spread over the whole."""
    count = min(count, len(texts))
    return [texts[number * (len(texts) - 1) // max(1, count - 1)] for number in range(count)]
