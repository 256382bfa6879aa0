"""`p2pasr eval` and `p2pasr export`: how good a run's model is, and the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p2pasr.report import error_rate_table, progress_bar

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a manifest file or a run id")]
StateDir = Annotated[Path | None, typer.Option(metavar="DIR", help="a peer's state folder (default: ~/.p2pasr)")]
RoundOption = Annotated[
    int | None, typer.Option("--round", metavar="N", help="the state before round N (default: the newest)")
]
ModelDir = Annotated[str | None, typer.Option(metavar="DIR", help="local folder of the base model")]


def evaluate(
    run: RunArgument,
    shards: Annotated[Path, typer.Option(metavar="SHARDS", help="folder of held-out shards")],
    round_number: RoundOption = None,
    state_dir: StateDir = None,
    model: ModelDir = None,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Score the base and the trained model.

    Prints their scores on held-out shards: error rates, or what the run's task is scored by.
    """
    from p2pasr import runs

    saved = runs.open_run(run, state_dir)
    task = runs.build_task(saved.manifest, device, model)
    state = saved.state(round_number, task.initial_params())
    paths = runs.shard_paths(shards)
    with progress_bar("scoring the base") as on_progress:
        base = task.evaluate(None, paths, on_progress)
    with progress_bar("scoring the trained model") as on_progress:
        trained = task.evaluate(state.params, paths, on_progress)
    if as_json:
        typer.echo(json.dumps({"round": state.round, "base": dict(base), "trained": dict(trained)}, ensure_ascii=False))
        return
    title = f"{saved.manifest.name}, before round {state.round}"
    Console(markup=False).print(error_rate_table(title, {"base": base, "trained": trained}))


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write")],
    round_number: RoundOption = None,
    state_dir: StateDir = None,
    model: ModelDir = None,
) -> None:
    """Write the trained model to a folder.

    For LoRA this is an adapter folder that PEFT loads.
    """
    from p2pasr import runs

    saved = runs.open_run(run, state_dir)
    task = runs.build_task(saved.manifest, model=model)
    state = saved.state(round_number, task.initial_params())
    runs.export(saved.manifest, state, out, task=task)
    typer.echo(f"wrote the model before round {state.round} (state {state.digest.hex()[:16]}) to {out}")
