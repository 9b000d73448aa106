"""Does the monitor stay right while everything around it breaks? A real engine serves, with a fault in each round.

Rounds of chats and texts, short and long, under the same ids, some ended from outside and some preempted for want of KV
blocks, are served by two engines step by step under one schedule: plain vLLM, and vLLM with the plug-in. While the
second one serves, something breaks: the monitor is killed, hangs, is slow, has no disk or no memory, its store is
damaged; the publisher is killed, its connection dies; the engine is killed and asked the same again. After each round:

* both engines scheduled and sampled the same;
* the attention of every sentence of every trace is that of its prompt served alone, and its text the engine's answer;
* every finding in a trace came to the subscriber, once, and can be asked for again;
* the monitor serves, and each row that was expected has an outcome.

The detectors' thresholds are below every score here, so that there are many findings to lose. Default: one round for
each fault. `--full`: half an hour, a fault a minute.
"""

import os
import random
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.engine_process import EngineEnded, EngineProcess
from benchmarks.report import Report, run
from benchmarks.soak.checks import Comparison, Reference
from benchmarks.soak.faults import FAULTS, Fault
from benchmarks.soak.sidecar import Sidecar, known, wait_for
from benchmarks.soak.traffic import NEW_TOKENS, Asked, engine_arguments, is_model, make_round, prompts
from stream_monitor.anchors.panel import Kind
from stream_monitor.anchors.profile import make_profile
from stream_monitor.client import MonitorError

ENGINE = "benchmarks.soak.engine"
STREAM_WORKER = "stream_monitor.engine.worker.StreamWorker"
FULL_SECONDS, FAULT_SECONDS = 1800.0, 60.0
STRIKE_AFTER = 2.0
"""Seconds into a round."""
STRIDE = 2
"""One row in so many positions is captured."""
MOST_TURNS = 4
"""In which a prompt served alone has its rows captured at each position in turn."""
LOW = -1e6
"""Threshold of each detector: no score is as low."""
ROUNDING = 1e-3
"""What a sentence's attention may differ by from the same rows' of its prompt alone, in float32."""


