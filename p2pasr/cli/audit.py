"""`p2pasr verify audit`: do again what the peers of a run do, from outside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from p2pasr.cli.score import ModelDir
from p2pasr.errors import LocalError

if TYPE_CHECKING:
    from p2pasr.observer import Look

CHEATING: Final = 3
"""Exit code when something was proved."""


def audit(
    run: Annotated[str, typer.Option(metavar="RUN", help="a manifest file or a run id")],
    initial_peers: Annotated[
        list[str] | None, typer.Option(metavar="MADDR", help="a peer or bootstrap node to join through; repeatable")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="or a peer's state folder: join through the peers it knows")
    ] = None,
    rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of segments and parts to do again")] = 1.0,
    rounds: Annotated[
        str | None, typer.Option(metavar="A-B", help="rounds to look at (default: all from now on)")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder for proofs (default: audit-RUN)")] = None,
    shards: Annotated[
        Path | None, typer.Option(metavar="SHARDS", help="prepared shards, to spare fetching them")
    ] = None,
    model: ModelDir = None,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads; as many as the peers give the same bits as they")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Watch a run and do its work again.

    Joins with a key of its own and without training. Looks into each round as soon as its peers open it to everybody,
    trains segments again and reduces parts again, and tells the peers of proofs. Ends with code 3 if there are any.
    """
    from p2pasr import runs
    from p2pasr.observer import watch
    from p2pasr.peer import Peer, PeerOptions
    from p2pasr.peers.journal import Journal
    from p2pasr.report import Report

    _, run_id = runs.read_run(run)
    known = tuple(initial_peers or ())
    if not known and state_dir is not None:
        known = Journal.read_known_peers(runs.open_run(run, state_dir).folder)
    if not known:
        raise LocalError("name a peer of the run with --initial-peers, or with --state-dir a folder that knows some")
    options = PeerOptions(
        initial_peers=known,
        state_dir=out or Path(f"audit-{run_id.hex()[:8]}"),
        client_mode=True,
        seed_data=shards,
        device=device,
        threads=threads,
        model=model,
    )
    looks: list[Look] = []
    with Peer(run, options, Report(out=sys.stderr)) as peer:
        first, last = parse_rounds(rounds, peer.manifest.rounds.rounds)
        looks.extend(watch(peer.member, first, last, rate))
        proofs = [str(path) for path in Journal.read_proofs(peer.member.journal.folder)]
    show(looks, proofs, as_json)
    if proofs:
        raise typer.Exit(CHEATING)


def parse_rounds(text: str | None, rounds: int) -> tuple[int, int]:
    """The first and the last round of a range such as `10-20` or `7`.

    Args:
        rounds: of the run.

    Raises:
        LocalError: it is no range.
    """
    if text is None:
        return 0, rounds - 1
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or int(first) > int(last or first):
        raise LocalError(f"--rounds {text!r} is no range of rounds; it looks like 10-20")
    return int(first), int(last or first)


def show(looks: list[Look], proofs: list[str], as_json: bool) -> None:
    """Print what was checked and where the proofs lie."""
    from p2pasr.protocol.signing import short

    if as_json:
        rows: list[dict[str, Any]] = [
            {
                "round": look.round,
                "peer": look.finding.peer,
                "what": look.what,
                "item": look.finding.item,
                "finding": look.finding.finding,
                "error": look.finding.error,
            }
            for look in looks
        ]
        typer.echo(json.dumps({"checks": rows, "proofs": proofs}, indent=1))
        return
    table = Table(title=f"{len(looks)} checks", title_justify="left")
    for column in ("round", "peer", "what", "item", "finding", "error"):
        table.add_column(column, justify="right" if column in ("round", "item", "error") else "left")
    for look in looks:
        found = look.finding
        error = f"{found.error:.1e}" if found.error else "0"
        table.add_row(str(look.round), short(found.peer), look.what, str(found.item), found.finding, error)
    console = Console(markup=False, soft_wrap=True)
    console.print(table)
    for path in proofs:
        console.print(f"proof: {path}")
