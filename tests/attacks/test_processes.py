"""Cheats among honest peers, each a process of its own on a real DHT."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pasr.demo.fleet import Fleet, Process
from p2pasr.runs import open_run
from tests.swarm.conftest import final_states

pytestmark = pytest.mark.swarm

HONEST = 3


def start(fleet: Fleet, run: Path, shards: Path, attack: str) -> tuple[list[Process], Process]:
    """Three honest peers and a cheat."""
    entry = [fleet.bootstrap().maddr]
    data = ("--seed-data", str(shards))
    honest = [fleet.peer(f"peer-{number}", run, *data, initial_peers=entry) for number in range(HONEST)]
    command = (sys.executable, "-m", "tests.attacks.adversary", attack)
    return honest, fleet.peer("cheat", run, *data, initial_peers=entry, command=command)


@pytest.mark.parametrize(("attack", "proof"), [("sign-flip", "link"), ("free-rider", "segment")])
def test_a_cheat_is_banned_by_peers_that_know_nothing_of_it_and_the_proof_convinces_a_stranger(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path, attack: str, proof: str
) -> None:
    run = make_run(rounds=6, segments=2, min_peers=HONEST, verify={"rate": 1.0})
    honest, cheat = start(fleet, run, shards, attack)
    assert [process.wait(300) for process in honest] == [0] * HONEST
    assert cheat.wait(60) == 1
    assert "this peer was banned from the run" in cheat.last_words()
    assert len(final_states(*honest)) == 1

    peer = cheat.wait_for("ready")["peer"]
    banned = {name for process in honest for event in process.seen("round") for name in event["banned"]}
    assert banned == {peer}
    for process in honest:
        proofs = list(open_run(str(run), folder / process.name).folder.glob(f"evidence/*-{proof}-{peer}.msgpack"))
        assert proofs, f"{process.name} holds no proof"
    arguments = [str(run), str(shards), str(proofs[0])]
    stranger = subprocess.run(
        [sys.executable, "-m", "tests.attacks.stranger", *arguments], capture_output=True, text=True, check=False
    )
    assert stranger.returncode == 0, stranger.stderr
    assert peer[-6:] in stranger.stdout
