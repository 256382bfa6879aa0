"""`p2pasr verify ledger`: who gave what to a run."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from p2pasr.cli.score import RunArgument, StateDir
from p2pasr.errors import LocalError, Reject

if TYPE_CHECKING:
    from p2pasr.runs import SavedRun


def ledger(
    run: RunArgument,
    state_dir: StateDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Rank the peers of a run by the audio of their merged work.

    Credit, bans and strikes are those of the newest state that this machine holds; rounds, checks and proofs are those
    that its peer recorded.
    """
    from p2pasr import runs
    from p2pasr.protocol.signing import short

    saved = runs.open_run(run, state_dir)
    state = saved.state(None, None)
    rows = rank(saved)
    if as_json:
        verified = saved.manifest.data.policy == "shared"
        about = {"round": state.round, "state": state.digest.hex(), "credit_verified": verified}
        typer.echo(json.dumps({**about, "peers": rows}, indent=1))
        return
    table = Table(title=f"{saved.manifest.name}, before round {state.round}", title_justify="left")
    private = saved.manifest.data.policy == "private"
    stated = "; audio: as claimed, at most what the run counts, and verified by nobody" if private else ""
    table.caption = (
        f"banned: in which round; rounds: those that this peer took part in; strikes: those that count{stated}"
    )
    for column in ("", "peer", "audio", "trust", "rounds", "checked", "proofs", "strikes", "banned"):
        table.add_column(column, justify="left" if column in ("peer", "checked", "proofs") else "right")
    for place, row in enumerate(rows, 1):
        checked = ", ".join(f"{count} {finding}" for finding, count in row["checked"].items())
        banned = "" if row["banned"] is None else str(row["banned"])
        struck = str(row["strikes"] or "")
        numbers = (f"{row['credit']:,.0f} s", f"{row['trust']:.2f}", str(len(row["rounds"])))
        table.add_row(str(place), short(row["peer"]), *numbers, checked, ", ".join(row["proofs"]), struck, banned)
    console = Console(markup=False)
    console.print(table)
    for row in rows:
        if row["suspended"] is not None:
            console.print(f"{row['peer']} is suspended until round {row['suspended']}.", soft_wrap=True)
    if rows and rows[0]["credit"] > 0 and rows[0]["banned"] is None:
        hours = rows[0]["credit"] / 3600
        console.print(f"Thank you, {rows[0]['peer']}: {hours:.2f} h of audio in this model are yours.", soft_wrap=True)


def rank(saved: SavedRun) -> list[dict[str, Any]]:
    """What is known of each peer, the one with the most credit first and banned ones last.

    Raises:
        LocalError: there is no state here, or what the peer wrote down is damaged.
    """
    from p2pasr.averaging.rules import trust
    from p2pasr.peers.journal import Journal
    from p2pasr.protocol.messages import Audit, unseal
    from p2pasr.protocol.strikes import suspended
    from p2pasr.verify.evidence import unpack_proof
    from p2pasr.verify.record import read_record

    state = saved.state(None, None)
    out = suspended(state.strikes, state.round, saved.manifest.verify)
    merged: dict[str, list[int]] = {}
    checked: dict[str, Counter[str]] = {}
    proofs: dict[str, list[str]] = {}
    try:
        for record in map(read_record, Journal.read_records(saved.folder)):
            for claim in record.merged():
                merged.setdefault(claim.peer, []).append(record.round)
        for packed in Journal.read_audits(saved.folder):
            for found in unseal(packed, Audit).message.findings:
                checked.setdefault(found.peer, Counter())[found.finding] += 1
        for path in Journal.read_proofs(saved.folder):
            proof = unpack_proof(path.read_bytes())
            proofs.setdefault(proof.accused, []).append(proof.kind)
    except Reject as error:
        raise LocalError(f"what the peer wrote down in {saved.folder} is damaged ({error})") from error
    rows = [
        {
            "peer": peer,
            "credit": state.credit.get(peer, 0.0),
            "trust": trust(state.standing.get(peer, 0.0), saved.manifest),
            "rounds": merged.get(peer, []),
            "checked": dict(sorted(checked.get(peer, Counter()).items())),
            "proofs": proofs.get(peer, []),
            "strikes": state.strikes.get(peer, (0, 0))[0],
            "suspended": out.get(peer),
            "banned": state.bans.get(peer),
        }
        for peer in {*state.credit, *state.bans, *state.strikes, *merged, *checked, *proofs}
    ]
    return sorted(rows, key=lambda row: (row["banned"] is not None, -row["credit"], row["peer"]))
