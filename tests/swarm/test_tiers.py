"""Peers of much and of little memory in one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from p2pasr import runs
from p2pasr.demo.fleet import Fleet
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.tiers import EVERY
from p2pasr.verify.record import RoundRecord

from .conftest import final_states, manifest_of


def test_a_peer_of_little_memory_claims_short_clips_only_and_ends_in_the_state_of_the_others(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    run = make_run(rounds=2, min_peers=2, shards_per_peer=2, verify={"rate": 1.0})
    manifest = _with_long_clips(run, 3)
    large = fleet.peer("large", run, "--seed-data", str(shards))
    small = fleet.peer("small", run, "--longest-clip", "11", initial_peers=[large.maddr])

    assert [peer.wait(60.0) for peer in (large, small)] == [0, 0]
    assert len(final_states(large, small)) == 1
    (said,) = small.seen("tier")
    assert said["message"] == ("this peer trains 3 of 6 shards, those with clips of at most 10 s: --longest-clip is 11")
    assert not large.seen("tier")
    claims = [
        signed.message
        for checked in runs.open_run(str(run), fleet.folder / "large").lineage(
            runs.initial_state(manifest, runs.build_task(manifest))
        )
        if isinstance(checked.record, RoundRecord) and checked.problem is None
        for signed in checked.record.members
    ]
    who = small.wait_for("ready")["peer"]
    assert {claim.tier for claim in claims if claim.peer == who} == {10}
    assert {claim.tier for claim in claims if claim.peer != who} == {EVERY}
    assert len(claims) == 4
    lengths = manifest.clip_lengths
    assert all(lengths[shard.hex()] == 3.0 for claim in claims if claim.peer == who for shard in claim.shards)


def test_a_peer_that_no_shard_is_short_enough_for_says_so_and_ends(
    fleet: Fleet, make_run: Callable[..., Path], shards: Path
) -> None:
    run = make_run()
    _with_long_clips(run, 6)
    small = fleet.peer("small", run, "--seed-data", str(shards), "--longest-clip", "9")
    assert small.wait(60.0) == 1
    assert small.wait_for("error")["message"] == (
        "no shard of this run has clips of at most 5 s only; the shortest of their longest clips has 12 s, and "
        "--longest-clip is 9: name a longer one with --longest-clip, or use another device"
    )


def _with_long_clips(run: Path, count: int) -> RunManifest:
    """Let a manifest say that so many of its shards have clips of 12 s, and the others none beyond 3 s."""
    content = manifest_of(run).model_dump()
    for number, shard in enumerate(content["shards"]):
        shard["longest"] = 12.0 if number < count else 3.0
    manifest = RunManifest.model_validate(content)
    manifest.write(run)
    return manifest
