"""`p2pasr task`: what can be set in a task's section, and checking tasks of your own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from p2pasr.errors import LocalError

app = typer.Typer(help="What tasks can be told, and tasks of your own.", no_args_is_help=True)


@app.command("settings")
def show_settings(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="a task.kind, such as lora")],
    architecture: Annotated[str, typer.Argument(metavar="[ARCHITECTURE]", help="one of a student's")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON Schema instead, for editors")] = False,
) -> None:
    """List the settings of a task's section, `task.config`, with their defaults."""
    from p2pasr.tasks.settings import schema, settings

    if as_json:
        typer.echo(json.dumps(schema(kind), ensure_ascii=False))
        return
    shapes = {shape: rows for shape, rows in settings(kind).items() if architecture in ("", *shape.split(", "))}
    if not shapes:
        raise LocalError(f"task {kind!r} has no architecture {architecture!r}; it has {', '.join(settings(kind))}")
    console = Console(highlight=False)
    for shape, rows in shapes.items():
        table = Table(title=shape, title_justify="left")
        table.add_column("setting", no_wrap=True)
        table.add_column("values", max_width=20)
        table.add_column("default", max_width=16)
        table.add_column("meaning")
        for row in rows:
            table.add_row(row.name, row.values, row.default, row.meaning)
        console.print(table)


@app.command()
def check(
    target: Annotated[str, typer.Argument(metavar="module:Class", help="or a run's configuration, CONFIG.yaml")],
    shards: Annotated[Path, typer.Option(metavar="SHARDS", help="folder of shards to train on")],
    steps: Annotated[int, typer.Option(min=2, help="optimizer steps of a segment")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="examples in a step")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Prove a task deterministic and auditable.

    Trains a few steps again and again, in this process and in others, and says which promise of a task does not hold.
    """
    from p2pasr.protocol.manifest import VerifySection
    from p2pasr.runs import shard_paths
    from p2pasr.taskcheck import Target, check_task, plan_for

    files = tuple(path.resolve() for path in shard_paths(shards))
    console = Console(highlight=False, soft_wrap=True)
    done = []
    with Console(stderr=True).status("training a few steps") as status:
        for result in check_task(Target(target, Path.cwd(), files), plan_for(steps, samples), VerifySection()):
            done.append(result)
            status.update(f"checked that {result.promise}")
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in done], ensure_ascii=False))
    else:
        table = Table(title=target, title_justify="left")
        for column in ("promise", "holds", ""):
            table.add_column(column)
        for result in done:
            holds = "yes" if result.broken is None else "NO"
            style = None if result.broken is None else "red"
            table.add_row(result.promise, holds, result.broken or result.measured, style=style)
        console.print(table)
    broken = [result for result in done if result.broken is not None]
    if broken:
        raise LocalError(
            f"{target} breaks {len(broken)} of {len(done)} promises; the first is that {broken[0].promise}: "
            f"{broken[0].broken}"
        )
