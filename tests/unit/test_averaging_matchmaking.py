"""Matchmaking: messages that fit their bounds, and requests of strangers that are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hivemind.proto import averaging_pb2

from p2pasr.averaging.matchmaking import (
    _WHY_NOT,
    MAX_GATHER_BYTES,
    MAX_GROUP_BYTES,
    MAX_JOIN_BYTES,
    Matchmaker,
)
from p2pasr.errors import Reject, TransportError
from p2pasr.peers.host import Host
from p2pasr.protocol.encoding import pack
from p2pasr.protocol.manifest import AveragingSection
from p2pasr.protocol.messages import MAX_RECORD_BYTES, seal
from p2pasr.protocol.signing import peer_id_bytes

from .builders import LocalNetwork, digest_of, make_claim, make_identity, make_manifest, make_state

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
WHO = make_identity(1)
LARGEST = AveragingSection(max_group=64).max_group


def longest_gather() -> bytes:
    claim = make_claim(
        WHO,
        MANIFEST,
        STATE,
        shards=tuple(digest_of(str(number)) for number in range(128)),
        hardware="語" * 128,
        samples=1 << 40,
    )
    return pack({"claim": seal(WHO, claim).pack(), "reduces": True})


def test_the_longest_claim_fits_into_what_a_peer_brings_along() -> None:
    assert len(longest_gather()) <= MAX_GATHER_BYTES
    assert len(pack({"claim": bytes(MAX_RECORD_BYTES), "reduces": True})) <= MAX_GATHER_BYTES


def test_the_longest_request_to_join_fits_into_its_bound() -> None:
    request = averaging_pb2.JoinRequest(
        schema_hash=bytes(32),
        expiration=1e12,
        gather=bytes(MAX_GATHER_BYTES),
        group_key="x" * 100,
        client_mode=True,
    )
    assert request.ByteSize() <= MAX_JOIN_BYTES


def test_the_largest_group_fits_into_its_bound() -> None:
    message = averaging_pb2.MessageFromLeader(
        code=averaging_pb2.BEGIN_ALLREDUCE,
        group_id=bytes(64),
        ordered_peer_ids=[peer_id_bytes(WHO.peer)] * LARGEST,
        gathered=[bytes(MAX_GATHER_BYTES)] * LARGEST,
    )
    assert message.ByteSize() <= MAX_GROUP_BYTES


def test_every_reason_not_to_average_is_one_that_hivemind_gives() -> None:
    assert set(_WHY_NOT) <= set(averaging_pb2.MessageCode.keys())


def at(folder: Path, story: Callable[[Matchmaker, Host, Host], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LocalNetwork(folder, STATE.run) as network:
            leader, follower = network.host(1), network.host(2)
            matchmaker = Matchmaker(leader)
            await matchmaker.start()
            await story(matchmaker, leader, follower)

    asyncio.run(main())


def test_a_peer_alone_is_a_group(tmp_path: Path) -> None:
    async def story(matchmaker: Matchmaker, leader: Host, _: Host) -> None:
        groups = [
            await matchmaker.find(
                schema=bytes(32),
                gather=b"mine",
                expected=1,
                min_size=1,
                window=1.0,
                timeout=1.0,
                admit=pytest.fail,
            )
            for _ in range(2)
        ]
        assert {group.peers for group in groups} == {(leader.peer,)}
        assert {group.gathered for group in groups} == {(b"mine",)}
        assert groups[0].id != groups[1].id
        assert 8 <= len(groups[0].id) <= 64, "a receipt must be able to name it"

    at(tmp_path, story)


def test_whoever_asks_when_no_group_is_formed_is_told_so(tmp_path: Path) -> None:
    async def story(_: Matchmaker, leader: Host, follower: Host) -> None:
        async with follower.open(leader.peer, "join") as stream:
            await stream.send_frame(averaging_pb2.JoinRequest(schema_hash=bytes(32)).SerializeToString())
            answer = averaging_pb2.MessageFromLeader.FromString(await stream.receive_frame(MAX_GROUP_BYTES))
        assert answer.code == averaging_pb2.NOT_LOOKING_FOR_GROUP

    at(tmp_path, story)


def test_a_request_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    async def story(_: Matchmaker, leader: Host, follower: Host) -> None:
        async with follower.open(leader.peer, "join") as stream:
            await stream.send_frame(b"\xff" * 50)
            with pytest.raises(TransportError, match="join request that cannot be read"):
                await stream.receive()

    at(tmp_path, story)


def test_a_request_over_its_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async def story(_: Matchmaker, leader: Host, follower: Host) -> None:
        async with follower.open(leader.peer, "join") as stream:
            stream._writer.write((MAX_JOIN_BYTES + 1).to_bytes(4, "big"))
            with pytest.raises(TransportError, match=f"announces {MAX_JOIN_BYTES + 1} bytes"):
                await stream.receive()

    at(tmp_path, story)


def test_nobody_is_admitted_while_no_group_is_formed(tmp_path: Path) -> None:
    async def story(matchmaker: Matchmaker, *_: Host) -> None:
        with pytest.raises(Reject, match="not forming a group"):
            matchmaker._admit(WHO.peer, b"")

    at(tmp_path, story)
