"""`stream-monitor doctor MODEL`: the capture plan for a model on this machine, without loading its weights.

The model is built on torch's meta device through vLLM's own classes, so the layers, backends and reasons are the ones
the worker will meet.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from stream_monitor.config import CaptureSettings, SettingsError, load
from stream_monitor.engine.compat import engine as compat
from stream_monitor.engine.compat.doctor import build_on_meta, single_rank_groups
from stream_monitor.engine.compat.layers import attention_layers
from stream_monitor.engine.compat.plugins import not_loaded
from stream_monitor.engine.plan import CapturePlan, make_plan
from stream_monitor.target import TargetError


def main(model: str) -> int:
    """Print the plan; 0 if something will be captured, 1 if nothing can be, 2 if the model or a setting is unusable."""
    try:
        settings = load(CaptureSettings)
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout; the plan is this command's output
            plan = plan_for(model, settings)
    except SettingsError as error:
        print(f"stream-monitor doctor: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"stream-monitor doctor: {model}: {_first_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # a model's own code, such as one that computes with weights it does not have here
        reason = f"vLLM cannot build it without its weights: {type(error).__name__}: {error}".splitlines()[0]
        print(f"stream-monitor doctor: {model}: {reason}", file=sys.stderr)
        return 2
    show(plan, settings, Console(soft_wrap=True))
    return 0 if plan.watched else 1


def _first_line(error: Exception) -> str:
    """What an error says; its kind, if it says nothing."""
    said = str(error)
    if isinstance(error, ValidationError):
        # vLLM's configurations are pydantic's, whose first line only says how many errors there are.
        first = error.errors()[0]
        said = ": ".join([*map(str, first["loc"]), first["msg"]])
    return next(iter(said.strip().splitlines()), type(error).__name__)


def plan_for(model: str, settings: CaptureSettings) -> CapturePlan:
    """The plan the worker would make for one rank of `model` at vLLM's default flags."""
    from vllm.engine.arg_utils import EngineArgs

    compat.register_backends()
    config = EngineArgs(model=model, worker_cls="stream_monitor.engine.worker.StreamWorker").create_engine_config()
    refusals = (*_off(settings), *compat.engine_refusals(config, settings.allow_untested_engine))
    with _single_rank(config):
        build_on_meta(config)
        facts = [facts for facts, _ in attention_layers(config)]
    return make_plan(facts, refusals, settings)


def _off(settings: CaptureSettings) -> tuple[str, ...]:
    """What keeps the plug-in from doing anything of use, whatever the model."""
    found = []
    if settings.disable:
        found.append("STREAM_MONITOR_DISABLE switches the plug-in off")
    if reason := not_loaded():
        found.append(reason)
    try:
        settings.monitor().check_folder()
    except TargetError as error:
        found.append(f"target: {error}")
    return tuple(found)


@contextlib.contextmanager
def _single_rank(config: Any) -> Iterator[None]:
    """Process groups of size one, as vLLM's layers expect them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        single_rank_groups(config, f"file://{Path(folder) / 'rendezvous'}"),
    ):
        yield


def show(plan: CapturePlan, settings: CaptureSettings, console: Console) -> None:
    """Print layers, heads and reasons."""
    watched = plan.watched
    if watched:
        heads = watched[0].query_heads
        of_prompts = f", of prompts one in {settings.prompt_stride}" if settings.prompt_stride else ""
        console.print(
            f"Will capture {len(watched)} of {len(plan.layers)} attention layers, {len(heads)} query heads each, "
            f"one row in every {settings.stride} tokens{of_prompts}, {settings.top_k} key blocks of "
            f"{settings.block_size} tokens a head by {settings.strategy}."
        )
    else:
        console.print("[bold]Nothing can be captured.[/bold]")
    table = Table()
    for name in ("layer", "name", "attention", "heads (query/KV)", "head size", "plan"):
        table.add_column(name, no_wrap=name not in ("name", "attention"), overflow="fold")
    for planned in plan.layers:
        facts = planned.facts
        if planned.refusals:
            verdict = "refused"
        elif planned.query_heads and not plan.refusals:
            verdict = "watched"
        else:
            verdict = "not watched"
        table.add_row(
            str(facts.index),
            facts.name,
            facts.implementation,
            f"{facts.query_heads}/{facts.kv_heads}",
            str(facts.head_dim),
            verdict,
        )
    console.print(table)
    for reason in plan.reasons:
        console.print(f"- {reason}")
