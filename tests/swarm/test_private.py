"""Peers that train on recordings of their own homes, and one among them that asks the others for theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pasr import Peer, PeerOptions, RunConfig, Settings, new_run, prepare
from p2pasr.demo.fleet import Fleet
from p2pasr.errors import TransportError
from p2pasr.protocol.manifest import RunManifest
from p2pasr.speech.prepare import read_index
from p2pasr.speech.synthetic import write_corpus

from .conftest import MODEL


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folders of private shards; in each home others speak and say something else."""
    made = []
    for seed in (1, 2, 3):
        corpus, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("private")
        write_corpus(corpus, dialect="yue", split="train", clips=16, people=1, seed=seed)
        prepare(corpus, out, Settings(MODEL, dialect="yue", clips_per_shard=8))
        made.append(out)
    return made


@pytest.fixture
def manifest(shards: Path) -> RunManifest:
    """A quick run with a probe of six shards."""
    config = RunConfig.model_validate(
        {
            "name": "private",
            "task": {"kind": "lora", "config": {"model": MODEL, "rank": 4, "warmup_steps": 2}},
            "rounds": {
                "rounds": 2,
                "segments": 1,
                "steps_per_segment": 2,
                "samples_per_step": 4,
                "shards_per_peer": 1,
                "max_seconds": 30.0,
                "grace_seconds": 15.0,
                "min_peers": 3,
            },
            "data": {"policy": "private"},
            "verify": {"rate": 1.0},
        }
    )
    return new_run(config, shards)


def test_homes_train_together_and_nobody_gives_or_offers_what_was_recorded_in_one(
    fleet: Fleet, folder: Path, manifest: RunManifest, homes: list[Path], shards: Path
) -> None:
    run = folder / "private.run.json"
    manifest.write(run)
    entry = fleet.bootstrap().maddr
    own = [["--private-shards", str(home)] for home in homes]
    first = fleet.peer("first", run, "--seed-data", str(shards), *own[0], initial_peers=[entry])
    second = fleet.peer("second", run, *own[1], initial_peers=[entry])
    options = PeerOptions(
        initial_peers=(entry,),
        state_dir=folder / "curious",
        private_shards=homes[2],
        host_maddrs=("/ip4/127.0.0.1/tcp/0",),
        device="cpu",
        threads=1,
    )
    states = {}
    with Peer(run, options) as curious:
        link = curious.member.link
        peers = [process.wait_for("ready")["peer"] for process in (first, second)]
        for number in curious.rounds():
            states[number] = curious.state.digest.hex()
            for home in homes[:2]:
                for shard in read_index(home).shards:
                    with pytest.raises(TransportError, match=r"nobody on the network offers|none of 2 peers gives"):
                        link.call(
                            "fetch",
                            10.0,
                            digest=bytes.fromhex(shard.digest),
                            kind="shard",
                            max_bytes=shard.bytes,
                            peers=peers if number else (),
                        )
        credit = curious.state.credit
        assert curious.member.journal.read_record(1) is not None
    assert sorted(states) == [0, 1]
    found = []
    for process in (first, second):
        assert process.wait(60.0) == 0
        assert {str(event["state"]) for event in process.seen("round")} == set(states.values())
        found += process.seen("audit", what="probe")
    assert {event["finding"] for event in found} == {"close"}  # at least of the third, which one of them was drawn for
    assert len(credit) == 3
    for name in ("first", "second", "curious"):
        private = {shard.digest for home in homes for shard in read_index(home).shards}
        assert not [path for path in (folder / name).rglob("*") if path.name in private]
        assert not list((folder / name).glob("runs/*/blobs/checkpoint/*"))


def test_a_run_of_private_shards_says_what_a_peer_without_any_must_do(
    fleet: Fleet, folder: Path, manifest: RunManifest, shards: Path
) -> None:
    run = folder / "private.run.json"
    manifest.write(run)
    peer = fleet.peer("peer", run, "--seed-data", str(shards))
    assert peer.wait(60.0) == 1
    assert "name the folder with --private-shards" in peer.last_words()
