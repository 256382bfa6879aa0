"""Peers meet, train, average and agree; they come late, leave, and come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from p2pasr import runs
from p2pasr.demo.fleet import Fleet
from p2pasr.protocol.manifest import read_manifest

from .conftest import final_states


def test_peers_that_joined_by_run_id_alone_end_in_the_same_state_as_the_first(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    run = make_run(rounds=3, min_peers=3)
    run_id = read_manifest(run).run_id
    entry = fleet.bootstrap().maddr
    first = fleet.peer("first", run, "--seed-data", str(shards), initial_peers=[entry])
    second = fleet.peer("second", run_id.hex(), initial_peers=[entry])
    behind_nat = fleet.peer("behind-nat", run_id.hex(), "--client-mode", initial_peers=[entry])
    peers = (first, second, behind_nat)

    assert [peer.wait(60.0) for peer in peers] == [0, 0, 0]
    assert len(final_states(*peers)) == 1
    assert all(len(event["peers"]) == 3 for peer in peers for event in peer.seen("round"))
    assert not list(behind_nat.wait_for("ready")["maddrs"])
    _check_lineage(run, fleet.folder / "second")


def test_the_first_peer_trains_alone_and_a_late_one_joins_its_next_round(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    run = make_run(rounds=40)
    first = fleet.peer("first", run, "--seed-data", str(shards))
    entry = first.maddr
    first.wait_for("round", round=1)
    late = fleet.peer("late", run, "--max-rounds", "2", initial_peers=[entry])
    joined = late.wait_for("round")
    assert joined["round"] >= 2
    assert len(joined["peers"]) == 2
    assert joined["state"] == first.wait_for("round", round=joined["round"])["state"]
    assert late.wait(60.0) == 0
    alone = first.wait_for("round", round=joined["round"] + 4)
    assert len(alone["peers"]) == 1, "the one that stayed goes on by itself"


def test_a_peer_that_is_started_again_goes_on_where_it_stopped(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    run = make_run(rounds=4)
    before = fleet.peer("peer", run, "--seed-data", str(shards), "--max-rounds", "2")
    assert before.wait(120.0) == 0
    (stopped_at,) = final_states(before)
    after = fleet.peer("peer", run, "--seed-data", str(shards))
    assert after.wait_for("ready")["round"] == 2
    assert after.wait_for("step", step="train")["state"] == stopped_at
    assert after.wait(120.0) == 0
    assert [event["round"] for event in after.seen("round")] == [2, 3]


def _check_lineage(run: Path, home: Path) -> None:
    """Follow a peer's records from the first state to the last, checking each as a stranger would."""
    manifest = read_manifest(run)
    saved = runs.open_run(str(run), home)
    start = runs.initial_state(manifest, runs.build_task(manifest))
    checked = list(saved.lineage(start))
    assert [(item.record.round, item.problem) for item in checked] == [(n, None) for n in range(manifest.rounds.rounds)]
    last = saved.state(None, start.params)
    assert checked[-1].record.after == last.digest
    assert {claim.peer for item in checked for claim in item.record.merged()} == set(last.credit)
