"""Labels of rows and lifecycle of requests, from the scheduler's words alone."""

from dataclasses import replace

import numpy as np
import pytest

from stream_monitor.engine.compat.schedule import NewRequest, ScheduledRequest
from stream_monitor.engine.requests import MOST_WAITING, RequestTable
from stream_monitor.engine.vocabulary import PromptRoles
from stream_monitor.records import Phase, Role


class OneUserTurn(PromptRoles):
    """Every prompt is one user turn."""

    def __init__(self) -> None: ...

    def spans(self, prompt_token_ids):
        return np.zeros(1, np.uint32), np.full(1, Role.USER, np.uint8)


def table(**changes: object) -> RequestTable:
    options = {
        "stride": 1,
        "max_requests": 8,
        "client_may_disable": False,
        "token_flags": np.arange(100, dtype=np.uint8),
        "roles": OneUserTurn(),
        "send_token_ids": False,
    }
    return RequestTable(**(options | changes))


def new(request_id: str = "a", prompt: int = 10, **extra: object) -> NewRequest:
    return NewRequest(request_id, list(range(prompt)), prompt, extra or None)


def scheduled(computed: int, tokens: int, outputs: int, request_id: str = "a") -> ScheduledRequest:
    return ScheduledRequest(request_id, computed, tokens, outputs, ())


def test_a_prompt_in_chunks_then_decoding():
    requests = table()
    requests.start(new())
    labels = [
        requests.label(scheduled(0, 4, 0)),
        requests.label(scheduled(4, 6, 0)),
        requests.label(scheduled(10, 1, 1)),
        requests.label(scheduled(11, 1, 2)),
    ]
    assert [(label.position, label.phase) for label in labels] == [
        (3, Phase.PREFILL_CHUNK),
        (9, Phase.PREFILL_END),
        (10, Phase.DECODE),
        (11, Phase.DECODE),
    ]
    assert all(label.sampled and label.attempt == 0 and not label.refused_reason for label in labels)


def test_of_a_prompt_rows_are_counted_back_from_the_end_of_each_chunk():
    requests = table(prompt_stride=16)
    requests.start(replace(new(), prompt_tokens=100))

    def rows(*step):
        return [(row.position, row.after, row.phase, row.sampled) for row in requests.rows(scheduled(*step))]

    chunk, end = Phase.PREFILL_CHUNK, Phase.PREFILL_END
    assert rows(0, 40, 0) == [(7, 32, chunk, True), (23, 16, chunk, True), (39, 0, chunk, True)]
    assert rows(40, 16, 0) == [(55, 0, chunk, True)], "too short for one more"
    assert rows(56, 44, 0) == [(67, 32, chunk, True), (83, 16, chunk, True), (99, 0, end, True)]
    assert rows(100, 1, 1) == [(100, 0, Phase.DECODE, True)]
    # Preempted after 30 tokens: what it wrote is no prompt, though it is read again.
    requests.resume("a")
    assert rows(60, 70, 30) == [
        (65, 64, chunk, True),
        (81, 48, chunk, True),
        (97, 32, chunk, True),
        (129, 0, end, True),
    ]


def test_the_governor_thins_out_rows_of_prompts_and_no_ends_of_chunks():
    requests = table(prompt_stride=16)
    requests.start(replace(new(), prompt_tokens=100))
    requests.factor = 2
    rows = requests.rows(scheduled(0, 100, 0))
    assert [(row.after, row.sampled, row.governed) for row in rows] == [
        (96, True, False),
        (80, False, True),
        (64, True, False),
        (48, False, True),
        (32, True, False),
        (16, False, True),
        (0, True, False),
    ]


def test_rows_of_an_unknown_request_are_refused():
    (row,) = table(prompt_stride=16).rows(scheduled(0, 40, 0))
    assert row.refused_reason == "unknown_request"


def test_a_resumed_request_recomputes_chunks_before_it_samples_again():
    requests = table()
    requests.start(new())
    requests.resume("a")
    chunk, end = requests.label(scheduled(0, 8, 5)), requests.label(scheduled(8, 7, 5))
    assert (chunk.phase, chunk.attempt, chunk.position) == (Phase.PREFILL_CHUNK, 1, 7)
    assert (end.phase, end.attempt, end.position) == (Phase.PREFILL_END, 1, 14)


