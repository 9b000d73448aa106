"""Requests that say something: token ids with their flags, by a tokenizer made here."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from stream_monitor.records import Role
from stream_monitor.v1alpha1 import summary_pb2
from tests.monitor.synthetic import Engine, Look, finished

CORPUS = ["So it must be seven. Wait, no: 3 + 4 = 7!\n\nAnna is older than Ben."] * 4


def byte_level(folder: Path) -> Path:
    """A byte-level BPE tokenizer as those of GPT-2, Llama 3 and Qwen; the file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def packed(ids: Sequence[int]) -> bytes:
    return np.array(ids, "<u4").tobytes()


class Speech:
    """One request, its prompt the user's, told to a monitor sentence by sentence."""

    def __init__(self, file: Path, name: str, prompt: str, engine: Engine | None = None, with_ids: bool = True) -> None:
        self.name = name
        self.engine = engine or Engine()
        self._tokenizer = Tokenizer.from_file(str(file))
        self._with_ids = with_ids
        ids, flags = self._read(prompt)
        self.end = self.prompt_tokens = len(ids)
        self._started = summary_pb2.RequestStarted(
            request_id=name,
            prompt_tokens=len(ids),
            role_starts=packed([0]),
            roles=bytes([Role.USER]),
            prompt_flags=flags,
            prompt_token_ids=packed(ids) if with_ids else b"",
        )

    def start(self) -> list[summary_pb2.StepSummary]:
        return [self.engine.summary(started=[self._started])]

    def say(self, text: str, look: Callable[[int], int] = lambda _: 3) -> list[summary_pb2.StepSummary]:
        """Sample a text token by token; the row of each position looks at the key that `look` names."""
        summaries = []
        for token, flag in zip(*self._read(text), strict=True):
            run = summary_pb2.TokenRun(request_id=self.name, first_position=self.end, flags=bytes([flag]))
            run.token_ids = packed([token]) if self._with_ids else b""
            summaries.append(self.engine.summary([Look(self.name, self.end, look(self.end))], tokens=[run]))
            self.end += 1
        return summaries

    def finish(self) -> list[summary_pb2.StepSummary]:
        return [self.engine.summary(finished=[finished(self.name, self.end)])]

    def _read(self, text: str) -> tuple[list[int], bytes]:
        """Token ids of a text, and the flags that an engine sends for what the tests say."""
        ids = self._tokenizer.encode(text).ids
        added = self._tokenizer.get_added_tokens_decoder()
        return ids, bytes(64 if token in added else self._flags(token) for token in ids)

    def _flags(self, token: int) -> int:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        begins = {" ": 2, "\n": 2 | 128}.get(text[:1], 0)
        return begins | 8 * text.endswith("\n") | text.endswith((".", "?", "!"))
