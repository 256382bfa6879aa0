"""`p2pasr run`: start a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p2pasr.errors import LocalError

app = typer.Typer(help="Start a run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `new` a subcommand while it is the only one."""


@app.command()
def new(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="what the run trains and how")],
    shards: Annotated[
        Path,
        typer.Option(metavar="SHARDS", help="folder of prepared shards; of the probe, if peers keep theirs private"),
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the manifest (default: CONFIG.run.json)")] = None,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="local folder of the base model")] = None,
    per_dialect: Annotated[bool, typer.Option("--per-dialect", help="a run for each dialect of the shards")] = False,
) -> None:
    """Write a run's manifest and print the run id."""
    from p2pasr.protocol.manifest import read_config
    from p2pasr.runs import new_run

    if out is not None and out.resolve() == config.resolve():
        raise LocalError(f"--out {out} is the configuration itself; name another file for the manifest")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if per_dialect:
        _new_dialects(config, shards, out or config.with_suffix(".dialects.json"), model, console)
        return
    with Console(stderr=True).status("checking the shards and building the initial state"):
        manifest = new_run(read_config(config), shards, model)
    path = out or config.with_suffix(".run.json")
    manifest.write(path)
    hours = sum(shard.seconds for shard in manifest.shards) / 3600
    console.print(f"run id: {manifest.run_id.hex()}")
    console.print(
        f"manifest: {path} ({len(manifest.shards)} shards, {hours:.2f} h of audio, "
        f"{manifest.parameters:,} trained values)"
    )
    own = " --private-shards OWN" if manifest.data.policy == "private" else ""
    console.print(f"first peer: python -m p2pasr.peer --run {path} --seed-data {shards}{own}")


def _new_dialects(config: Path, shards: Path, path: Path, model: str | None, console: Console) -> None:
    from p2pasr.dialects import new_runs, write_runs
    from p2pasr.protocol.manifest import read_config

    with Console(stderr=True).status("checking the shards and building the initial states"):
        manifests = new_runs(read_config(config), shards, model)
    for dialect, file in write_runs(path, manifests).items():
        manifest = manifests[dialect]
        hours = sum(shard.seconds for shard in manifest.shards) / 3600
        console.print(f"{dialect}: run {manifest.run_id.hex()}, {file} ({hours:.2f} h of audio)")
    console.print(f"first peer of a dialect: python -m p2pasr.peer --run {path} --dialect CODE --seed-data {shards}")
