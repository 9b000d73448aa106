"""The causal test: suppression against squares of attention, the choice of controls, and the arithmetic."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from typer.testing import CliRunner

from stream_monitor.cli import app
from stream_monitor.tracing import attention, causal_statistics
from stream_monitor.tracing.attention import IMPLEMENTATION, dense_attention
from stream_monitor.tracing.causal import (
    Measured,
    Outcome,
    TextResult,
    choose_trials,
    measure_text,
    read_text,
    reasoning_candidates,
)
from stream_monitor.tracing.causal_prompt import PromptTest, judge_sentences, prompt_sentences, weigh_prompt
from stream_monitor.tracing.causal_shifts import (
    Interaction,
    Scored,
    Shift,
    choose_shifts,
    interaction,
    place_shift,
    score_sentences,
)
from stream_monitor.tracing.model import TracedModel
from stream_monitor.tracing.pruning import PairCount
from stream_monitor.tracing.ranks import rank_correlation
from stream_monitor.tracing.sentences import Sentence, SentenceRole, sentence_of_tokens, token_counts
from stream_monitor.tracing.suppression import divergences, effect, free_pass, suppressed_hidden
from stream_monitor.tracing.texts import Text, evenly, read_texts
from stream_monitor.tracing.thought_anchors import Anchors
from stream_monitor.tracing.validation import result
from tests.tracing import tiny

LENGTH = 203
SPANS = [(0, 9), (60, 90), (160, 170), (200, 202)]
REASONING = " ".join(f"Step {number} says that {number * 37 % 101} is {number * 53 % 97}." for number in range(60))


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (2.0, 0), (0.0, 45), (2.0, 20)])
@pytest.mark.parametrize("queries", [LENGTH, 43, 1])
@pytest.mark.parametrize("value_dim", [8, 16])
def test_suppression_is_dense_attention_with_logits_of_minus_infinity(
    span: tuple[int, int], softcap: float, window: int, queries: int, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_TILE_LOGITS", 20_000)
    given = tiny.inputs(LENGTH, queries, softcap=softcap, window=window, value_dim=value_dim)
    row, key = given.first_query + torch.arange(queries)[:, None], torch.arange(LENGTH)
    kept = ~((row >= span[1]) & (key >= span[0]) & (key < span[1]))
    expected = tiny.output(given, kept.expand(6, -1, -1))
    found = dense_attention(given, span)
    torch.testing.assert_close(found, expected)
    before = max(0, span[1] - given.first_query)
    torch.testing.assert_close(found[:before], tiny.output(given)[:before])


def test_shares_of_what_is_left_sum_to_one_even_where_a_window_holds_little_else() -> None:
    given = tiny.inputs(LENGTH, window=12, value_dim=16)
    given = replace(given, values=torch.ones_like(given.values))
    out = dense_attention(given, (60, 90))
    torch.testing.assert_close(out, torch.ones_like(out))


def test_a_suppressed_pass_is_the_models_own_with_a_mask(tiny_model: TracedModel) -> None:
    ids, (start, end) = tiny.tokens(LENGTH), (60, 90)
    row, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    hidden = (key > row) | ((row >= end) & (key >= start) & (key < end))
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(hidden, -torch.inf)
    decoder = tiny_model.decoder
    try:
        decoder.set_attn_implementation("eager")
        with torch.inference_mode():
            own = decoder(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0].log_softmax(-1)
            free = decoder(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        decoder.set_attn_implementation(IMPLEMENTATION)
    expected = (free.exp() * (free - own)).sum(-1).numpy()
    found = divergences(tiny_model, free_pass(tiny_model, ids), [(start, end)])[0]
    assert not found[:end].any()
    assert found[end:].min() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-5)


def test_windowed_layers_are_suppressed_like_a_whole_pass(windowed_model: TracedModel) -> None:
    ids, span = tiny.tokens(LENGTH), (100, 110)
    whole = windowed_model.run(ids, lambda inputs: dense_attention(inputs, span))
    found = suppressed_hidden(windowed_model, free_pass(windowed_model, ids), span)
    torch.testing.assert_close(found, whole[span[1] :], rtol=1e-3, atol=1e-4)


def test_nothing_suppressed_changes_nothing_and_each_span_counts_alone(tiny_model: TracedModel) -> None:
    free = free_pass(tiny_model, tiny.tokens(600))
    spans = [(70, 70), (70, 80), (300, 320)]
    together = divergences(tiny_model, free, spans)
    assert abs(together[0]).max() < 1e-5
    for number, span in enumerate(spans):
        np.testing.assert_allclose(together[number], divergences(tiny_model, free, [span])[0], atol=1e-6)
    late = divergences(tiny_model, free, spans, since=310)
    assert not late[:, :310].any()
    np.testing.assert_allclose(late[1, 310:], together[1, 310:], atol=1e-6)
    np.testing.assert_allclose(late[2, 320:], together[2, 320:], atol=1e-6)


def sentences(lengths: list[int], role: SentenceRole = "reasoning") -> list[Sentence]:
    ends = np.cumsum(lengths).tolist()
    return [
        Sentence(end - length, end, role, f"word{number}")
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def curve(scores: list[float], count: int) -> Anchors:
    """Of `count` sentences: those given, then 0; the first is no candidate, the last four have no score."""
    values = np.array(scores + [0.0] * (count - len(scores)))
    values[-4:] = np.nan
    return Anchors(np.zeros((1, 1)), ((1, 0),), values, np.arange(count) > 0)


def test_controls_are_the_nearest_of_their_length_from_the_lower_half() -> None:
    count = 40
    scores = [0.0] * count
    scores[10], scores[20] = 9.0, 8.0
    for number in (9, 11, 19, 21, 2, 3, 4, 5, 6, 24, 25, 26, 27, 28, 29, 30):
        scores[number] = 1.0  # in the upper half, and so neither flagged nor a control, or flagged behind those two
    lengths = [20] * count
    lengths[10], lengths[12], lengths[8], lengths[13] = 20, 26, 14, 25
    trials = choose_trials(curve(scores, count), sentences(lengths))
    first = next(trial for trial in trials if trial.anchor == 10)
    # 12 is too long and 8 too short, 9 and 11 too high; 13 has just 25% more, 7 is as near.
    assert first.controls == (13, 7)
    assert first.window == sentences(lengths)[13 + 4].start
    second = next(trial for trial in trials if trial.anchor == 20)
    assert second.controls == (22, 18)
    assert [trial.anchor for trial in trials[:2]] == [10, 20]


def test_no_control_is_flagged_or_shared_and_windows_lie_behind_all() -> None:
    draw = np.random.default_rng(0)
    for seed in range(50):
        count = 70
        text = sentences(draw.integers(5, 40, count).tolist())
        anchors = curve(np.random.default_rng(seed).exponential(size=count).tolist(), count)
        trials = choose_trials(anchors, text)
        assert 0 < len(trials) <= 3
        ranking = anchors.ranking().tolist()
        used = [control for trial in trials for control in trial.controls]
        assert len(used) == len(set(used)) == 2 * len(trials)
        for trial in trials:
            assert ranking.index(trial.anchor) < math.ceil(len(ranking) / 4)
            tokens = text[trial.anchor].end - text[trial.anchor].start
            for control in trial.controls:
                assert ranking.index(control) >= len(ranking) // 2
                assert abs(text[control].end - text[control].start - tokens) <= 0.25 * tokens
            last = max(trial.anchor, *trial.controls)
            assert 0 not in (trial.anchor, *trial.controls)
            assert trial.window == text[last + 4].start > text[last].end
            assert text[-1].end - trial.window >= 100


def test_an_anchor_without_controls_or_without_a_window_is_passed_over() -> None:
    lengths = [20] * 40
    lengths[10] = 60
    scores = [0.0] * 40
    scores[10], scores[33], scores[15] = 9.0, 8.0, 7.0
    anchors = [trial.anchor for trial in choose_trials(curve(scores, 40), sentences(lengths))]
    assert anchors[0] == 15, "10 is like no other, and 33 leaves 60 tokens"
    assert choose_trials(curve([1.0, 2.0], 6), sentences([20] * 6)) == []


def test_the_first_sentence_is_never_a_candidate() -> None:
    tagged = [Sentence(0, 5, "reasoning", "a"), Sentence(5, 9, "reasoning", "b"), Sentence(9, 12, "answer", "c")]
    assert reasoning_candidates(tagged, 7).tolist() == [False, True, False]
    plain = sentences([5, 4, 6, 3], "prompt")
    assert reasoning_candidates(plain, 6).tolist() == [False, False, True, True]
    assert reasoning_candidates(plain, 0).tolist() == [False, True, True, True]


def test_effects_are_logarithms_of_means_on_the_window() -> None:
    kl = np.array([9.0, 9.0, 0.1, 0.3, 7.0])
    assert effect(kl, 2, 4) == pytest.approx(math.log(0.2))
    assert effect(kl, 3) == pytest.approx(math.log(3.65))
    assert effect(np.full(4, -1e-8), 0) == pytest.approx(math.log(1e-9))


def test_the_interaction_is_what_the_new_anchor_gains_on_the_old() -> None:
    shift = Shift(sentence=9, old=1, new=3, before=(10, 12), after=(12, 14))
    old = np.r_[np.zeros(10), 0.2, 0.2, 0.05, 0.05]
    new = np.r_[np.zeros(10), 0.1, 0.1, 0.4, 0.4]
    # Before, the new weighs half of the old; behind, eight times as much.
    assert interaction(old, new, shift).value == pytest.approx(math.log(8) - math.log(0.5), abs=1e-6)
    assert interaction(new, old, shift).value == pytest.approx(-math.log(16), abs=1e-6)
    assert interaction(old, new, shift).nearer


def place(sentence: int, old: int | None, new: int | None, text: list[Sentence]) -> Shift | None:
    return place_shift(Scored(sentence, 1.0, False, old, new), text)


def test_a_shift_has_its_windows_behind_both_anchors() -> None:
    text = sentences([10] * 40)
    assert place(30, 2, 20, text) == Shift(30, 2, 20, (240, 300), (300, 380))
    assert place(30, 20, 2, text) == Shift(30, 20, 2, (240, 300), (300, 380))
    assert place(30, 2, 5, text) == Shift(30, 2, 5, (220, 300), (300, 380))
    assert place(38, 2, 5, text) == Shift(38, 2, 5, (300, 380), (380, 400))
    assert place(30, 2, 26, text) is None, "no sentence lies between the new anchor and the shift"
    assert place(30, 2, 25, text) is None, "10 tokens are too few"
    assert place(30, 5, 5, text) is place(30, None, 5, text) is place(30, 5, None, text) is None
    assert place(39, 2, 5, text) is None


def test_scores_are_the_detectors_without_the_sink() -> None:
    count = 40
    mass = np.zeros((count, count))
    mass[:, 0] = 0.6
    for number in range(4, count):
        mass[number, 2 if number < 24 else 8] = 0.3
    candidates = np.arange(count) > 0
    tokens = np.full(count, 10)
    scored = score_sentences(mass, candidates, tokens)
    assert [(one.began, one.old, one.new) for one in scored if one.alarm] == [(24, 2, 8)]
    assert max(scored, key=lambda one: one.score).began == 24
    assert scored[0].began > 8, "the detector warms up before"
    steady = np.zeros_like(mass)
    steady[:, 0] = steady[:, 2] = 0.3
    assert not any(one.alarm for one in score_sentences(steady, candidates, tokens))


def test_the_highest_are_tried_and_the_lowest_are_their_controls() -> None:
    text = sentences([10] * 100)
    scores = {30: 0.9, 33: 0.8, 50: 0.7, 60: 0.05, 64: 0.02, 70: 0.6, 80: 0.01, 90: 0.5}
    scored = [Scored(number, score, score > 0.85, 2, 5) for number, score in scores.items()]
    scored.append(Scored(40, 1.0, True, 5, 5))  # It went nowhere.
    shifts = choose_shifts(scored, text)
    assert [(one.sentence, one.alarm, one.control) for one in shifts] == [
        (30, True, False),
        (50, False, False),
        (70, False, False),
        (80, False, True),
        (60, False, True),
        (90, False, True),
    ]


def a_turn_from_the_prompt() -> tuple[list[Sentence], np.ndarray]:
    """Sixty sentences, the first four the prompt; from number 30 on they look at what was written at 10."""
    text = sentences([10] * 60)
    mass = np.zeros((60, 60))
    mass[:, 0] = 0.6
    for number in range(8, 60):
        mass[number, 2 if number < 30 else 10] = 0.3
        mass[number, 4] = 0.05
    return text, mass


def test_the_prompt_is_judged_as_the_live_detector_would() -> None:
    text, mass = a_turn_from_the_prompt()
    judged = judge_sentences(mass, text, 4)
    assert [one.sentence for one in judged] == list(range(8, 60))
    assert any(one.alarm for one in judged)
    tokens = 30 / 70  # of sentences 1 to 3 among 1 to 7
    assert judged[0].fall == pytest.approx(-math.log(0.3 / 0.35 / tokens))
    highest = max(judged[:40], key=lambda one: one.score)
    assert highest.began == 30


def test_what_hiding_the_prompt_does_is_held_against_its_share() -> None:
    text, mass = a_turn_from_the_prompt()
    judged = judge_sentences(mass, text, 4)
    kl = np.repeat(np.random.default_rng(0).uniform(0.9, 1.1, 60), 10)
    kl[300:] *= 0.1
    found = weigh_prompt(kl, judged, text)
    assert found is not None
    turned = 30 - 8
    assert found.reported_at[0] == found.rose_at == turned
    assert found.changes[turned] == pytest.approx(math.log(0.1), abs=0.1)
    assert found.changes[turned - 10] == pytest.approx(0, abs=0.1)
    assert len(found.changes) == len(judged)
    assert [math.isnan(found.changes[place]) for place in (7, 8, -8, -7)] == [True, False, False, True]
    assert found.place > 0.5
    assert found.given_place > 0.5
    unmoved = weigh_prompt(kl[299::-1].repeat(2), judged, text)
    assert unmoved is not None
    assert abs(unmoved.given_place) < 0.4
    assert weigh_prompt(kl, judged[:19], text) is None


def test_where_the_prompt_ends() -> None:
    untagged = [replace(one, role="prompt") for one in sentences([10] * 5)]
    assert prompt_sentences(untagged, 25) == 3
    tagged = [replace(one, role="reasoning" if one.start >= 20 else "prompt") for one in sentences([10] * 5)]
    assert prompt_sentences(tagged, 0) == 2


def test_ranks_correlate_as_scipy_says() -> None:
    draw = np.random.default_rng(0)
    one, other, place = draw.integers(0, 9, 40), draw.normal(size=40), np.arange(40)
    assert rank_correlation(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    assert rank_correlation(one + place, 9 * other + place) > 0.5
    assert abs(rank_correlation(one + place, 9 * other + place, [place])) < 0.3
    assert math.isnan(rank_correlation(place, other, [place]))


def a_text(
    *gains: tuple[float, float], exact: tuple[float, ...] = (1.0, 1.0), shifts: tuple[float, ...] = ()
) -> TextResult:
    """Anchors with effects of 0 against controls `gains` lower; anchors later and longer than their controls."""

    def outcome(lower: tuple[float, ...]) -> Outcome:
        controls = tuple(Measured(3, -gain, 20, 0.1) for gain in lower)
        return Outcome(Measured(5, 0.0, 20 if lower[0] < 0 else 21, 0.3), controls)

    tried = tuple(Interaction(value, alarm=False, control=False, nearer=value > 1) for value in shifts)
    controls = tuple(Interaction(-value, alarm=False, control=True, nearer=True) for value in shifts)
    return TextResult(tuple(map(outcome, gains)), (outcome(exact),), (*tried, *controls), 0, None, PairCount(1, 2, 3))


def test_a_loss_is_held_against_the_same_place_of_other_texts() -> None:
    def text(rose_at: int | None, reported_at: tuple[int, ...], *changes: float) -> TextResult:
        return replace(a_text((1.0, 1.0)), prompt=PromptTest(0.5, 0.5, 0.5, changes, rose_at, reported_at))

    nan = math.nan
    texts = [
        text(4, (5, 6), nan, nan, -1.0, -1.0, -5.0, -4.0, nan),
        text(3, (0,), nan, -3.0, -2.0, -2.0, -1.0, -0.5, -0.5, -0.4, -9.0),
        text(None, (), nan, nan, nan, nan),
        replace(a_text((1.0, 1.0)), prompt=None),
    ]
    # Of the second text, places 2 to 6: -2, -2, -1, -0.5, -0.5; of the first, places 1 to 5: -1, -1, -5, -4.
    assert causal_statistics.prompt_losses(texts, reported=False) == [(-5.0, -4.0), (-2.0, 0.5)]
    # The second's finding has no room before it.
    assert causal_statistics.prompt_losses(texts, reported=True) == [(-4.0, -3.5)]
    assert causal_statistics.prompt_losses(texts[:1], reported=True) == [], "nothing to hold it against"


def test_figures_of_pairs() -> None:
    texts = [a_text((1.0, 3.0), (-1.0, -0.5), shifts=(0.5, 2.0)), a_text((4.0, -2.0), exact=(1.0, -1.0), shifts=(1.0,))]
    assert causal_statistics.median_ratio("kept")(texts) == pytest.approx(1.0)  # of 2, -0.75 and 1
    assert causal_statistics.higher_share("kept")(texts) == pytest.approx(3 / 6)
    assert causal_statistics.higher_share("exact")(texts) == pytest.approx(3 / 4)
    assert math.isnan(causal_statistics.handicapped_share("kept")(texts)), "all controls are earlier"
    later = (Measured(7, -1.0, 20, 0.1), Measured(8, 1.0, 20, 0.1), Measured(2, -1.0, 20, 0.1))
    other = replace(texts[0], kept=(Outcome(texts[0].kept[0].anchor, later),))
    assert causal_statistics.handicapped_share("kept")([*texts, other]) == 0.5
    assert "nearer to what is predicted: 50%" in result("m", [other], 0)
    assert causal_statistics.share_of_exact(texts) == pytest.approx(3 / 6 / (3 / 4))
    assert causal_statistics.median_interaction()(texts) == 1.0
    assert causal_statistics.median_interaction(control=True)(texts) == -1.0
    assert causal_statistics.median_interaction(nearer=True)(texts) == 2.0
    assert causal_statistics.median_interaction(nearer=False)(texts) == 0.75
    assert causal_statistics.positive_share(texts) == 1.0
    tests = [PromptTest(0.5, 0.1, 0.2, (), None, ()), PromptTest(0.1, math.nan, 0.2, (), None, ()), None]
    prompts = [replace(texts[0], prompt=one) for one in tests]
    assert causal_statistics.mean_of_prompt_tests("agreement")(prompts) == pytest.approx(0.3)
    assert causal_statistics.mean_of_prompt_tests("given_place")(prompts) == 0.1
    assert math.isnan(causal_statistics.median_interaction()([a_text((1.0, 1.0))]))
    shares = {name: causal_statistics.trivial_share(name)(texts) for name in causal_statistics.TRIVIAL}
    assert shares == pytest.approx(
        # By length the two pairs of the second anchor are ties.
        {"latest": 3 / 6, "earliest": 3 / 6, "longest": (3 + 2 * 0.5) / 6, "overlap": 3 / 6}
    )
    assert causal_statistics.trivial_share("earliest")([a_text((1.0, 3.0))]) == 0
    assert math.isnan(causal_statistics.higher_share("kept")([]))
    assert math.isnan(causal_statistics.share_of_exact([a_text((1.0, 1.0), exact=(-1.0, -1.0))]))


def test_intervals_draw_whole_texts() -> None:
    # As draws of single anchors the interval would be a fifth as wide.
    texts = [a_text(*[(1.0, 1.0)] * 25), a_text(*[(-1.0, -1.0)] * 25)]
    found = causal_statistics.figure(texts, causal_statistics.higher_share("kept"), 0)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    same = causal_statistics.figure([a_text((2.0, 2.0))] * 4, causal_statistics.median_ratio("kept"), 0)
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)


def test_the_result_says_which_way_it_went() -> None:
    better = result("m", [a_text((1.0, 1.0))] * 5, 0)
    assert "2.72 times as much" in better
    assert "100% of the pairs" in better
    assert "chance 50%; anchors by exact attention 100% (ratio 1.00)" in better
    assert "depend on more than on one" in better
    assert "depend on less than on one" in result("m", [a_text((-1.0, -1.0))] * 5, 0)
    unclear = result("m", [a_text((-1.0, -1.0)), a_text((1.0, 1.0))], 0)
    assert "depend on no more, as far as can be told, than on one" in unclear
    assert "Only 2 texts" in unclear


def test_a_text_is_measured(tiny_model: TracedModel) -> None:
    ids, prompt = Text("t", "What is it? ", REASONING).tokens(tiny_model, 1_200)
    assert (len(ids), prompt) == (1_200, 12)
    reading = read_text(tiny_model, ids, prompt)
    assert not reading.kept.candidates[0]
    unread = 1 - reading.mass.sum(1)
    assert ((unread > -1e-5) & (unread < 0.9)).all()
    assert reading.mass[3, 4:].sum() == 0
    np.testing.assert_array_equal(np.bincount(sentence_of_tokens(reading.sentences)), token_counts(reading.sentences))
    found = measure_text(tiny_model, ids, prompt)
    assert found.kept
    assert found.exact
    kl = divergences(tiny_model, reading.free, [reading.span(found.kept[0].anchor.sentence)])[0]
    trial = choose_trials(reading.kept, reading.sentences)[0]
    assert trial.anchor == found.kept[0].anchor.sentence
    assert found.kept[0].anchor.effect == pytest.approx(math.log(kl[trial.window :].mean() + 1e-9), abs=1e-3)
    assert 0 < found.kept[0].anchor.overlap < 1
    assert found.interactions == ()
    tried = measure_text(tiny_model, ids, prompt, with_detectors=True)
    assert tried.kept == found.kept
    assert found.prompt is None
    assert tried.prompt is not None
    assert -1 <= tried.prompt.agreement <= 1
    assert measure_text(tiny_model, ids, 0, with_detectors=True).prompt is None, "no sentence but the first"
    assert {one.control for one in tried.interactions} == {False, True}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_texts_are_read_and_spread(tmp_path: Path) -> None:
    rows = [{"id": f"t{number}", "prompt": "p", "reasoning": "r"} for number in range(7)]
    texts = read_texts(lines(tmp_path / "texts.jsonl", *rows, ""))
    assert [text.name for text in evenly(texts, 3)] == ["t0", "t3", "t6"]
    assert evenly(texts, 99) == texts
    assert evenly(texts[:1], 2) == texts[:1]


def validate(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    done = CliRunner().invoke(app, ["validate", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_a_model_is_validated(tiny_folder: Path, tmp_path: Path) -> None:
    texts = lines(tmp_path / "t.jsonl", *[{"prompt": f"Question {n}? ", "reasoning": REASONING} for n in range(2)])
    code, text, errors = validate("--model", tiny_folder, "--texts", texts, "--tokens", 1_000)
    assert code == 0, errors
    assert "anchors in 2 texts" in text
    assert "times as much as hiding a control" in text
    assert "What it does not mean" in text
    assert "text 2 of 2" in errors


@pytest.mark.parametrize(
    ("rows", "arguments", "named"),
    [
        (None, (), "--texts is missing"),
        (None, ("--texts", "/nowhere"), "cannot read /nowhere: No such file or directory"),
        (["{"], (), "line 1: not JSON"),
        (
            ['{"prompt": "a", "reasoning": "b"}', "[1]"],
            (),
            "line 2: not an object with the strings prompt and reasoning",
        ),
        ([{"prompt": "a"}], (), "line 1: not an object with the strings"),
        ([{"prompt": "a", "reasoning": " "}], (), "line 1: the reasoning is empty"),
        ([""], (), "holds no texts"),
        ([{"prompt": "a", "reasoning": "b"}], (), "no text has an anchor"),
        ([{"prompt": "a", "reasoning": "b"}], ("--model", "/nowhere"), "/nowhere is not the folder"),
        ([{"prompt": "a", "reasoning": "b"}], ("--count", 1), "--count is 1; valid: 2 or more"),
        ([{"prompt": "a", "reasoning": "b"}], ("--tokens", 0), "--tokens is 0; valid: 1 or more"),
    ],
)
def test_bad_input_is_one_line(
    rows: list[object] | None, arguments: tuple[object, ...], named: str, tiny_folder: Path, tmp_path: Path
) -> None:
    given = () if rows is None else ("--texts", lines(tmp_path / "t.jsonl", *rows))
    code, text, errors = validate("--model", tiny_folder, *given, *arguments)
    assert (code, text) == (2, "")
    failed = [line for line in errors.splitlines() if line.startswith("stream-monitor: ")]
    assert len(failed) == 1
    assert named in failed[0]
    assert "Traceback" not in errors


def test_the_package_does_not_need_the_benchmarks() -> None:
    code = (
        "import sys, stream_monitor.tracing.validation\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'benchmarks'])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "[]"
