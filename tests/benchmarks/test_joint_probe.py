"""The probe of joints: it finds what one head shows and the mean hides, in texts that it did not see, and nothing in
noise."""

import numpy as np

from benchmarks.joint_probe import BEFORE, TOGETHER, Example, Found, judge, moves, reading
from stream_monitor.anchors.calibration import Served
from stream_monitor.anchors.heads import Head, HeadShares
from stream_monitor.records import Role

PROMPT, SENTENCES, JOINT, HEADS = 2, 24, 16, 6
PROBLEMS, EACH = 5, 10


def sentence(index: int, far: np.ndarray) -> HeadShares:
    """Each head reads so much of the first sentence, and a tenth of its own and of the one before."""
    heads = np.tile(np.arange(HEADS, dtype=np.uint8), 3)
    columns = np.repeat(np.array([0, index - 1, index], np.uint32), HEADS)
    return HeadShares(heads, columns, np.concatenate([far, np.full(2 * HEADS, 0.1)]).astype(np.float32))


def request(draw: np.random.Generator, joint: int | None, tells: bool = True, order: tuple[int, ...] = ()) -> Served:
    """Behind the joint one head reads less of old sentences and another as much more."""
    shares = []
    for index in range(PROMPT, PROMPT + SENTENCES):
        far = 0.3 * np.exp(draw.normal(0, 0.3, HEADS))
        if joint is not None and index >= joint and tells:
            far[1], far[4] = far[1] / 3, far[4] + far[1] * 2 / 3
        shares.append((index, sentence(index, far)))
    heads: list[Head] = [(7, head) for head in range(HEADS)]
    if order:
        heads = [heads[place] for place in order]
    size = PROMPT + SENTENCES
    roles = np.array([Role.USER] * PROMPT + [Role.REASONING] * SENTENCES, np.uint8)
    return Served(PROMPT, heads, roles, 20 * np.arange(size), np.full(size, 5), shares, None)


def examples(tells: bool = True) -> list[Example]:
    draw = np.random.default_rng(0)
    return [
        Example(problem, request(draw, None), request(draw, JOINT, tells), JOINT)
        for problem in range(PROBLEMS)
        for _ in range(EACH)
    ]


def judged(some: list[Example]) -> list[Found]:
    found = [one for one in judge(some, 0.1, within=3) if one is not None]
    assert len(found) == len(some)
    return found


def test_joints_of_unseen_problems_are_found() -> None:
    found = judged(examples())
    assert np.mean([one.hit for one in found]) > 0.9
    assert np.mean([one.false for one in found]) < 0.2


def test_nothing_is_found_where_there_is_nothing() -> None:
    found = judged(examples(tells=False))
    assert np.mean([one.hit for one in found]) < 0.2
    assert np.mean([one.false for one in found]) < 0.2


def test_an_answer_belongs_to_its_example() -> None:
    some = examples()
    shuffled = [some[place] for place in np.random.default_rng(1).permutation(len(some))]
    by_id = {id(one): found for one, found in zip(some, judge(some, 0.1, 3), strict=True)}
    assert [by_id[id(one)] for one in shuffled] == judge(shuffled, 0.1, 3)


def test_what_is_found_too_late_does_not_count() -> None:
    # Nothing begins at this place: what there is to be found is five sentences behind it.
    early = [Example(one.problem, one.untouched, one.joined, JOINT - 5) for one in examples()]
    assert np.mean([one.hit for one in judged(early)]) < 0.2


def test_what_is_too_short_is_not_judged() -> None:
    some = examples()
    some[3] = Example(some[3].problem, some[3].untouched, some[3].joined, PROMPT + SENTENCES)
    assert [one is None for one in judge(some, 0.1, 3)] == [place == 3 for place in range(len(some))]
    of_two_problems = [one for one in examples() if one.problem < 2]
    assert judge(of_two_problems, 0.1, 3) == [None] * len(of_two_problems)


def test_a_reading_is_by_distance() -> None:
    shares = HeadShares(
        np.array([0, 0, 1, 1, 1], np.uint8), np.array([2, 9, 6, 7, 9], np.uint32), np.array([1, 2, 4, 8, 16], "f4")
    )
    # Anchors are at least four sentences back.
    assert reading(10, shares, 2).tolist() == [[1, 4], [2, 24], [0, 0]]
    assert reading(9, shares, 2).tolist() == [[1, 0], [0, 12], [2, 16]]


def test_a_move_is_of_the_heads_asked_for() -> None:
    draw = np.random.default_rng(0)
    one = request(draw, None)
    found = moves(one, [(7, 4), (7, 1)])
    assert list(found) == list(range(PROMPT + BEFORE + TOGETHER - 1, PROMPT + SENTENCES))
    log = np.log(np.array([reading(index, shares, HEADS)[0, [4, 1]] for index, shares in one.shares]) + 1e-3)
    np.testing.assert_allclose(
        found[PROMPT + BEFORE + TOGETHER - 1][:2], log[BEFORE : BEFORE + TOGETHER].mean(0) - log[:BEFORE].mean(0)
    )