class Soak:
    """Engines, monitor, and what was seen so far."""

    def __init__(
        self, plain: EngineProcess, stream: EngineProcess, sidecar: Sidecar, asked: list[list[int]], model: Path
    ) -> None:
        from transformers import AutoTokenizer

        self.plain, self.stream, self.sidecar, self._prompts = plain, stream, sidecar, asked
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.compared = Comparison()
        self.references: list[Reference] = []
        self.counts = dict.fromkeys(
            ("requests", "preempted", "aborted", "outputs differing", "findings lost", "not recovered", "gaps"), 0
        )

    def make_references(self) -> None:
        """Each prompt alone, until its rows were captured at each of the positions that the stride may give."""
        for number in range(len(self._prompts)):
            found: dict[int, Reference] = {}
            for turn in range(MOST_TURNS):
                alone = self._serve_alone(f"alone{number}.{turn}", number)
                found[int(np.frombuffer(alone.traces[0].row_positions, "<u4")[-1]) % STRIDE] = alone
                if len(found) == STRIDE:
                    break
                for _ in range(turn):  # each is of one step
                    self.stream.ask("drain")
            else:
                raise RuntimeError(f"prompt {number} alone never had its rows captured at other positions")
            first, *_ = found.values()
            self.references.append(Reference(first.tokens, [each.traces[0] for each in found.values()]))

    def _serve_alone(self, request_id: str, prompt: int) -> Reference:
        asked = Asked(request_id, prompt, NEW_TOKENS, 0, None)
        answer = self.stream.ask("run", asked=[asdict(asked)], prompts=self._prompts)
        status = self.stream.ask("drain")
        if not self._wait_whole(status):
            raise RuntimeError(f"nothing of a prompt served alone arrives: {status['reason']}")
        return Reference(answer["tokens"][request_id], [self.sidecar.trace(request_id, status["instance"])])

    def round(self, asked: list[Asked], fault: Fault | None) -> None:
        """Serve a round twice, with the fault while the second engine serves, and check."""
        request = {"asked": [asdict(each) for each in asked], "prompts": self._prompts}
        plain = self.plain.ask("run", **request)
        striking = threading.Timer(STRIKE_AFTER, fault.strike, (self.sidecar, self.stream.pid)) if fault else None
        if striking:
            striking.start()
        stream = None
        with suppress(EngineEnded):
            stream = self.stream.ask("run", **request)
        if striking:
            striking.join()
        if stream is None or (fault and fault.ends_engine):
            self.stream.stop()
            self.stream.start()
            stream = self.stream.ask("run", **request)
        status = self.stream.ask("drain")
        differing = plain["schedule"] != stream["schedule"] or plain["tokens"] != stream["tokens"]
        self.counts["outputs differing"] += differing
        self.counts["requests"] += len(asked)
        self.counts["preempted"] += plain["preempted"]
        self.counts["aborted"] += sum(each.abort_at is not None for each in asked)
        if not status["capturing"] or not self._wait_whole(status):
            self.counts["not recovered"] += 1
            print(f"not recovered: {status['reason']}", flush=True)
        self._check(asked, stream["tokens"], status["instance"], fault)

    def _wait_whole(self, status: dict[str, Any]) -> bool:
        """Until the monitor has the account, and each row an outcome; a killed engine's get theirs in a while."""
        rows = status["ledger"]
        told = rows["token_rows"]["expected"] + rows["chunk_rows"]["expected"]

        def whole() -> bool:
            expected, became = (self.sidecar.metric(f"stream_monitor_rows{name}_total") for name in ("_expected", ""))
            return expected == became and expected >= told

        return wait_for(whole)

    def _check(self, asked: list[Asked], tokens: dict[str, list[int]], instance: str, fault: Fault | None) -> None:
        heard = self.sidecar.heard
        for each in asked:
            own, other = self.references[each.prompt], self.references[each.prompt - 1]
            try:
                trace = self.sidecar.trace(each.request_id, instance)
            except MonitorError:
                continue  # killed before anything of it was stored
            text = self._tokenizer.decode(tokens[each.request_id])
            self.compared.hold(trace, tokens[each.request_id], own, other, text)
            told = {known(event) for event in trace.events}
            if not wait_for(lambda told=told: told <= heard.findings.keys(), 20):  # type: ignore[misc]
                self.counts["findings lost"] += len(told - heard.findings.keys())
        if fault is None or not fault.forgets:
            self.counts["findings lost"] += len(self.sidecar.forgotten())
        self.counts["gaps"] = heard.gaps


def low_thresholds(sidecar: Sidecar, soak: Soak, folder: Path) -> None:
    """Start the monitor again with a profile by which whatever a detector can score is a finding."""
    info = soak.references[0].traces[0].info
    highest = {kind.value: [LOW] * 399 for kind in Kind}
    make_profile(info.model_name, info.capture, int(time.time()), highest, 399).write(folder / "profile.json")
    sidecar.restart_with(profiles=str(folder / "profile.json"))


