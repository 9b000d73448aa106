"""Has vLLM's OpenAI server write outputs that change their subject, and others that do not: labels for `calibrate`.

Each line of TEXTS is a JSON object with `prompt` (the whole of it, chat template included) and `reasoning`: what your
model wrote to it. Texts of one prompt are about one subject; give texts of four prompts at least, and many more if you
can. The server is made to write the first `SENTENCES` of each text, and once more with another subject's from a drawn
sentence on, by structured outputs: it reads what it writes as if it had come upon it.

    python label_joints.py TEXTS.jsonl JOINTS.jsonl [URL]
    stream-monitor calibrate --out profile.json --joints JOINTS.jsonl
"""

import json
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

SENTENCES = 26
CUT = range(13, 20)
"""Sentences before the other subject: a probe compares twelve, and needs four behind."""

AT_ONCE = 8

texts, labels = Path(sys.argv[1]), Path(sys.argv[2])
url = sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:8000"


def post(path: str, body: dict[str, object]) -> dict[str, Any]:
    """The server's answer."""
    data = json.dumps({"model": model} | body).encode()
    with urlopen(Request(f"{url}{path}", data, {"Content-Type": "application/json"})) as answer:
        return dict(json.load(answer))


def write(prompt: str, output: str, joint: int | None) -> tuple[str, int | None]:
    """The request's id, and the token of the context at which character `joint` of this output stands."""
    sizes = post("/tokenize", {"prompt": prompt})
    forced = {"structured_outputs": {"choice": [output]}, "max_tokens": sizes["max_model_len"] - sizes["count"]}
    said = post("/v1/completions", {"prompt": prompt, "temperature": 0, "logprobs": 0} | forced)
    (choice,) = said["choices"]
    if choice["text"] != output:
        raise SystemExit(f"an output of {texts} ended early ({choice['finish_reason']}); give shorter ones")
    if joint is None:
        return said["id"], None
    return said["id"], sizes["count"] + sum(offset < joint for offset in choice["logprobs"]["text_offset"])


with urlopen(f"{url}/v1/models") as answer:
    model = json.load(answer)["data"][0]["id"]
rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
found = [(row["prompt"], re.split(r"(?<=[.!?])(?=\s)", row["reasoning"])) for row in rows]
long = [(prompt, sentences) for prompt, sentences in found if len(sentences) >= SENTENCES]
if len({prompt for prompt, _ in long}) < 2:
    sys.exit(f"{texts} has no two prompts with {SENTENCES} sentences each")

asked = []
for number, (prompt, sentences) in enumerate(long):
    draw = random.Random(number)
    cut = draw.choice(CUT)
    other = draw.choice([other for subject, other in long if subject != prompt])
    first = draw.randrange(1, len(other) - (SENTENCES - cut) + 1)
    head, rest = "".join(sentences[:cut]), "".join(sentences[cut:SENTENCES])
    tail = "".join(other[first : first + SENTENCES - cut])
    asked += [(prompt, head + rest, None), (prompt, head + tail, len(head))]

with labels.open("a", encoding="utf-8") as out, ThreadPoolExecutor(AT_ONCE) as pool:
    for (prompt, _, _), (request, token) in zip(asked, pool.map(lambda one: write(*one), asked), strict=True):
        print(json.dumps({"request": request, "subject": prompt, "token": token}), file=out, flush=True)
        print(f"{request}: {'stays' if token is None else f'changes at token {token}'}", flush=True)
