"""`p2pasr invite`: let somebody take part in a run that asks for invites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pasr.cli.score import StateDir
from p2pasr.errors import LocalError, Reject, RemoteError

if TYPE_CHECKING:
    from p2pasr.protocol.admission import Agreed
    from p2pasr.protocol.manifest import RunManifest


def invite(
    guest: Annotated[str, typer.Argument(metavar="PEER_ID", help="who is invited: what `p2pasr id` prints there")],
    run: Annotated[str, typer.Option(metavar="RUN", help="a manifest file or a run id")],
    identity: Annotated[Path | None, typer.Option(metavar="KEY", help="the key of who invites")] = None,
    state_dir: StateDir = None,
    expires: Annotated[
        int | None, typer.Option(min=0, metavar="ROUND", help="the last round to come in (default: the run's last)")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="where to write it (default: print it)")] = None,
) -> None:
    """Invite a peer to a run.

    Founders may, and members with enough merged work. The guest starts with --invite FILE.
    """
    from p2pasr.peers.identity import load
    from p2pasr.protocol.messages import Invite, seal
    from p2pasr.runs import default_home
    from p2pasr.tickets import invite_text

    key = load(identity or (state_dir or default_home()) / "identity.key")
    manifest, held = _known(run, state_dir)
    last = manifest.rounds.rounds - 1 if expires is None else expires
    check_can_invite(key.peer, guest, last, manifest, held)
    text = invite_text(seal(key, Invite(held.run, key.peer, guest, last)))
    if out is None:
        typer.echo(text)
        return
    out.write_text(text + "\n", encoding="ascii")
    typer.echo(f"wrote the invite to {out}; the guest starts with: python -m p2pasr.peer --run RUN --invite FILE")


def check_can_invite(peer: str, guest: str, last: int, manifest: RunManifest, held: Agreed) -> None:
    """Would the run's peers take this invite, as far as this machine knows?

    Args:
        last: the last round in which it is good.

    Raises:
        LocalError: no, and why.
    """
    from p2pasr.protocol.admission import invites_left
    from p2pasr.protocol.signing import peer_id_bytes

    if manifest.admission.kind != "invite":
        raise LocalError(f"{manifest.name} asks for no invites (its admission.kind is {manifest.admission.kind})")
    try:
        peer_id_bytes(guest)
    except Reject as error:
        raise LocalError(
            f"{error}; it looks like 12D3KooW… and is what `p2pasr id` prints on the guest's machine"
        ) from error
    if guest in held.bans:
        raise LocalError(f"{guest} was banned from this run in round {held.bans[guest]}; an invite does not undo that")
    if guest in manifest.admission.peers or guest in held.guests:
        raise LocalError(f"{guest} takes part in this run already and needs no invite")
    if not held.round <= last < manifest.rounds.rounds:
        raise LocalError(
            f"--expires {last} is no round to come: the run is in round {held.round} as far as is known here and ends "
            f"with round {manifest.rounds.rounds - 1}"
        )
    try:
        left = invites_left(peer, manifest, held)
    except RemoteError as error:
        raise LocalError(f"peers would not take an invite of this key: {error}") from error
    if left == 0:
        most = manifest.admission.invites_per_peer
        raise LocalError(f"peers would not take an invite of this key: {most} guests of it have come, and that is all")


def _known(run: str, state_dir: Path | None) -> tuple[RunManifest, Agreed]:
    """A run's manifest, and what is known here of its peers: the newest state, or the one before round 0.

    Raises:
        LocalError: the run is not known here.
    """
    from p2pasr import runs
    from p2pasr.protocol.rules import RoundView

    manifest, run_id = runs.read_run(run)
    folder = runs.run_folder(state_dir or runs.default_home(), run_id)
    if manifest is None or folder.is_dir():
        saved = runs.open_run(run, state_dir)
        manifest = saved.manifest
        if saved.held:
            return manifest, saved.state(None, None)
    return manifest, RoundView(manifest, run_id, 0, b"", {}, {}, {})
