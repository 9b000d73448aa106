"""The page in a real browser, beside what the monitor says over gRPC."""

import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToJson, ParseDict
from playwright.sync_api import Page, Route, expect

from stream_monitor.v1alpha1 import monitor_pb2, summary_pb2
from tests.monitor.page.cells import DRAWN, all_cells, drawn, expected
from tests.monitor.page.conftest import TIMEOUT, Monitor
from tests.monitor.spoken import Speech
from tests.monitor.synthetic import SENTENCE, Engine, Look, finished, started, tokens

# A browser beside everything else that a busy machine does takes its time.
pytestmark = pytest.mark.timeout(240)
expect.set_options(timeout=TIMEOUT * 1000)

PROMPT = "How old is Anna? Ben is three. She is four more than Ben."
STEPS = [
    " Ben is three years old.",
    " Anna is four years older.",
    " So I add three and four.",
    " That must be seven.",
    " Let me check that again.",
    " Seven less four is three.",
    " That is how old Ben is.",
    " So it must be seven.",
]
HOSTILE = "</span><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"


def speak(monitor: Monitor, tokenizer: Path, name: str = "chatcmpl-anna", **more: Any) -> None:
    """A whole request of eleven sentences; the first half looks at the first sentence, the second at the third."""
    speech = Speech(tokenizer, name, PROMPT, **more)
    summaries = speech.start()
    for number, step in enumerate(STEPS):
        target = 2 if number < 4 else speech.prompt_tokens - 4
        summaries += speech.say(step, lambda _, target=target: target)
    monitor.publish([*summaries, *speech.finish()])


@pytest.fixture(scope="module")
def anna(shared: Monitor, tokenizer: Path) -> Monitor:
    """A monitor that holds the request chatcmpl-anna."""
    speak(shared, tokenizer)
    return shared


def until(page: Page, condition: str) -> None:
    """Wait for a condition in JavaScript; Playwright's own way to would evaluate strings, which the policy forbids."""
    end = time.monotonic() + TIMEOUT
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def shown(page: Page, monitor: Monitor, name: str = "chatcmpl-anna") -> None:
    """Open a trace and wait until its heat map is drawn."""
    page.goto(f"{monitor.url}/trace?request_id={name}")
    until(page, DRAWN)


def test_cells_of_the_heat_map_are_those_of_the_trace(anna: Monitor, page: Page) -> None:
    shown(page, anna)
    matrix = expected(anna.trace("chatcmpl-anna"))
    cells = all_cells(page)
    size = len(anna.trace("chatcmpl-anna").sentences)
    assert len(cells) == size**2 >= 121
    assert drawn(page) == matrix
    for _, _, share, colour in cells:
        assert (colour is None) == (not share)
        assert colour is None or math.isclose(colour, math.log10(max(share, 1e-3)), abs_tol=1e-12)


def test_sentences_scores_and_the_curve_are_those_of_the_trace(anna: Monitor, page: Page) -> None:
    shown(page, anna)
    trace = anna.trace("chatcmpl-anna")
    assert page.locator(".sentences .text").all_inner_texts() == [one.text.strip() for one in trace.sentences]
    assert "".join(one.text for one in trace.sentences) == PROMPT + "".join(STEPS)
    scores = np.frombuffer(trace.vertical_score, "<f4").tolist()
    curve = page.evaluate("document.getElementById('curve').data[0].y")
    assert curve == [score if score > 0 else None for score in scores]
    assert page.locator(".sentences .role").all_inner_texts() == ["user"] * 3 + ["reasoning"] * 8
    page.locator(".sentences li").nth(9).click()
    heaviest = max((share, column) for (row, column), share in expected(trace).items() if row == 9)
    expect(page.locator("table.entries tr").first).to_contain_text(f"#{heaviest[1]}")
    expect(page.locator("table.entries tr").first).to_contain_text(f"{100 * heaviest[0]:.3g}"[:3])
    assert page.locator(f"#sentence-{heaviest[1]}").get_attribute("data-level") == "6"


def test_scores_too_small_to_tell_are_said_to_be_small(anna: Monitor, page: Page) -> None:
    def shrink(route: Route) -> None:
        trace = anna.trace("chatcmpl-anna")
        scores = np.frombuffer(trace.vertical_score, "<f4").copy()
        scores[2:4] = 7.7e-6, 2e-4
        trace.vertical_score = scores.tobytes()
        route.fulfill(body=MessageToJson(trace), content_type="application/json")

    page.route("**/api/trace?*", shrink)
    shown(page, anna)
    scores = page.locator(".sentences .score")
    assert scores.all_inner_texts()[2:4] == ["<0.0001", "0.00020"]
    assert float(scores.nth(2).get_attribute("title").removeprefix("anchor score ")) == pytest.approx(7.7e-6)


