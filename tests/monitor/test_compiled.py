"""What is compiled before a monitor serves is all that it calls."""

import subprocess
import sys

import numpy as np
import pytest

from stream_monitor import compiled
from tests.deploy.installed import ROOT

SERVE = """
import numpy as np

from stream_monitor import compiled
from stream_monitor.monitor import views
from tests.monitor import test_trace_rows as rows

functions = [value for value in vars(compiled).values() if hasattr(value, "signatures")]
compiled.prepare()
for function in functions:
    function.disable_compile()
summaries, _ = rows.conversation(0)
wide = rows.served(summaries, together=3)
for summary in summaries:
    ids = np.frombuffer(summary.rows.block_ids, "<u4")
    summary.rows.ClearField("block_ids")
    summary.rows.narrow_block_ids = ids.astype("<u2").tobytes()
assert np.array_equal(rows.served(summaries, together=1).matrix().shares, wide.matrix().shares)
rows.test_far_keys_of_two_ranks_are_added_up()
assert len(views.full(wide, with_heads=True).heads) == 6
print(len(wide.spans), [len(function.signatures) for function in functions])
"""


def test_everything_is_compiled_before_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", SERVE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentences, signatures = done.stdout.split(maxsplit=1)
    assert int(sentences) > 20
    assert signatures.strip() == str([1] * 11)


def test_an_index_beyond_an_array_raises() -> None:
    """Its numbers come from others: what was not thought of must not read other memory."""
    keys = np.array([3, 500], np.uint32)
    with pytest.raises(IndexError):
        compiled.sentences_of(keys, np.zeros(256, np.int32), np.zeros(1, np.int64))
