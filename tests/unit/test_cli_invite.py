"""`p2pasr invite`: an invite that peers take, or the one sentence that says why they would not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from p2pasr import cli, runs
from p2pasr.errors import LocalError
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.admission import check_admitted
from p2pasr.protocol.messages import Ticket
from p2pasr.tickets import read_invite_file

from .builders import make_identity, make_manifest, make_state, view_of

FOUNDER, MEMBER, GUEST = map(make_identity, (1, 2, 3))
RUN = make_manifest(admission={"kind": "invite", "peers": (FOUNDER.peer,), "invites_per_peer": 1})
WORTH = 4 * RUN.seconds_per_assignment


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the keys of a founder and of a member, and the run's manifest."""
    for name, who in (("founder", FOUNDER), ("member", MEMBER)):
        path = tmp_path / name
        path.write_bytes(who.to_bytes())
        path.chmod(0o600)
    RUN.write(tmp_path / "run.json")
    return tmp_path


def hold(home: Path, **changes: Any) -> None:
    """A peer of this machine holds a later state of the run."""
    journal = Journal(runs.run_folder(home, RUN.run_id))
    state = replace(make_state(RUN), round=2, parent=bytes([1]) * 32, **changes)
    journal.hold(2, BlobStore(journal.folder / "blobs").put("state", state.blob))
    journal.close()


def invite(home: Path, key: str, *more: str, guest: str = GUEST.peer, run: str = "run.json") -> str:
    arguments = ["invite", "--run", str(home / run), "--identity", str(home / key), "--state-dir", str(home), *more]
    result = CliRunner().invoke(cli.app, [*arguments, guest])
    if isinstance(result.exception, LocalError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_a_founder_invites_before_the_run_has_begun(home: Path) -> None:
    (home / "invite").write_text(invite(home, "founder"))
    packed = read_invite_file(home / "invite", RUN.run_id, GUEST.peer)
    check_admitted(GUEST.peer, Ticket(packed, 0), RUN, view_of(RUN, make_state(RUN)))


def test_a_member_with_enough_merged_work_invites_into_a_file(home: Path) -> None:
    hold(home, credit={MEMBER.peer: WORTH}, guests={MEMBER.peer: FOUNDER.peer})
    said = invite(home, "member", "--out", str(home / "invite"), "--expires", "3")
    assert said.startswith(f"wrote the invite to {home / 'invite'}; the guest starts with")
    assert read_invite_file(home / "invite", RUN.run_id, GUEST.peer)


@pytest.mark.parametrize(
    ("key", "more", "guest", "state", "sentence"),
    [
        ("member", (), GUEST.peer, {}, "has 0 s of merged audio before round 0, and who is no founder may invite"),
        (
            "member",
            (),
            GUEST.peer,
            {"bans": {MEMBER.peer: 1}},
            "was banned in round 1, and its unused invites are void",
        ),
        (
            "founder",
            (),
            GUEST.peer,
            {"guests": {MEMBER.peer: FOUNDER.peer}},
            "1 guests of it have come, and that is all",
        ),
        ("founder", (), GUEST.peer, {"guests": {GUEST.peer: FOUNDER.peer}}, "takes part in this run already"),
        ("founder", (), GUEST.peer, {"bans": {GUEST.peer: 1}}, "was banned from this run in round 1"),
        ("founder", (), FOUNDER.peer, {}, "takes part in this run already"),
        ("founder", (), "somebody", {}, "'somebody' is not the peer ID of an Ed25519 key; it looks like 12D3KooW"),
        ("founder", ("--expires", "8"), GUEST.peer, {}, "--expires 8 is no round to come: the run is in round 0"),
        (
            "founder",
            ("--expires", "1"),
            GUEST.peer,
            {"epoch": 0},
            "--expires 1 is no round to come: the run is in round 2",
        ),
        ("nobody", (), GUEST.peer, {}, "cannot be read"),
    ],
)
def test_an_invite_that_peers_would_not_take_is_not_made(
    home: Path, key: str, more: tuple[str, ...], guest: str, state: dict[str, Any], sentence: str
) -> None:
    if state:
        hold(home, **state)
    with pytest.raises(LocalError, match=sentence):
        invite(home, key, *more, guest=guest)


def test_an_open_run_needs_no_invites(home: Path) -> None:
    make_manifest().write(home / "open.json")
    with pytest.raises(LocalError, match="a small run asks for no invites"):
        invite(home, "founder", run="open.json")