def main(
    model: Annotated[Path, typer.Option(help="Folder of a model.")] = Path(".cache/models/smollm2"),
    traces: Annotated[Path | None, typer.Option(help="JSON lines of recorded reasoning, one prompt more.")] = None,
    rounds: Annotated[int, typer.Option(help="0: one for each fault.")] = 0,
    full: Annotated[bool, typer.Option(help="Half an hour, a fault a minute.")] = False,
    dtype: Annotated[str, typer.Option(help="In float32 a prompt gives the same tokens in any company.")] = "float32",
    seed: int = 0,
) -> None:
    """Soak."""
    if not is_model(model):
        raise typer.BadParameter(f"--model {model}: no config.json there; `make weights` fetches SmolLM2")
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        sidecar = Sidecar(folder, model / "tokenizer.json")
        stack.callback(sidecar.close)
        arguments = engine_arguments(model, dtype, seed)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAM_MONITOR_")}
        environment |= {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        capture = {"TARGET": sidecar.target, "MAX_OVERHEAD": "0", "SEND_TOKEN_IDS": "1", "STRIDE": str(STRIDE)}
        own = {f"STREAM_MONITOR_{name}": value for name, value in capture.items()}
        plain = EngineProcess("plain", ENGINE, arguments, environment, folder / "plain.log")
        stack.callback(plain.stop)
        captured = arguments | {"worker_cls": STREAM_WORKER}
        stream = EngineProcess("stream", ENGINE, captured, environment | own, folder / "stream.log")
        stack.callback(stream.stop)
        asked = prompts(model, traces)
        soak = Soak(plain, stream, sidecar, asked, model)
        soak.make_references()
        low_thresholds(sidecar, soak, folder)
        sidecar.listen()
        begin, struck = time.monotonic(), 0
        served = 0
        names: list[str] = []
        while served < (rounds or len(FAULTS)) or (full and time.monotonic() - begin < FULL_SECONDS):
            due = not full or time.monotonic() - begin >= struck * FAULT_SECONDS
            fault = FAULTS[struck % len(FAULTS)] if due else None
            struck += due
            started = time.monotonic()
            soak.round(make_round(draw, len(asked)), fault)
            served += 1
            names += [fault.name] if fault else []
            took = time.monotonic() - started
            print(f"round {served}, {fault.name if fault else 'no fault'}: {took:.0f} s, {soak.counts}", flush=True)
        report(soak, model, arguments, names, served, time.monotonic() - begin, seed)


def report(
    soak: Soak, model: Path, arguments: dict[str, Any], names: list[str], rounds: int, seconds: float, seed: int
) -> None:
    """The figures and what they must be."""
    compared, heard = soak.compared, soak.sidecar.heard
    config = {
        "model": model.name,
        "engine": {key: value for key, value in arguments.items() if key != "model"},
        "rounds": rounds,
        "faults": names,
        "n": "requests",
    }
    found = Report("soak", config, seed, soak.counts["requests"])
    found.figures = {
        "seconds": seconds,
        "requests": soak.counts["requests"],
        "preemptions": soak.counts["preempted"],
        "requests ended from outside": soak.counts["aborted"],
        "rounds with other outputs than the plain engine's": soak.counts["outputs differing"],
        "sentences compared": len(compared.distances) + len(compared.apart),
        "texts compared": compared.texts,
        "wrong attributions": compared.wrong,
        "largest distance to the prompt's own": max(compared.distances, default=0.0),
        "sentences compared with rows at other positions": len(compared.apart),
        "largest distance to the prompt's own, rows at other positions": max(compared.apart, default=0.0),
        "median distance to another prompt's": sorted(compared.others)[len(compared.others) // 2]
        if compared.others
        else 0,
        "findings received": len(heard.findings),
        "acknowledged findings lost": soak.counts["findings lost"] + heard.lost,
        "findings received twice": sum(count > 1 for count in heard.findings.values()),
        "gaps told": heard.gaps,
        "rounds after which the monitor did not recover": soak.counts["not recovered"],
    }
    forgetting = sum(fault.forgets for fault in FAULTS for name in names if name == fault.name)
    found.must = {
        "rounds with other outputs than the plain engine's": ("<=", 0),
        "wrong attributions": ("<=", 0),
        "acknowledged findings lost": ("<=", 0),
        "findings received twice": ("<=", 0),
        "rounds after which the monitor did not recover": ("<=", 0),
        "gaps told": ("<=", forgetting),
        "sentences compared": (">=", 5 * rounds),
        "texts compared": (">=", rounds),
        "findings received": (">=", rounds),
        "preemptions": (">=", 1),
        "median distance to another prompt's": (">=", 0.5),
    }
    if arguments["dtype"] == "float32":
        found.must["largest distance to the prompt's own"] = ("<=", ROUNDING)
    found.finish()


if __name__ == "__main__":
    run(main)
