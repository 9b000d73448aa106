"""`stream-monitor doctor` and `stream-monitor vllm` on the command line, with vLLM's own configuration and classes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

SLIDING_WINDOW_MODEL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}


Done = subprocess.CompletedProcess[str]


def stream_monitor(*arguments: str, **settings: str) -> Done:
    return subprocess.run(
        [sys.executable, "-m", "stream_monitor", *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        env=os.environ | {f"STREAM_MONITOR_{key.upper()}": value for key, value in settings.items()},
        check=False,
    )


@pytest.fixture(scope="module")
def doctors(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Done]]:
    """What doctor says of some models and settings, by name: each imports vLLM for ten seconds, so all run at once."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SLIDING_WINDOW_MODEL))
    with ThreadPoolExecutor() as pool:
        running = {
            "captured": pool.submit(stream_monitor, "doctor", str(model_dir), heads="0-2", prompt_stride="64"),
            "no layer": pool.submit(stream_monitor, "doctor", str(folder)),
            "bad setting": pool.submit(stream_monitor, "doctor", str(model_dir), layers="99"),
        }
        yield lambda name: running[name].result()


def test_a_model_that_can_be_captured(doctors: Callable[[str], Done]):
    result = doctors("captured")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("Will capture 4 of 30 attention layers, 3 query heads each")
    assert "one row in every 4 tokens, of prompts one in 64," in " ".join(result.stdout.split())
    assert result.stdout.count("watched") - result.stdout.count("not watched") == 4


def test_a_model_without_a_layer_to_capture_gives_every_reason(doctors: Callable[[str], Done]):
    result = doctors("no layer")
    assert result.returncode == 1, result.stderr[-2000:]
    assert "Nothing can be captured." in result.stdout
    assert "layers 0-1: sliding window of 64 tokens" in result.stdout


def test_a_setting_that_fits_no_layer_is_one_line(doctors: Callable[[str], Done]):
    result = doctors("bad setting")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "stream-monitor doctor: layers: 99 does not exist; valid: 0-29"


def test_vllm_refuses_bad_settings_before_it_starts_anything(model_dir: Path):
    unknown = stream_monitor("vllm", str(model_dir), strid="2")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("stream-monitor vllm: STREAM_MONITOR_STRID: no such setting; valid: ")
    assert len(unknown.stderr.splitlines()) == 1
    wrong = stream_monitor("vllm", str(model_dir), stride="0")
    assert wrong.returncode == 2
    assert "stride" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    worker = stream_monitor("vllm", str(model_dir), "--worker-cls", "x.Y")
    assert worker.returncode == 2
    assert "--worker-cls" in worker.stderr