def test_heads_and_their_curve_are_those_of_the_trace(shared: Monitor, page: Page) -> None:
    engine = Engine()
    summaries = [engine.summary(started=[started("heads")])]
    for number in range(30):
        at, back = 48 + 6 * number, 6 * min(number, 9)
        # Of the four heads, the first looks at one sentence of the output, the others at more and more of them.
        targets = np.array([[50, at - back // 2], [at - 2 * back // 3, at - back]])
        looks = [Look("heads", at + 2, by_head=targets)]
        summaries += [engine.summary(tokens=[tokens("heads", at)]), engine.summary(looks)]
    shared.publish([*summaries, engine.summary(finished=[finished("heads", 228)])])
    shown(page, shared, "heads")
    trace = shared.trace("heads")
    bars = page.evaluate(
        "document.getElementById('heads').data.flatMap(({x, y}) => x.map((name, at) => [name, y[at]]))"
    )
    told = {f"layer {one.head.layer} head {one.head.query_head}": one.kurtosis for one in trace.heads}
    assert dict(bars) == told
    assert len(told) == 4
    assert max(told, key=lambda name: told[name]) == "layer 3 head 0"
    page.get_by_label("Anchor score by").select_option("receiver")
    curve = page.evaluate("document.getElementById('curve').data[0].y")
    receiver = np.frombuffer(trace.receiver_score, "<f4").tolist()
    assert curve == [score if score > 0 else None for score in receiver]
    assert any(curve)


def test_a_trace_grows_while_one_looks(shared: Monitor, tokenizer: Path, page: Page) -> None:
    speech = Speech(tokenizer, "r", PROMPT)
    shared.publish([*speech.start(), *speech.say(STEPS[0] + STEPS[1])])
    page.goto(f"{shared.url}/trace?request_id=r")
    expect(page.locator(".sentences li")).to_have_count(4)
    expect(page.locator("#link")).to_have_text("live")
    page.evaluate("window.loadedOnce = true")
    shared.publish(speech.say("".join(STEPS[2:])))
    expect(page.locator(".sentences li")).to_have_count(10)
    expect(page.get_by_text("● running")).to_be_visible()
    shared.publish(speech.finish())
    expect(page.get_by_text("✓ finished")).to_be_visible()
    expect(page.locator(".sentences li")).to_have_count(11)
    until(page, "document.getElementById('heatmap').data[0].z.length === 11")
    assert drawn(page) == expected(shared.trace("r"))
    assert page.evaluate("window.loadedOnce"), "the page was loaded again"


def test_requests_come_by_themselves_and_open_by_keyboard(monitor: Monitor, tokenizer: Path, page: Page) -> None:
    page.goto(monitor.url)
    expect(page.get_by_role("heading", name="No engine is connected yet")).to_be_visible()
    expect(page.locator("#link")).to_have_text("live")
    for name in ("first", "second", "third"):
        speak(monitor, tokenizer, f"chatcmpl-{name}")
    expect(page.locator("a.row")).to_have_text(["chatcmpl-third", "chatcmpl-second", "chatcmpl-first"])
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to content")).to_be_focused()
    page.locator("a.row").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("a.row").nth(1)).to_be_focused()
    page.wait_for_timeout(5500)  # The list is drawn anew meanwhile.
    expect(page.locator("a.row").nth(1)).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("chatcmpl-second")
    sentences = page.locator(".sentences")
    sentences.focus()
    page.keyboard.press("Home")
    expect(page.locator("#sentence-0")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#sentence-1")).to_have_attribute("aria-selected", "true")
    assert sentences.get_attribute("aria-activedescendant") == "sentence-1"
    assert "sentence=1" in page.url
    page.go_back()
    expect(page.locator("a.row")).to_have_count(3)


def test_the_heat_map_can_be_read_by_keyboard(anna: Monitor, page: Page) -> None:
    shown(page, anna)
    page.locator("#heatmap").focus()
    matrix = expected(anna.trace("chatcmpl-anna"))
    page.keyboard.press("ArrowUp")  # begins at the last cell
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    assert float(page.locator("#cell").get_attribute("data-share") or "nan") == matrix[10, 2]
    expect(page.locator("#cell")).to_contain_text("of sentence 10 (reasoning) is on sentence 2 (user)")
    page.keyboard.press("Enter")
    expect(page.locator("#sentence-10")).to_have_attribute("aria-selected", "true")


def test_filters_of_findings_survive_a_reload(monitor: Monitor, page: Page) -> None:
    for name in ("alpha", "beta"):
        monitor.publish(Engine().request(name, [4] * 14 + [30] * 8))
    page.goto(f"{monitor.url}/events")
    expect(page.locator("a.row")).to_have_text(["beta", "alpha"])
    page.get_by_label("Request id").fill("alp")
    expect(page.locator("a.row")).to_have_text(["alpha"])
    page.get_by_label("Kind").select_option("ANCHOR_SHIFT")
    assert "find=alp" in page.url
    assert "kind=ANCHOR_SHIFT" in page.url
    page.reload()
    expect(page.locator("a.row")).to_have_text(["alpha"])
    expect(page.get_by_label("Kind")).to_have_value("ANCHOR_SHIFT")
    # One that comes now is filtered as well.
    monitor.publish(Engine().request("alpine", [4] * 14 + [30] * 8))
    expect(page.locator("a.row")).to_have_text(["alpine", "alpha"])
    page.get_by_label("At least").select_option("critical")
    expect(page.get_by_role("heading", name="No finding matches")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("a.row")).to_have_count(3)
    page.locator("a.row").first.click()
    expect(page.locator(".finding").first).to_contain_text("anchor shift")
    shift = monitor.trace("alpine").events[0]
    expect(page.locator(f"#sentence-{shift.sentence.index}")).to_have_attribute("aria-selected", "true")


def test_a_download_is_the_trace(anna: Monitor, page: Page) -> None:
    shown(page, anna)
    with page.expect_download() as waiting:
        page.get_by_role("link", name=re.compile("Download")).click()
    assert waiting.value.suggested_filename == "trace-chatcmpl-anna.json"
    content = json.loads(Path(waiting.value.path()).read_text())
    assert ParseDict(content, monitor_pb2.GetTraceResponse()) == anna.trace("chatcmpl-anna")


def test_hostile_text_is_text(monitor: Monitor, tokenizer: Path, page: Page) -> None:
    engine = Engine()
    engine.info.model_name = f"tiny{HOSTILE}"
    speech = Speech(tokenizer, f"id{HOSTILE}", f"Say this: {HOSTILE}. Now!", engine)
    summaries = [*speech.start(), *speech.say(f" Yes. {HOSTILE} I say so." + "".join(STEPS * 3), lambda at: at // 8)]
    monitor.publish([*summaries, *speech.say(" Wait. No!" * 12, lambda at: 2), *speech.finish()])
    monitor.publish(engine.request(f"shift{HOSTILE}", [4] * 14 + [30] * 8))
    page.goto(monitor.url)
    expect(page.locator("a.row")).to_have_text([f"shift{HOSTILE}", f"id{HOSTILE}"])
    page.locator("a.row").nth(1).click()
    expect(page.locator(".sentences")).to_contain_text(HOSTILE)
    until(page, DRAWN)
    page.locator(".sentences li").nth(1).click()
    page.locator("#heatmap").hover(position={"x": 200, "y": 200})
    page.locator("#curve").hover(position={"x": 200, "y": 120})
    page.get_by_role("link", name="Findings").click()
    expect(page.locator("a.row").first).to_contain_text(HOSTILE)
    page.locator("a.row").first.click()
    until(page, DRAWN)
    assert page.evaluate("window.hacked === undefined && !document.querySelector('main script, main img')")


def test_without_text_sentences_have_numbers_and_positions(shared: Monitor, tokenizer: Path, page: Page) -> None:
    speak(shared, tokenizer, "private", with_ids=False)
    shown(page, shared, "private")
    expect(page.get_by_text("Text is private here")).to_be_visible()
    span = shared.trace("private").sentences[4]
    expect(page.locator("#sentence-4")).to_contain_text(f"tokens {span.first_token}–{span.end_token - 1}")


def test_what_is_not_captured_says_why(monitor: Monitor, page: Page) -> None:
    engine = Engine()
    refused = summary_pb2.RequestStarted(request_id="no", prompt_tokens=48, refused_reason="request_limit")
    monitor.publish([engine.summary(started=[refused])])
    page.goto(monitor.url)
    expect(page.get_by_text("not captured: request limit")).to_be_visible()
    page.locator("a.row").click()
    expect(page.get_by_text("setting max_requests")).to_be_visible()
    page.goto(f"{monitor.url}/trace?request_id=gone")
    expect(page.get_by_role("heading", name="The monitor does not hold this request")).to_be_visible()
    for _ in range(2):
        monitor.publish(Engine().request("twice", [4] * 4))
    page.goto(f"{monitor.url}/trace?request_id=twice")
    page.get_by_role("listitem").first.get_by_role("link").click()
    expect(page.locator(".sentences li")).to_have_count(12)


def test_a_restart_of_the_monitor_is_told_and_survived(monitor: Monitor, tokenizer: Path, page: Page) -> None:
    speak(monitor, tokenizer, "chatcmpl-before")
    page.goto(monitor.url)
    expect(page.locator("a.row")).to_have_text(["chatcmpl-before"])
    monitor.kill()
    expect(page.locator("#link")).to_contain_text("does not answer since")
    expect(page.locator("a.row")).to_have_text(["chatcmpl-before"])
    monitor.start()
    expect(page.locator("#link")).to_have_text("live")
    # What the store had kept is still there.
    expect(page.locator("a.row")).to_have_text(["chatcmpl-before"])
    speak(monitor, tokenizer, "chatcmpl-after")
    expect(page.locator("a.row").first).to_have_text("chatcmpl-after")


def test_findings_of_a_monitor_without_the_old_store_are_all_listed(monitor: Monitor, page: Page) -> None:
    def hide(hidden: str) -> None:
        page.evaluate(
            f"Object.defineProperty(document, 'hidden', {{ get: () => {hidden}, configurable: true }});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )

    monitor.publish(Engine().request("before", [4] * 14 + [30] * 8))
    page.goto(f"{monitor.url}/events")
    expect(page.locator("a.row")).to_have_text(["before"])
    hide("true")
    monitor.kill()
    shutil.rmtree(monitor.store.parent)
    monitor.start()
    # The cursor that the page has says nothing to this monitor, and this was raised before the page comes back.
    monitor.publish(Engine().request("meanwhile", [4] * 14 + [30] * 8))
    _, sent = itertools.islice(monitor.api.Subscribe(monitor_pb2.SubscribeRequest(last=1), timeout=TIMEOUT), 2)
    assert sent.event.external_id == "meanwhile"
    hide("false")
    expect(page.locator("a.row")).to_have_text(["meanwhile", "before"])


def test_more_pages_than_allowed_are_told_and_still_fed(
    start: Callable[..., Monitor], tokenizer: Path, page: Page
) -> None:
    monitor = start(max_live_pages=1)
    page.goto(monitor.url)
    expect(page.locator("#link")).to_have_text("live")
    second = page.context.new_page()
    second.goto(monitor.url)
    expect(second.locator("#link")).to_contain_text("as many pages are live as the monitor allows")
    speak(monitor, tokenizer)
    expect(second.locator("a.row")).to_have_text(["chatcmpl-anna"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_system_s_or_the_reader_s(shared: Monitor, page: Page, scheme: str) -> None:
    def brightness() -> float:
        channels = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        return float(sum(channels)) / 3

    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(shared.url)
    assert (brightness() > 200) == (scheme == "light")
    toggle = page.get_by_role("button", name=re.compile("Theme"))
    toggle.click()
    assert brightness() > 200
    toggle.click()
    assert brightness() < 60
    page.reload()
    assert brightness() < 60


def long_request(sentences: int) -> list[summary_pb2.StepSummary]:
    """A request with a row for each sentence, in few messages."""
    engine, at = Engine(), 48
    summaries = [engine.summary(started=[started("long")])]
    for first in range(0, sentences, 500):
        looks = [Look("long", at + 6 * number, (first + number) * 7 % 40) for number in range(500)]
        summaries.append(engine.summary(looks, tokens=[tokens("long", at, SENTENCE * 500)]))
        at += 6 * 500
    return [*summaries, engine.summary(finished=[finished("long", at)])]


def test_a_long_trace_is_drawn_in_coarse_cells_and_exactly_where_one_looks_closer(
    start: Callable[..., Monitor], page: Page
) -> None:
    monitor = start()
    monitor.publish(long_request(3000))
    shown(page, monitor, "long")
    matrix = expected(monitor.trace("long"))
    step = 16
    expect(page.get_by_text(f"Each cell stands for {step} by {step} sentences")).to_be_visible()
    coarse = drawn(page)
    largest: dict[tuple[float, ...], float] = {}
    for (row, column), share in matrix.items():
        cell = tuple(index // step * step + (step - 1) / 2 for index in (row, column))
        largest[cell] = max(largest.get(cell, 0.0), share)
    assert coarse == largest
    page.evaluate(
        "Plotly.relayout('heatmap', {'xaxis.range[0]': -0.5, 'xaxis.range[1]': 99.5, "
        "'yaxis.range[0]': 1099.5, 'yaxis.range[1]': 999.5})"
    )
    until(page, "document.getElementById('heatmap').data[0].y.length === 100")
    exact = drawn(page)
    assert exact == {(r, c): share for (r, c), share in matrix.items() if 1000 <= r < 1100 and c < 100}
    assert exact
    # A key is answered at once although there are thousands of sentences.
    page.locator(".sentences").focus()
    spent = page.evaluate(
        """async () => { const begun = performance.now();
        document.querySelector('.sentences').dispatchEvent(new KeyboardEvent('keydown', {key: 'Home', bubbles: true}));
        await new Promise(requestAnimationFrame); return performance.now() - begun; }"""
    )
    expect(page.locator("#sentence-0")).to_have_attribute("aria-selected", "true")
    assert spent < 2000
