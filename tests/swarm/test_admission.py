"""A run that peers join by invite, on a real network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from p2pasr import runs
from p2pasr.cli import invite as inviting
from p2pasr.demo.fleet import Fleet
from p2pasr.peers.identity import load_or_create
from p2pasr.protocol.manifest import RunManifest, read_manifest

from .conftest import final_states


def test_a_guest_of_a_founder_trains_with_it_and_a_stranger_is_told_to_ask_for_an_invite(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    names = ("founder", "guest", "stranger")
    founder, guest, _ = (load_or_create(fleet.folder / name / "identity.key") for name in names)
    content = read_manifest(make_run(rounds=3, min_peers=2)).model_dump()
    content["admission"] |= {"kind": "invite", "peers": (founder.peer,), "work_bits": 8}
    run = fleet.folder / "invite.run.json"
    RunManifest.model_validate(content).write(run)
    ticket = fleet.folder / "invite"
    inviting.invite(guest.peer, str(run), fleet.folder / "founder" / "identity.key", None, None, ticket)

    first = fleet.peer("founder", run, "--seed-data", str(shards))
    entry = first.maddr
    outside = fleet.peer("stranger", run, initial_peers=[entry])
    second = fleet.peer("guest", run, "--invite", str(ticket), initial_peers=[entry])

    assert outside.wait(90.0) == 1
    assert "has no invite to this run; ask a member" in outside.last_words()
    assert [peer.wait(120.0) for peer in (first, second)] == [0, 0]
    assert len(final_states(first, second)) == 1
    state = runs.open_run(str(run), fleet.folder / "guest").state(None, None)
    assert state.guests == {guest.peer: founder.peer}
    assert state.credit.keys() == {founder.peer, guest.peer}
