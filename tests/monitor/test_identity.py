"""Internal request ids as vLLM makes them, and the ids clients ask by."""

import pytest

from stream_monitor.monitor.identity import MAX_EXTERNAL, parse


@pytest.mark.parametrize(
    ("internal", "external", "sample", "aliases"),
    [
        ("chatcmpl-my-req-1-aee6d49e", "chatcmpl-my-req-1", 0, {"my-req-1"}),
        ("cmpl-xyz-0-aee6d49e", "cmpl-xyz", 0, {"xyz", "cmpl-xyz-0", "xyz-0"}),
        ("3_chatcmpl-n-aee6d49e", "chatcmpl-n", 3, {"n", "3_chatcmpl-n"}),
        ("1_cmpl-xyz-2-aee6d49e", "cmpl-xyz", 1, {"xyz", "cmpl-xyz-2"}),
        # Without randomisation there is no suffix.
        ("chatcmpl-my-req-1", "chatcmpl-my-req-1", 0, {"my-req-1"}),
        ("0-aee6d49e", "0", 0, set()),
        ("3_x-aee6d49e", "x", 3, {"3_x"}),
        # Only one suffix is the engine's.
        ("chatcmpl-deadbeef-aee6d49e", "chatcmpl-deadbeef", 0, {"deadbeef"}),
        ("-", "-", 0, set()),
        ("7_", "7_", 0, set()),
    ],
)
def test_forms(internal: str, external: str, sample: int, aliases: set[str]) -> None:
    identity = parse(internal)
    assert (identity.external_id, identity.sample_index) == (external, sample)
    assert aliases <= identity.aliases
    assert external not in identity.aliases


def test_external_ids_are_bounded() -> None:
    assert len(parse("chatcmpl-" + "x" * 1000 + "-aee6d49e").external_id) == MAX_EXTERNAL
