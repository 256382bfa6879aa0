"""Processes end in every way they can; nothing is lost and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from p2pasr.demo.fleet import Fleet, Process

from .conftest import final_states

STEPS = ("sync", "assign", "train", "commit", "average", "apply", "attest", "audit")


def test_a_peer_killed_at_each_of_the_eight_steps_loses_at_most_the_round_in_progress(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    run = make_run(rounds=2 * len(STEPS), min_peers=2, grace_seconds=5.0)
    entry = fleet.bootstrap().maddr
    survivor = fleet.peer("survivor", run, "--seed-data", str(shards), initial_peers=[entry])
    lives = [fleet.peer("victim", run, initial_peers=[entry])]
    held = 0
    for step in STEPS:
        victim = lives[-1]
        resumed_at = int(victim.wait_for("ready")["round"])
        assert resumed_at >= held, f"the victim lost a committed round after it was killed before {step}"
        victim.wait_for("round")
        victim.wait_for("step", step=step, round=int(victim.seen("round")[-1]["round"]) + 1)
        victim.kill()
        held = int(victim.seen("round")[-1]["round"]) + 1
        lives.append(fleet.peer("victim", run, initial_peers=[entry]))
    assert survivor.wait(240.0) == 0
    assert lives[-1].wait(60.0) == 0
    assert len(final_states(survivor, lives[-1])) == 1


def test_ctrl_c_ends_a_peer_and_leaves_nothing(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path
) -> None:
    temporary = folder / "tmp"
    temporary.mkdir()
    peer = fleet.peer(
        "peer",
        make_run(rounds=1000, steps_per_segment=50),
        "--seed-data",
        str(shards),
        environment={"TMPDIR": str(temporary)},
    )
    peer.wait_for("step", step="train", round=1)
    family = _family(peer)
    assert len(family) >= 3, "training process, network process and libp2p daemon"
    assert list(temporary.iterdir())
    asked = time.monotonic()
    peer.popen.send_signal(signal.SIGINT)
    assert peer.wait(30.0) == 130
    print(f"ended after {time.monotonic() - asked:.1f} s")
    assert [process for process in family if process.is_running()] == []
    assert list(temporary.iterdir()) == []
    assert not [path for path in (folder / "peer").rglob("*") if path.suffix == ".part" or path.is_symlink()]


def test_a_killed_peers_sockets_are_removed_by_its_next_start(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path
) -> None:
    temporary = folder / "tmp"
    temporary.mkdir()
    run = make_run(rounds=1000)
    options = ("--seed-data", str(shards))
    killed = fleet.peer("peer", run, *options, environment={"TMPDIR": str(temporary)})
    killed.wait_for("ready")
    family = _family(killed)
    killed.kill()
    _, alive = psutil.wait_procs(family, timeout=10.0)
    assert alive == [], "the network process and the daemon end with the training process"
    (left,) = temporary.iterdir()
    again = fleet.peer("peer", run, *options, environment={"TMPDIR": str(temporary)})
    again.wait_for("ready")
    assert not left.exists()


@pytest.mark.parametrize("victim", ["p2pasr.network", "p2pd"])
def test_a_network_process_that_dies_is_restarted_and_the_round_goes_on(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, victim: str
) -> None:
    run = make_run(rounds=8, min_peers=2)
    first = fleet.peer("first", run, "--seed-data", str(shards))
    second = fleet.peer("second", run, initial_peers=[first.maddr])
    second.wait_for("round", round=1)
    (process,) = [p for p in _family(second) if victim in " ".join(p.cmdline())]
    process.kill()
    assert first.wait(180.0) == 0
    assert second.wait(60.0) == 0
    assert any("restarted in" in str(event["message"]) for event in second.seen("warning"))
    assert len(final_states(first, second)) == 1


def test_a_bootstrap_node_keeps_its_address_and_ends_cleanly(fleet: Fleet, folder: Path) -> None:
    temporary = folder / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"], before = str(temporary), os.environ.get("TMPDIR")
    try:
        node = fleet.bootstrap("node")
        peer_id = node.wait_for("ready")["peer"]
        family = _family(node)
        node.popen.send_signal(signal.SIGTERM)
        assert node.wait(10.0) == 0
        assert [process for process in family if process.is_running()] == []
        assert list(temporary.iterdir()) == []
        assert fleet.bootstrap("node").wait_for("ready")["peer"] == peer_id
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


def _family(process: Process) -> list[psutil.Process]:
    """A process and all that it started."""
    parent = psutil.Process(process.popen.pid)
    return [parent, *parent.children(recursive=True)]
