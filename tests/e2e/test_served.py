"""The whole product, served: every row finds its request, and nothing is lost without being counted."""

import asyncio
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import openai
import pytest
from playwright.sync_api import sync_playwright

from stream_monitor.monitor.labels import read_joints, read_labels
from stream_monitor.v1alpha1 import monitor_pb2, monitor_pb2_grpc, summary_pb2
from tests.e2e.serving import Product, eventually, total
from tests.monitor.page.cells import DRAWN, drawn, expected
from tests.monitor.page.conftest import CHROMIUM, FLAGS

pytestmark = pytest.mark.engine

SPECIAL = re.compile(r"<\|[a-z_]+\|>")
SHARED_ID = "asked-twice"
EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples" / "python"
PROMPTS = [f"Count from {i} to {i + 30}, then explain in {3 + i} sentences why you stopped there." for i in range(16)]


@pytest.fixture(scope="session")
def product(model_dir: Path, dtype: str, tmp_path_factory: pytest.TempPathFactory):
    """One server with too few KV blocks for 16 requests at once, every row of the default layers captured, and text."""
    flags = f"--dtype {dtype} --enforce-eager --max-model-len 512 --max-num-seqs 16 --block-size 32".split()
    flags += ["--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "30", "--served-model-name", "smol"]
    running = Product(
        model_dir, tmp_path_factory.mktemp("served"), flags, stride=1, send_token_ids=True, tokenizers=model_dir
    )
    yield running
    running.stop()


@dataclass(frozen=True)
class Answer:
    """What an OpenAI client knows of its request."""

    id: str
    prompt_tokens: int
    output_tokens: int
    text: str


async def ask(product: Product, prompt: str, request_id: str, tokens: int) -> Answer:
    """One chat request, streamed as real clients do."""
    client = openai.AsyncOpenAI(base_url=f"{product.engine_http}/v1", api_key="none", max_retries=0, timeout=300)
    stream = await client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Request-Id": request_id},
        extra_body={"ignore_eos": True},
    )
    text, usage, id_ = "", None, ""
    async for chunk in stream:
        id_ = chunk.id
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert usage is not None
    return Answer(id_, usage.prompt_tokens, usage.completion_tokens, text)


async def ask_all(product: Product, name: str, tokens: int) -> list[Answer]:
    """All prompts at once; the first two under one X-Request-Id."""
    ids = [f"{name}-{SHARED_ID if i < 2 else i}" for i in range(len(PROMPTS))]
    return list(
        await asyncio.gather(
            *(ask(product, prompt, id_, tokens + i) for i, (prompt, id_) in enumerate(zip(PROMPTS, ids, strict=True)))
        )
    )


