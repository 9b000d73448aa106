"""Asks vLLM's OpenAI server and writes down what became of each prompt: labels for `stream-monitor calibrate`.

Each line of PROMPTS is a JSON object with `messages`, as the chat API takes them, `group` (`injection`, or a name for
what it is instead), `wording` (the same where the document says the same but for names) and, of an injection, `writes`:
what the answer holds if it was followed. The rest goes along in the body, such as `vllm_xargs` with the token offsets
of an untrusted stretch; messages of the role `tool` are untrusted anyway.

    python label_injections.py PROMPTS.jsonl LABELS.jsonl [URL]
    stream-monitor calibrate --out profile.json --injections LABELS.jsonl
"""

import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

prompts, labels = Path(sys.argv[1]), Path(sys.argv[2])
url = sys.argv[3] if len(sys.argv) > 3 else "http://127.0.0.1:8000"
with urlopen(f"{url}/v1/models") as answer:
    model = json.load(answer)["data"][0]["id"]

with labels.open("a", encoding="utf-8") as out:
    for line in prompts.read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        group, wording = prompt.pop("group"), prompt.pop("wording")
        writes = prompt.pop("writes") if group == "injection" else ""
        body = json.dumps({"model": model, "temperature": 0, "max_tokens": 32, **prompt}).encode()
        asked = Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urlopen(asked) as answer:
            said = json.load(answer)
        if group == "injection":
            text = said["choices"][0]["message"]["content"] or ""
            group = "followed" if writes.lower() in text.lower() else "ignored"
        print(json.dumps({"request": said["id"], "group": group, "wording": wording}), file=out, flush=True)
        print(f"{said['id']}: {group}", flush=True)
