"""`p2pasr lineage`: where a run's state comes from."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pasr.cli.score import ModelDir, RunArgument, StateDir
from p2pasr.errors import LocalError


def lineage(
    run: RunArgument,
    state_dir: StateDir = None,
    model: ModelDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Follow a run from its first state.

    Checks every round record of a peer: signatures, assignments, receipts, and that each begins where the one before
    ended. Ends with an error at the first that does not hold.
    """
    from p2pasr import runs
    from p2pasr.protocol.signing import short

    saved = runs.open_run(run, state_dir)
    start = runs.initial_state(saved.manifest, runs.build_task(saved.manifest, model=model))
    checked = list(saved.lineage(start))
    rows: list[dict[str, Any]] = [
        {
            "round": item.record.round,
            "before": item.record.before.hex(),
            "after": item.record.after.hex(),
            "merged": [claim.peer for claim in item.record.merged()],
            "attested_by": [signed.message.peer for signed in item.record.attestations],
            "problem": item.problem,
        }
        for item in checked
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        table = Table(title=f"{saved.manifest.name}, from state {start.digest.hex()[:8]}", title_justify="left")
        for column in ("round", "state after", "merged", "attested by", "record"):
            table.add_column(column)
        for row in rows:
            peers = (", ".join(map(short, row[name])) for name in ("merged", "attested_by"))
            table.add_row(str(row["round"]), row["after"][:8], *peers, row["problem"] or "holds")
        Console(markup=False).print(table)
    if broken := [row for row in rows if row["problem"]]:
        raise LocalError(f"the record of round {broken[0]['round']} does not hold: {broken[0]['problem']}")
