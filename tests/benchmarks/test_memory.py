"""What a row takes is what the formulas say, of whatever model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("layers", "heads", "top_k"), [(24, 14, 8), (3, 4, 16)])
def test_the_formulas_are_those_of_the_products_own_code(layers: int, heads: int, top_k: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "num_attention_heads": heads}))
    command = [sys.executable, "-m", "benchmarks.memory", "--model", tmp_path, "--top-k", str(top_k)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["held_bytes"] == layers * heads * (9 * top_k + 5 * 3 + 8) + 4 * layers
    assert figures["sent_bytes"] < figures["sent_message_bytes"] < figures["sent_bytes"] + 100
