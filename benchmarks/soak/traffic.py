"""What the engines are asked: rounds of chats and texts, short and long, the same ids again and again."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.texts import token_ids

LONGEST_PROMPT = 700
NEW_TOKENS = 72
"""Sampled for each prompt alone, once, to compare with; a request asks for no more."""
REQUESTS = 8
"""Of a round."""
_QUESTIONS = (
    ("You answer in plain words.", "Why is the sky blue in the day and red in the evening? Think step by step."),
    ("You are a careful accountant.", "Add 17, 25 and 58. Then take a third of it. Show each step. Check the result."),
    ("You write for children.", "Tell the story of a fox that lost its way. What did it see? Whom did it meet?"),
)


@dataclass(frozen=True)
class Asked:
    """A request of a round, by the step before which it is added and, maybe, ended from outside."""

    request_id: str
    prompt: int
    max_tokens: int
    add_at: int
    abort_at: int | None


def prompts(model: Path, traces: Path | None) -> list[list[int]]:
    """Token ids: chats with roles, a long one about prose; prose and code alone; recorded reasoning if there is any."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def chat(system: str, user: str) -> list[int]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(map(int, ids))

    made = [chat(*question) for question in _QUESTIONS]
    prose = token_ids(tokenizer, "prose", LONGEST_PROMPT - 100, seed=1)
    made.append(chat("Use the text alone.", tokenizer.decode(prose) + "\nWhat does this text say, in three sentences?"))
    made.append(token_ids(tokenizer, "prose", 220, seed=2))
    made.append(token_ids(tokenizer, "code", 400, seed=3))
    if traces is not None:
        made.append(token_ids(tokenizer, "reasoning", 500, seed=4, traces=traces))
    return made


def make_round(draw: random.Random, count: int) -> list[Asked]:
    """A round over `count` prompts: requests join while others run, one is ended from outside, ids are the same."""
    asked = []
    aborted = draw.randrange(REQUESTS)
    for number in range(REQUESTS):
        add_at = 0 if number < REQUESTS // 2 else draw.randrange(1, 40)
        abort_at = add_at + draw.randrange(8, 20) if number == aborted else None
        asked.append(Asked(f"r{number}", draw.randrange(count), draw.randrange(24, NEW_TOKENS + 1), add_at, abort_at))
    return asked


def engine_arguments(model: Path, dtype: str, seed: int) -> dict[str, Any]:
    """Of both engines: too few KV blocks for a round, so that requests are preempted."""
    page = 32
    longest = LONGEST_PROMPT + 100 + NEW_TOKENS
    return {
        "model": str(model),
        "dtype": dtype,
        "seed": seed,
        "enforce_eager": True,
        "max_model_len": longest,
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": 256,
        "block_size": page,
        "num_gpu_blocks_override": -(-longest // page) + 8,
        "distributed_executor_backend": "mp",
    }


def is_model(folder: Path) -> bool:
    """Whether it holds a model with a tokenizer."""
    return (folder / "config.json").exists() and bool(json.loads((folder / "config.json").read_text()))