def test_a_prompt_wholly_in_the_prefix_cache_still_ends_a_prefill():
    requests = table()
    requests.start(new())
    assert requests.label(scheduled(9, 1, 0)).phase is Phase.PREFILL_END


def test_one_row_in_a_stride_is_sampled_and_every_end_of_a_chunk_or_prompt():
    requests = table(stride=4)
    requests.start(new())
    sampled = []
    for n in range(12):
        requests.step = 3 + n
        if requests.label(scheduled(9 + n, 1, n)).sampled:
            sampled.append(9 + n)
    assert sampled == [9, 10, 14, 18]
    assert requests.label(scheduled(0, 5, 0)).sampled, "the ends of prompt chunks are all taken"


@pytest.mark.parametrize("factor", [1, 2])
def test_requests_are_sampled_in_the_same_steps_whenever_they_came(factor):
    requests = table(stride=4)
    requests.factor = factor
    sampled = {"a": [], "b": []}
    for step in range(1, 26):
        requests.step = step
        for request_id, first in (("a", 1), ("b", 7)):
            if step == first:
                requests.start(new(request_id))
            n = step - first
            if n > 0 and requests.label(scheduled(9 + n, 1, n, request_id)).sampled:
                sampled[request_id].append(step)
            elif n == 0:
                assert requests.label(scheduled(9, 1, 0, request_id)).sampled
    assert sampled["a"] == list(range(4 * factor, 26, 4 * factor))
    assert sampled["b"] == [step for step in sampled["a"] if step > 7]


def test_a_request_that_was_preempted_joins_the_others_again():
    requests = table(stride=4)
    requests.start(new())
    requests.step = 1
    requests.label(scheduled(9, 1, 0))
    requests.step = 6
    requests.resume("a")
    assert requests.label(scheduled(0, 12, 2)).sampled, "its prompt and output are read again"
    requests.step = 7
    assert not requests.label(scheduled(12, 1, 3)).sampled
    requests.step = 8
    assert requests.label(scheduled(13, 1, 4)).sampled


def test_tokens_come_out_once_in_runs_of_positions():
    requests = table(send_token_ids=True)
    requests.start(new())
    requests.add_tokens("a", 10, [5])
    requests.add_tokens("a", 11, [6, 250])
    (run,) = requests.take_tokens()
    assert (run.request_id, run.first_position, run.flags) == ("a", 10, bytes([5, 6, 0]))
    assert np.frombuffer(run.token_ids, "<u4").tolist() == [5, 6, 250]
    assert requests.take_tokens() == []


def test_tokens_that_do_not_go_on_keep_their_positions():
    requests = table(send_token_ids=True)
    requests.start(new())
    for position, token_ids in ((10, [5]), (11, [6]), (14, [7, 8]), (15, [9])):
        requests.add_tokens("a", position, token_ids)
    found = [(run.first_position, run.flags, run.token_ids) for run in requests.take_tokens()]
    assert found == [
        (first, bytes(ids), np.array(ids, "<u4").tobytes()) for first, ids in ((10, [5, 6]), (14, [7, 8]), (15, [9]))
    ]
    assert requests.take_tokens() == []
    requests.add_tokens("a", 16, [1])
    requests.add_tokens("a", 20, [2])
    last, finished = requests.finish("a")
    assert [(run.first_position, run.flags) for run in last] == [(16, bytes([1])), (20, bytes([2]))]
    assert finished.total_tokens == 21


def test_tokens_wait_for_a_row_of_their_request_but_not_for_ever():
    requests = table()
    requests.start(new("a"))
    requests.start(new("b"))
    for position in range(10, 10 + MOST_WAITING - 1):
        requests.add_tokens("a", position, [5])
        requests.add_tokens("b", position, [5])
    (run,) = requests.take_tokens({"b"})
    assert (run.request_id, len(run.flags)) == ("b", MOST_WAITING - 1)
    assert requests.take_tokens(()) == []
    requests.add_tokens("a", 10 + MOST_WAITING - 1, [5])
    (run,) = requests.take_tokens(())
    assert (run.request_id, run.first_position, len(run.flags)) == ("a", 10, MOST_WAITING)


