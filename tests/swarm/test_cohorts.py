"""More peers than fit into one group: they part into cohorts, and mix what these have learned into one state."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

from p2pasr import Peer, PeerOptions, RunConfig, State, new_run, runs
from p2pasr.demo.fleet import Fleet
from p2pasr.peers.identity import Identity
from p2pasr.protocol.cohorts import cohort_of
from p2pasr.protocol.manifest import RunManifest
from p2pasr.report import Report
from tests.unit.builders import make_identity

from .test_custom_task import MeanMel

PEERS = 6
CONFIG: dict[str, Any] = {
    "name": "a crowd",
    "task": {"kind": "mean-mel"},
    "rounds": {"rounds": 7, "segments": 1, "shards_per_peer": 1, "max_seconds": 10.0, "grace_seconds": 10.0},
    "averaging": {"codec": "int8", "block": 16, "part_values": 256, "max_group": 6, "mix_rounds": 3},
}


class Unhurried(MeanMel):
    """Takes long enough for a segment that others can see that it is at work."""

    def segment(self, *args: Any) -> Any:
        time.sleep(1.0)
        return super().segment(*args)


def test_a_swarm_that_is_too_large_for_a_group_parts_into_cohorts_and_ends_in_one_state(
    fleet: Fleet, shards: Path, folder: Path
) -> None:
    manifest = new_run(RunConfig.model_validate(CONFIG), shards, task=MeanMel())
    identities = list(half_and_half(manifest))
    logs = [io.StringIO() for _ in range(PEERS)]
    entry = fleet.bootstrap().maddr
    start = Barrier(PEERS)

    def live(number: int) -> State:
        key = folder / f"{number}.key"
        key.write_bytes(identities[number].to_bytes())
        key.chmod(0o600)
        options = PeerOptions(
            state_dir=folder / str(number),
            identity_path=key,
            seed_data=shards,
            host_maddrs=("/ip4/127.0.0.1/tcp/0",),
            initial_peers=(entry,),
        )
        with Peer(manifest, options, Report("json", logs[number]), task=Unhurried()) as peer:
            start.wait(60.0)
            peer.run()
            return peer.state

    try:
        with ThreadPoolExecutor(PEERS) as pool:
            lives = [pool.submit(live, number) for number in range(PEERS)]
            ends = [life.result(240.0) for life in lives]
    finally:
        for number, log in enumerate(logs):
            print(f"--- peer {number}")
            print(log.getvalue())
    assert len({end.digest for end in ends}) == 1
    assert ends[0].credit.keys() == {identity.peer for identity in identities}
    mixes = [event for log in logs for event in map(json.loads, log.getvalue().splitlines()) if event["event"] == "mix"]
    assert {event["cohort"] for event in mixes} == {"1-0", "1-1"}
    for number in {event["round"] for event in mixes}:
        assert len({event["state"] for event in mixes if event["round"] == number}) == 1
    first = runs.initial_state(manifest, MeanMel())
    homes = [folder / str(number) for number in range(PEERS)]
    lineages = [list(runs.open_run(manifest.run_id.hex(), home).lineage(first)) for home in homes]
    assert all(item.problem is None for lineage in lineages for item in lineage)
    assert ends[0].digest in {lineage[-1].record.after for lineage in lineages}


def half_and_half(manifest: RunManifest) -> Iterator[Identity]:
    """Keys of which every second belongs to the second cohort."""
    halves: list[list[Identity]] = [[], []]
    for key in map(make_identity, range(1, 65)):
        halves[cohort_of(manifest.run_id, key.peer, 1).index].append(key)
    return itertools.islice(itertools.chain.from_iterable(zip(*halves, strict=False)), PEERS)
