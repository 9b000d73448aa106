"""The stand-ins of `benchmarks.hooks` are captured like requests of an engine: what is timed is the whole of it."""

from benchmarks.hooks import HEADS_PER_ROW, StandIns, schedule, seconds_per_step


def test_every_row_is_counted_and_every_token_taken_in():
    parts = StandIns(requests=3, stride=4)
    for step in range(33):
        parts.execute_model(schedule(parts.names, step))
        parts.sample_tokens(None).get_output()
    rows = parts.capture.ledger.token_rows
    assert not parts.capture.fault
    assert rows.expected == 3 * 33 * HEADS_PER_ROW
    assert rows.sampled_out == 3 * 24 * HEADS_PER_ROW
    assert [label.position for slot in parts.slots for label in slot.labels]


def test_each_hook_has_its_time():
    found = seconds_per_step(requests=2, steps=16, rounds=2, stride=4)
    assert set(found) == {"taps", "before_step", "after_forward", "after_sampling"}
    assert found["before_step"] > 0