def test_finishing_gives_the_last_tokens_and_the_length():
    requests = table()
    requests.start(new())
    requests.add_tokens("a", 10, [5])
    last, finished = requests.finish("a")
    assert [run.flags for run in last] == [bytes([5])]
    assert finished.total_tokens == 11
    assert requests.finish("a") is None
    assert requests.take_tokens() == []


def test_token_ids_stay_in_the_engine_unless_asked_for():
    started = table().start(new())
    assert started.prompt_token_ids == b""
    assert started.prompt_flags == bytes(range(10))


def test_the_request_limit_refuses_the_next_and_frees_with_the_first():
    requests = table(max_requests=1)
    assert requests.start(new("a")).refused_reason == ""
    assert requests.start(new("b")).refused_reason == "request_limit"
    assert requests.label(scheduled(0, 10, 0, "b")).refused_reason == "request_limit"
    requests.finish("a")
    assert requests.start(new("c")).refused_reason == ""


def test_a_request_added_again_begins_a_new_attempt():
    requests = table(max_requests=1)
    requests.start(new())
    assert requests.start(new()) is None, "with the same prompt it is preempted and runs again: known already"
    assert requests.label(scheduled(0, 10, 0)).attempt == 1
    longer = replace(new(), prompt_tokens=12, prompt_token_ids=list(range(12)))
    assert requests.start(longer).prompt_tokens == 12, "with another it is a session that goes on"
    assert requests.label(scheduled(0, 12, 0)).attempt == 2


def test_tokens_past_the_end_do_not_count():
    requests = table()
    requests.start(replace(new(), stop_token_ids=frozenset({3})))
    requests.add_tokens("a", 10, [5])
    requests.add_tokens("a", 11, [3])
    requests.add_tokens("a", 12, [6])  # sampled by asynchronous scheduling, which did not know yet
    (run,) = requests.take_tokens()
    assert (run.first_position, len(run.flags)) == (10, 2)
    _, finished = requests.finish("a")
    assert finished.total_tokens == 12


def test_rows_of_an_unknown_request_are_refused_not_guessed():
    assert table().label(scheduled(10, 1, 1)).refused_reason == "unknown_request"


def test_a_request_whose_id_no_receiver_takes_is_refused_and_never_named():
    requests, long = table(), "x" * 1025
    assert requests.start(new(long)) is None
    assert requests.label(scheduled(0, 10, 0, long)).refused_reason == "id_too_long"
    requests.add_tokens(long, 10, [5])
    assert requests.take_tokens() == []
    assert requests.finish(long) is None


def test_embedded_prompts_are_refused():
    assert table().start(NewRequest("a", None, 10, None)).refused_reason == "prompt_embeds"


def test_labels_of_the_client():
    started = table().start(new(stream_monitor_untrusted=[2, 5]))
    assert np.frombuffer(started.role_starts, "<u4").tolist() == [0, 2, 5]
    assert list(started.roles) == [Role.USER, Role.UNTRUSTED, Role.USER]
    requests = table()
    requests.start(new(stream_monitor_untrusted="2,5"))
    assert requests.refused_arguments == {"stream_monitor_untrusted:malformed": 1}


def test_whose_a_request_is():
    requests = table(tenant_argument="whose")
    assert requests.start(new(whose="acme")).tenant == "acme"
    # Also of one that is not captured: that it ran is its tenant's, too.
    assert requests.start(NewRequest("b", None, 10, {"whose": "acme"})).tenant == "acme"
    assert table().start(new(whose="acme")).tenant == ""


@pytest.mark.parametrize("may", [True, False])
def test_only_with_leave_may_a_client_switch_off(may):
    reason = table(client_may_disable=may).start(new(stream_monitor_disable=1)).refused_reason
    assert reason == ("client_disabled" if may else "")
