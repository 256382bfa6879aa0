"""`p2pasr plan`: what this machine can train."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from p2pasr.errors import LocalError

if TYPE_CHECKING:
    from p2pasr.plan import Machine, Plan
    from p2pasr.protocol.manifest import RoundSection

GIB: Final = 1 << 30


def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="whose rounds are planned (default: the usual)")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=0.5, max=4096, metavar="GIB", help="plan for an accelerator with so much memory instead"),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e6, metavar="T", help="how fast that is, in 10¹² bfloat16 operations a second"),
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(metavar="SHARDS", help="take the first steps of CONFIG.yaml's task on these")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="only tasks of this kind, such as lora (default: all)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Say what this machine can train.

    Prints which tasks and models fit, how to set them and how long a round takes. Memory is that of weights, gradients,
    moments and what a step holds besides, traced from the tasks themselves.
    """
    from p2pasr.catalogue import catalogue, write_shapes
    from p2pasr.plan import imagine, look, plans
    from p2pasr.protocol.manifest import RoundSection, read_config
    from p2pasr.tasks import KINDS

    if kind is not None and kind not in KINDS:
        raise LocalError(f"--kind {kind!r} is not one of {', '.join(KINDS)}")
    if tflops is not None and memory is None:
        raise LocalError("--tflops is of a machine that is not here; say with --memory how much memory that has")
    if shards is not None:
        if memory is not None:
            raise LocalError("--shards takes steps on this machine, and --memory is of another; leave one of them out")
        _measure(config, shards, as_json)
        return
    rounds = RoundSection(rounds=1) if config is None else read_config(config).rounds
    machine = look() if memory is None else imagine(memory, tflops)
    found: list[Plan] = []
    with Console(stderr=True).status("tracing models") as status, tempfile.TemporaryDirectory() as shapes:
        write_shapes(Path(shapes))
        choices = catalogue(Path(shapes), precision=machine.precision, accelerator=machine.accelerated)
        for each in plans((ways for ways in choices if kind in (None, ways[0].kind)), machine, rounds):
            found.append(each)
            status.update(f"traced {each.choice.kind}: {each.choice.model}")
    if as_json:
        typer.echo(json.dumps({"machine": _about(machine), "plans": [_row(each, machine, rounds) for each in found]}))
    else:
        _print(found, machine, rounds)


def _about(machine: Machine) -> dict[str, Any]:
    speeds = {precision: round(speed / 1e9) for precision, speed in machine.speeds.items()}
    return {"device": machine.device, "gib": round(machine.memory / GIB, 1), "gflops": speeds}


def _row(plan: Plan, machine: Machine, rounds: RoundSection) -> dict[str, Any]:
    settings = dict(plan.choice.settings)
    if plan.micro_batch not in (None, rounds.samples_per_step):
        settings["micro_batch"] = plan.micro_batch
    if "quantise" in plan.choice.config:
        settings["quantise"] = plan.choice.config["quantise"]
    return {
        "kind": plan.choice.kind,
        "model": plan.choice.model,
        "fits": plan.micro_batch is not None,
        "gib": round(plan.memory / GIB, 1),
        "needs_gib": math.ceil(10 * machine.whole(plan.room) / GIB) / 10,
        "trained": plan.cost.trained,
        "settings": settings,
        "minutes": round(plan.minutes, 2),
    }


SHORT: Final = {"precision": "bf16", "gradient_checkpointing": "recompute", "quantise": "4bit"}
"""Settings, and what the table calls them; none has another value there."""


def _print(plans: Sequence[Plan], machine: Machine, rounds: RoundSection) -> None:
    """One table, grouped by task, of 80 columns at most."""
    from p2pasr.plan import ERROR

    console = Console(highlight=False, markup=False)
    speeds = ", ".join(f"{speed / 1e12:.3g} TFLOP/s in {precision}" for precision, speed in machine.speeds.items())
    console.print(
        f"{machine.name}: {machine.memory / GIB:.1f} GiB to train in, {speeds}; "
        f"a round of {rounds.segments} segments of {rounds.steps_per_segment} steps of {rounds.samples_per_step} clips"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("model", "trained", "GiB", "batch", "a round", "settings"):
        table.add_column(column, justify="left" if column in ("model", "settings") else "right", no_wrap=True)
    kind = ""
    for plan in plans:
        if plan.choice.kind != kind:
            kind = plan.choice.kind
            table.add_row(f"{kind}:", style="bold")
        row = _row(plan, machine, rounds)
        batch, time = ("–", "–") if plan.micro_batch is None else (str(plan.micro_batch), _duration(plan.minutes))
        how = ", ".join(SHORT[name] for name in row["settings"] if name in SHORT)
        if plan.micro_batch is None:
            how = f"needs {row['needs_gib']} GiB"
        table.add_row(f"  {plan.choice.model}", f"{row['trained'] / 1e6:.1f} M", f"{row['gib']}", batch, time, how)
    console.print(table)
    console.print(
        "batch is micro_batch, recompute gradient_checkpointing: true, 4bit quantise.\n"
        "Memory is for clips as long as the window. Where a task drops out, a batch\n"
        f"cannot be halved when memory runs out: the plan leaves {100 * ERROR:.0f} % to spare there."
    )


def _measure(config: Path | None, shards: Path, as_json: bool) -> None:
    """Take the first steps of a run's task, and compare them with the plan."""
    from p2pasr import tasks
    from p2pasr.plan import look, measure, sketch
    from p2pasr.protocol.manifest import read_config
    from p2pasr.runs import shard_paths

    if config is None:
        raise LocalError("--shards measures a run's own task; name its configuration, CONFIG.yaml, too")
    read = read_config(config)
    files = shard_paths(shards)
    with Console(stderr=True).status("taking the first steps"):
        pinned = tasks.pin(read.task.kind, read.task.config, None, files)
        sketched = sketch(read.task.kind, pinned)
        machine = look()
        task: Any = tasks.build(read.task.kind, pinned, seed=read.seed, device=machine.device, shards=files)
        found = measure(task, sketched, files, read.rounds)
    planned_minutes = machine.minutes(found.flops, task.config.precision)
    about = {
        "examples": found.examples,
        "planned_gib": round(found.planned / GIB, 3),
        "taken_gib": round(found.taken / GIB, 3),
        "step_seconds": round(found.step_seconds, 3),
        "planned_minutes": round(planned_minutes, 2),
        "minutes": round(found.minutes, 2),
    }
    if as_json:
        typer.echo(json.dumps(about))
        return
    typer.echo(
        f"{found.examples} examples at once take {found.taken / GIB:.2f} GiB "
        f"({found.taken / found.planned - 1:+.1%} of the {found.planned / GIB:.2f} GiB that were planned); "
        f"a step takes {found.step_seconds:.2f} s, a round {found.minutes:.1f} min "
        f"({found.minutes / planned_minutes - 1:+.1%} of the {planned_minutes:.1f} min that were planned)"
    )


def _duration(minutes: float) -> str:
    if minutes < 2:
        return f"{max(round(60 * minutes), 1)} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
