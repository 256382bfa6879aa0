"""`p2pasr merge`: one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from p2pasr.errors import LocalError


def merge(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER ADAPTER…", help="folders that p2pasr or peft wrote")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder to write")],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W…", help="one each (default: seconds of audio, if all say theirs)")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layer", metavar="PATTERN=W,W…", help="other weights for layers of that name")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="merge the products of the factors, at this rank")] = None,
) -> None:
    """Make one adapter of several of the same base.

    Adapters of one run are averaged by their factors, others by the products of these, cut to a rank.
    """
    from p2pasr.tasks.merging import merge as merged
    from p2pasr.tasks.merging import read_adapter, seconds_of, write_adapter

    if len(adapters) < 2:
        raise LocalError("there is nothing to merge: name two adapter folders or more")
    if out.resolve() in {folder.resolve() for folder in adapters}:
        raise LocalError(f"--out {out} is one of the adapters; name another folder")
    read = [read_adapter(folder) for folder in adapters]
    seconds = seconds_of(read)
    if weights is not None:
        given, origin = _numbers(weights), "as given"
    elif seconds is not None:
        given, origin = seconds, "the seconds of audio that went into each adapter"
    else:
        given, origin = [1.0] * len(read), "equal, for not every adapter says how much audio went into it"
    by_layer = {}
    for option in layers or []:
        pattern, equals, rest = option.rpartition("=")
        if not equals:
            raise LocalError(f"--layer {option!r} is not PATTERN=W,W, such as '*encoder*=1,0'")
        by_layer[pattern] = _numbers(rest)
    result = merged(read, given, by_layer, rank)
    write_adapter(out, read, result, given)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    table = Table()
    for column in ("adapter", "run", "round", "audio", "weight"):
        table.add_column(column, justify="left" if column in ("adapter", "run") else "right")
    for adapter, weight in zip(read, given, strict=True):
        notes = adapter.notes
        table.add_row(
            str(adapter.folder),
            str(notes.get("run", "–"))[:16],
            str(notes.get("round", "–")),
            "–" if adapter.seconds is None else f"{adapter.seconds:.0f} s",
            f"{weight / sum(given):.1%}",
        )
    console.print(table)
    console.print(f"weights: {origin}")
    for warning in result.warnings:
        console.print(f"warning: {warning}", style="yellow")
    kept = "" if result.how == "factors" else f", which keeps at least {result.kept:.1%} of every layer"
    console.print(f"wrote {out}: merged by {result.how} at rank {result.rank}{kept}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise LocalError(f"{text!r} is no list of numbers such as 1,0.5") from error
