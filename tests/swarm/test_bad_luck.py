"""What goes wrong on the way in: one clear sentence, and a non-zero exit or another try."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pasr.demo.fleet import Fleet, Process
from p2pasr.protocol.manifest import read_manifest
from p2pasr.runs import run_folder

LATE_CLOCK = """
import sys, time
late = {seconds}
now, ns = time.time, time.time_ns
time.time = lambda: now() + late
time.time_ns = lambda: ns() + int(late * 1e9)
from p2pasr.bootstrap.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_port_in_use_is_named(fleet: Fleet, make_run: Callable[..., Path], shards: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = ("--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}")
        peer = fleet.peer("peer", make_run(), "--seed-data", str(shards), *listen)
        assert_fails(peer, f"port {port} is in use", "--host-maddrs")


def test_an_initial_peer_that_cannot_be_reached_is_tried_again_and_then_named(
    fleet: Fleet, make_run: Callable[..., Path]
) -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWNWTRXeMPRDDyRM57oCu7EUNabeqZuEMn4WsWVLxExHCW"
    peer = fleet.peer("peer", make_run(), "--join-seconds", "4", initial_peers=[nobody])
    assert "trying again in" in str(peer.wait_for("wait")["message"])
    assert_fails(peer, "none of the initial peers can be reached", nobody)


@pytest.mark.parametrize(("seconds", "direction"), [(30, "behind"), (-30, "ahead of")])
def test_a_clock_that_is_off_is_named(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path, seconds: int, direction: str
) -> None:
    options = ["--identity-path", str(folder / "node.key"), "--host-maddrs", "/ip4/127.0.0.1/tcp/0"]
    command = [sys.executable, "-c", LATE_CLOCK.format(seconds=seconds), *options, "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:
        try:
            entry = next(e["maddr"] for e in map(json.loads, node.stdout or ()) if e["event"] == "invite")
            peer = fleet.peer("peer", make_run(), "--seed-data", str(shards), initial_peers=[entry])
            assert_fails(peer, f"clock is 30 s {direction} the network's", "at most 3 s are allowed")
        finally:
            node.terminate()


def test_two_peers_with_one_identity_are_kept_apart(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path
) -> None:
    run = make_run(rounds=1000)
    first = fleet.peer("first", run, "--seed-data", str(shards))
    entry = first.maddr
    same_file = ("--identity-path", str(folder / "first" / "identity.key"))
    assert_fails(fleet.peer("same-file", run, *same_file, initial_peers=[entry]), "in use by another process")
    stolen = folder / "stolen.key"
    shutil.copy2(folder / "first" / "identity.key", stolen)
    other_machine = fleet.peer("copy", run, "--identity-path", str(stolen), initial_peers=[entry])
    assert_fails(other_machine, "another peer on the network already uses the identity", "--identity-path")
    assert first.exit_code is None


def test_a_key_that_others_can_read_is_refused(fleet: Fleet, make_run: Callable[..., Path], folder: Path) -> None:
    key = folder / "open.key"
    key.write_bytes(b"\x08\x01\x12\x40" + bytes(64))
    key.chmod(0o644)
    assert_fails(fleet.peer("peer", make_run(), "--identity-path", str(key)), "can be read by others", "chmod 600")


def test_a_corrupt_and_a_missing_shard_of_ones_own_are_named(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path
) -> None:
    run = make_run()
    damaged = folder / "damaged"
    shutil.copytree(shards, damaged)
    shard = sorted(damaged.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00\x01")
    assert_fails(fleet.peer("corrupt", run, "--seed-data", str(damaged)), shard.name, "is corrupt")
    shard.unlink()
    assert_fails(fleet.peer("missing", run, "--seed-data", str(damaged)), shard.name, "is missing")


def test_a_shard_that_nobody_offers_is_waited_for_and_the_reason_is_said(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    run = make_run(rounds=100_000)
    alone = fleet.peer("alone", run)
    entry = alone.maddr
    assert "nobody on the network offers the shard" in str(alone.wait_for("warning")["message"])
    fleet.peer("holder", run, "--seed-data", str(shards), initial_peers=[entry])
    alone.wait_for("round")


def test_a_shard_that_the_disk_has_damaged_is_fetched_again(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path
) -> None:
    run = make_run(rounds=100_000, shards_per_peer=6)
    first = fleet.peer("first", run, "--seed-data", str(shards))
    entry = first.maddr
    before = fleet.peer("second", run, "--max-rounds", "1", initial_peers=[entry])
    assert before.wait(120.0) == 0
    stored = run_folder(folder / "second", read_manifest(run).run_id) / "blobs" / "shard"
    damaged = sorted(stored.iterdir())[0]
    damaged.write_bytes(b"\x00" + damaged.read_bytes()[1:])
    after = fleet.peer("second", run, "--max-rounds", "1", initial_peers=[entry])
    assert after.wait(120.0) == 0
    assert any("was damaged on disk" in str(event["message"]) for event in after.seen("warning"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_named(fleet: Fleet, make_run: Callable[..., Path], shards: Path, folder: Path) -> None:
    small = folder / "peer"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], check=False).returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        peer = fleet.peer("peer", make_run(rounds=1000), "--seed-data", str(shards))
        assert_fails(peer, "is full", "free some space")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def assert_fails(process: Process, *phrases: str) -> None:
    """A process ends with an error that says these things, in one sentence and no traceback."""
    assert process.wait(90.0) == 1
    said = process.log.read_text(encoding="utf-8")
    assert "Traceback" not in said
    (sentence,) = [line for line in said.splitlines() if line.startswith("p2pasr: ")]
    for phrase in phrases:
        assert phrase in sentence