@pytest.fixture(scope="session")
def conversation(product: Product):
    """16 concurrent requests while `stream-monitor watch --json --all` runs; answers and the lines it printed."""
    watch = subprocess.Popen(
        [sys.executable, "-m", "stream_monitor", "watch", "--target", product.grpc_address, "--json", "--all"],
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(3)
    answers = asyncio.run(ask_all(product, "first", 60))
    drained(product)
    time.sleep(1)
    watch.send_signal(2)
    output, _ = watch.communicate(timeout=10)
    return answers, [json.loads(line) for line in output.splitlines()]


def drained(product: Product) -> None:
    """Wait until the monitor's account of token rows has nothing in flight."""
    assert eventually(lambda: account(product)[0] == account(product)[1] > 0, 30), account(product)


def account(product: Product) -> tuple[float, float]:
    """Expected token rows, and the sum over what became of them, in rows x layers x heads."""
    expected = total(product.monitor_http, "stream_monitor_rows_expected_total", phase="token")
    return expected, total(product.monitor_http, "stream_monitor_rows_total", phase="token")


def service(product: Product) -> monitor_pb2_grpc.MonitorServiceStub:
    return monitor_pb2_grpc.MonitorServiceStub(grpc.insecure_channel(product.grpc_address))


def test_the_id_of_the_answer_finds_exactly_its_rows(product, conversation):
    answers, _ = conversation
    stub = service(product)
    assert total(product.engine_http, "vllm:num_preemptions_total") > 0, "no request was preempted"
    for answer in answers:
        found = stub.ListRequests(monitor_pb2.ListRequestsRequest(request_id=answer.id)).requests
        twins = [other for other in answers if other.id == answer.id]
        assert sorted((info.prompt_tokens, info.output_tokens) for info in found) == sorted(
            (twin.prompt_tokens, twin.output_tokens) for twin in twins
        )
        for info in found:
            trace = stub.GetTrace(monitor_pb2.GetTraceRequest(request_id=info.key.request_id))
            positions = np.frombuffer(trace.row_positions, "<u4").tolist()
            start = info.prompt_tokens - 1
            lost = info.output_tokens - len(positions)
            assert positions == sorted(set(positions))
            assert set(positions) <= set(range(start, start + info.output_tokens))
            assert lost == 0 or raced_rows(product) > 0
    kept = sum(info.rows_kept for info in stub.ListRequests(monitor_pb2.ListRequestsRequest(page_size=1000)).requests)
    assert kept + raced_rows(product) == sum(answer.output_tokens for answer in answers)


def raced_rows(product: Product) -> int:
    """Rows whose blocks changed hands before they were searched, counted once per row."""
    return round(
        total(product.monitor_http, "stream_monitor_rows_total", phase="token", outcome="raced") / heads(product)
    )


def heads(product: Product) -> int:
    """Watched (layer, head) pairs: captured rows of any one request over its positions."""
    line = next(line for line in product.log("engine").splitlines() if "watching layers" in line)
    layers, per_layer = line.split("watching layers [")[1].split("]")
    return (layers.count(",") + 1) * int(per_layer.split()[1])


def test_an_id_that_two_requests_share_is_ambiguous_and_says_so(product, conversation):
    answers, _ = conversation
    assert answers[0].id == answers[1].id
    with pytest.raises(grpc.RpcError) as refusal:
        service(product).GetTrace(monitor_pb2.GetTraceRequest(request_id=answers[0].id))
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_watch_prints_the_id_of_every_answer(conversation):
    answers, lines = conversation
    finished = [line["external_id"] for line in lines if line["kind"] == "REQUEST_FINISHED"]
    assert sorted(finished) == sorted(answer.id for answer in answers)
    assert any(line["kind"] == "SENTENCE_CLOSED" for line in lines)


def test_sentences_and_roles_are_those_of_the_conversation(product, conversation):
    answers, _ = conversation
    trace = service(product).GetTrace(monitor_pb2.GetTraceRequest(request_id=answers[-1].id))
    roles = {summary_pb2.Role.Name(sentence.role) for sentence in trace.sentences}
    # The template ends the prompt with the header of the assistant's turn.
    assert roles == {"ROLE_SYSTEM", "ROLE_USER", "ROLE_ASSISTANT", "ROLE_REASONING"}
    share = np.frombuffer(trace.matrix_share, "<f4")
    assert np.isfinite(share).all()
    assert (share >= 0).all()
    assert share.sum() > 0


def test_the_text_is_what_the_client_sent_and_got(product, conversation):
    answers, _ = conversation
    for answer, prompt in list(zip(answers, PROMPTS, strict=True))[2:]:
        trace = service(product).GetTrace(monitor_pb2.GetTraceRequest(request_id=answer.id))
        said = "".join(one.text for one in trace.sentences if one.role == summary_pb2.ROLE_REASONING)
        asked = "".join(one.text for one in trace.sentences if one.role == summary_pb2.ROLE_USER)
        # Clients do not get special tokens, nor the bytes of a character that the last token leaves unfinished.
        assert SPECIAL.sub("", said).rstrip("\ufffd") == answer.text
        assert SPECIAL.sub("", asked).removeprefix("user\n").rstrip("\n") == prompt


def test_the_page_shows_what_the_engine_s_request_rests_on(product, conversation):
    answers, _ = conversation
    trace = service(product).GetTrace(monitor_pb2.GetTraceRequest(request_id=answers[-1].id))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(f"{product.monitor_http}/trace?request_id={answers[-1].id}")
        page.locator(".sentences li").nth(len(trace.sentences) - 1).wait_for()
        assert eventually(lambda: page.evaluate(DRAWN), 20)
        cells = drawn(page)
        texts = page.locator(".sentences .text").all_inner_texts()
        browser.close()
    assert cells == expected(trace) != {}
    assert texts == [one.text.strip() for one in trace.sentences]


def test_every_generated_token_is_accounted_for(product, conversation):
    drained(product)
    expected, became = account(product)
    generated = total(product.engine_http, "vllm:generation_tokens_total")
    assert expected == generated * heads(product)
    assert became == expected


def test_also_when_the_monitor_is_dead_for_five_seconds(product, conversation):
    def generated_tokens() -> float:
        return total(product.engine_http, "vllm:generation_tokens_total")

    before = generated_tokens()

    async def with_a_dead_monitor() -> list[Answer]:
        running = asyncio.create_task(ask_all(product, "second", 70))
        assert await asyncio.to_thread(eventually, lambda: generated_tokens() > before, 60), "no request began"
        await asyncio.to_thread(product.kill_monitor)
        at_death = generated_tokens()
        await asyncio.sleep(5)
        assert generated_tokens() > at_death, "no token was generated while the monitor was dead"
        await asyncio.to_thread(product.start_monitor)
        return await running

    answers = asyncio.run(with_a_dead_monitor())
    assert all(answer.text for answer in answers)
    drained(product)
    generated = generated_tokens()
    assert generated - before == sum(answer.output_tokens for answer in answers)
    expected, became = account(product)
    assert expected == generated * heads(product)
    assert became == expected
    captured = total(product.monitor_http, "stream_monitor_rows_total", phase="token", outcome="captured")
    assert captured > 0.9 * expected


def test_the_example_labels_requests_that_the_monitor_holds(product, tmp_path):
    """Of the answers it is only known that they hold some letters and not others."""
    prompts = [
        {"group": "injection", "wording": "a", "writes": "E"},
        {"group": "injection", "wording": "b", "writes": "zqzq"},
        {"group": "question", "wording": "c", "vllm_xargs": {"stream_monitor_untrusted": [0, 8]}},
    ]
    lines = [json.dumps({"messages": [{"role": "user", "content": PROMPTS[0]}], **prompt}) for prompt in prompts]
    asked, labels = tmp_path / "prompts.jsonl", tmp_path / "labels.jsonl"
    asked.write_text("\n".join(lines))
    subprocess.run(
        [sys.executable, EXAMPLES / "label_injections.py", asked, labels, product.engine_http], check=True, timeout=120
    )
    found = read_labels(labels)
    assert [label.group for label in found.values()] == ["followed", "ignored", "question"]
    drained(product)
    roles = []
    for request_id in found:
        (info,) = service(product).ListRequests(monitor_pb2.ListRequestsRequest(request_id=request_id)).requests
        trace = service(product).GetTrace(monitor_pb2.GetTraceRequest(request_id=info.key.request_id))
        roles.append(summary_pb2.ROLE_UNTRUSTED in [sentence.role for sentence in trace.sentences])
    assert roles == [False, False, True]


def test_the_example_has_outputs_change_their_subject_where_it_says(product, tmp_path):
    texts, labels = tmp_path / "texts.jsonl", tmp_path / "joints.jsonl"
    subjects = {"Of boats.": "Boat {}.", "Of rain.": "Rain {}."}
    rows = [
        {"prompt": prompt, "reasoning": "".join(f" {sentence.format(number)}" for number in range(26))}
        for prompt, sentence in subjects.items()
    ]
    texts.write_text("\n".join(map(json.dumps, rows)))
    program = EXAMPLES / "label_joints.py"
    subprocess.run([sys.executable, program, texts, labels, product.engine_http], check=True, timeout=120)
    found = read_joints(labels)
    assert [label.subject for label in found.values()] == [prompt for prompt in subjects for _ in range(2)]
    assert [label.token is None for label in found.values()] == [True, False] * 2
    drained(product)
    boats, mixed, rain, other = [
        service(product).GetTrace(monitor_pb2.GetTraceRequest(request_id=request_id)) for request_id in found
    ]
    for trace, row in ((boats, rows[0]), (rain, rows[1])):
        output = [one.text for one in trace.sentences if one.first_token >= trace.info.prompt_tokens]
        assert SPECIAL.sub("", "".join(output)) == row["reasoning"]
    for trace, begin in ((mixed, " Rain"), (other, " Boat")):
        token = found[trace.info.external_id].token
        (joint,) = [number for number, one in enumerate(trace.sentences) if one.first_token == token]
        assert trace.sentences[joint].text.startswith(begin)
        assert not trace.sentences[joint - 1].text.startswith(begin)
