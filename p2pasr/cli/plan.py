"""`p2pasr plan`: what this machine can train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pasr.errors import LocalError


def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="whose rounds are planned (default: the usual)")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.5, metavar="GB", help="plan for so much memory instead of what is here")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(metavar="SHARDS", help="take the first steps of CONFIG.yaml's task on these")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Say what this machine can train.

    Prints which tasks and models fit, how to set them and how long a round takes. Memory is that of weights, gradients,
    moments and what autograd keeps, traced from the models themselves.
    """
    from dataclasses import replace

    from p2pasr.plan import GIB, catalogue, look, plans
    from p2pasr.protocol.manifest import RoundSection, read_config

    if shards is not None:
        _measure(config, shards, as_json)
        return
    rounds = RoundSection(rounds=1) if config is None else read_config(config).rounds
    machine = look()
    if memory is not None:
        machine = replace(machine, memory=memory * GIB)
    found: list[dict[str, Any]] = []
    with Console(stderr=True).status("tracing models") as status:
        for each in plans(catalogue(machine), machine, rounds):
            settings = dict(each.choice.settings)
            if each.micro_batch not in (None, rounds.samples_per_step):
                settings["micro_batch"] = each.micro_batch
            found.append(
                {
                    "kind": each.choice.kind,
                    "model": each.choice.model,
                    "fits": each.micro_batch is not None,
                    "gib": round(each.memory / GIB, 1),
                    "trained": each.cost.trained,
                    "settings": settings,
                    "minutes": round(each.minutes, 1),
                }
            )
            status.update(f"traced {each.choice.kind} of {each.choice.model}")
    if as_json:
        about = {"device": machine.device, "gib": round(machine.memory / GIB, 1), "gflops": round(machine.speed / 1e9)}
        typer.echo(json.dumps({"machine": about, "plans": found}))
        return
    console = Console(highlight=False, markup=False)
    console.print(
        f"{machine.name}: {machine.memory / GIB:.1f} GiB to train in, {machine.speed / 1e9:.0f} GFLOP/s in float32; "
        f"a round of {rounds.segments} segments of {rounds.steps_per_segment} steps of {rounds.samples_per_step} clips"
    )
    table = Table()
    for column in ("task", "model", "trained", "memory", "fits", "a round", "settings"):
        right = column in ("trained", "memory", "a round")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "settings")
    for row in found:
        how = ", ".join(f"{name}: {str(value).lower()}" for name, value in row["settings"].items())
        round_time = _duration(row["minutes"]) if row["fits"] else "–"
        trained = f"{row['trained'] / 1e6:.1f} M"
        fits = "yes" if row["fits"] else "no"
        table.add_row(row["kind"], row["model"], trained, f"{row['gib']} GiB", fits, round_time, how)
    console.print(table)


def _measure(config: Path | None, shards: Path, as_json: bool) -> None:
    """Take the first steps of a run's task, and compare them with the plan."""
    from p2pasr import tasks
    from p2pasr.plan import GIB, look, measure
    from p2pasr.protocol.manifest import read_config
    from p2pasr.runs import shard_paths
    from p2pasr.tasks.training import GradientTask

    if config is None:
        raise LocalError("--shards measures a run's own task; name its configuration, CONFIG.yaml, too")
    read = read_config(config)
    files = shard_paths(shards)
    with Console(stderr=True).status("taking the first steps"):
        pinned = tasks.pin(read.task.kind, read.task.config, None, files)
        task = tasks.build(read.task.kind, pinned, seed=read.seed, device=look().device, shards=files)
        if not isinstance(task, GradientTask):
            raise LocalError(f"a task of the kind {read.task.kind!r} does not say what a step of it takes")
        found = measure(task, files, read.rounds)
    about = {
        "examples": found.examples,
        "planned_gib": round(found.planned / GIB, 3),
        "taken_gib": round(found.taken / GIB, 3),
        "step_seconds": round(found.step_seconds, 3),
        "minutes": round(found.minutes, 2),
    }
    if as_json:
        typer.echo(json.dumps(about))
        return
    typer.echo(
        f"{found.examples} examples at once take {found.taken / GIB:.2f} GiB "
        f"({found.taken / found.planned - 1:+.1%} of the {found.planned / GIB:.2f} GiB that were planned); "
        f"a step takes {found.step_seconds:.2f} s, a round {found.minutes:.1f} min"
    )


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
