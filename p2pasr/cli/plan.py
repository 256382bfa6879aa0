"""`p2pasr plan`: what this machine can train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="whose rounds are planned (default: the usual)")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.5, metavar="GB", help="plan for so much memory instead of what is here")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Say which tasks and models fit this machine, how to set them, and how long a round takes.

    Memory is that of weights, gradients, moments and what autograd keeps, traced from the models themselves.
    """
    from dataclasses import replace

    from p2pasr.plan import GIB, catalogue, look, plans
    from p2pasr.protocol.manifest import RoundSection, read_config

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


def _duration(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
