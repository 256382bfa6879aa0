"""Matchmaking: messages that fit their bounds, and requests of strangers that are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.timed_storage import ValueWithExpiration

from p2pasr.averaging.matchmaking import (
    _WHY_NOT,
    GROUP_ID_BYTES,
    MAX_GATHER_BYTES,
    MAX_GROUP_BYTES,
    MAX_JOIN_BYTES,
    Group,
    Matchmaker,
    _check_message,
)
from p2pasr.errors import Reject, TransportError
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream
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
                expected=(leader.peer,),
                size=1,
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


class Shelf:
    """As much of a DHT as declaring oneself needs; everybody's node is on the same one."""

    def __init__(self) -> None:
        self.records: dict[str, dict[bytes, ValueWithExpiration]] = {}

    async def store(self, key: str, value: Any, expiration_time: float, subkey: bytes) -> bool:
        self.records.setdefault(key, {})[subkey] = ValueWithExpiration(value, expiration_time)
        return True

    async def get(self, key: str, latest: bool) -> Any:
        return ValueWithExpiration(dict(self.records[key]), 0.0) if key in self.records else None


class Node:
    """One peer's node of the DHT."""

    def __init__(self, shelf: Shelf, peer: str) -> None:
        self.peer_id = PeerID.from_base58(peer)
        self.store, self.get = shelf.store, shelf.get


class Market:
    """Peers that can find each other."""

    def __init__(self, network: LocalNetwork) -> None:
        self._network = network
        self.shelf = Shelf()

    async def join(self, number: int) -> tuple[Host, Matchmaker]:
        host = self._network.host(number)
        host.node._dht = Node(self.shelf, host.peer)
        matchmaker = Matchmaker(host)
        await matchmaker.start()
        return host, matchmaker

    async def evil_leader(self, host: Host, messages: list[averaging_pb2.MessageFromLeader]) -> None:
        """Make a peer declare itself before everybody else and tell its followers what it likes."""

        async def lead(stream: Stream) -> None:
            await stream.receive_frame(MAX_JOIN_BYTES)
            for message in messages:
                await stream.send_frame(message.SerializeToString())

        await host.serve("join", lead)
        prefix = f"p2pasr-{host.run.hex()[:32]}.0b"
        await self.shelf.store(prefix, True, get_dht_time() + 0.1, PeerID.from_base58(host.peer).to_bytes())


def find(matchmaker: Matchmaker, expected: list[Host], size: int = 2, **changes: Any) -> Awaitable[Group]:
    arguments: dict[str, Any] = {
        "schema": bytes(32),
        "gather": b"brought along",
        "expected": [host.peer for host in expected],
        "size": size,
        "min_size": 2,
        "window": 1.0,
        "timeout": 3.0,
        "admit": lambda _peer, _gathered: None,
    }
    return matchmaker.find(**{**arguments, **changes})


def on_a_market(folder: Path, story: Callable[[Market], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LocalNetwork(folder, STATE.run) as network:
            await story(Market(network))

    asyncio.run(main())


def test_peers_that_expect_each_other_form_a_group(tmp_path: Path) -> None:
    async def story(market: Market) -> None:
        members = [await market.join(number) for number in (1, 2, 3)]
        hosts = [host for host, _ in members]
        groups = await asyncio.gather(*(find(matchmaker, hosts, 3, timeout=20.0) for _, matchmaker in members))
        assert len(set(groups)) == 1
        assert sorted(groups[0].peers) == sorted(host.peer for host in hosts)
        assert groups[0].gathered == (b"brought along",) * 3
        assert len(groups[0].id) == GROUP_ID_BYTES

    on_a_market(tmp_path, story)


BROUGHT = b"brought along"


def begin(
    peers: list[bytes], name: bytes = bytes(GROUP_ID_BYTES), count: int | None = None, brought: bytes = BROUGHT
) -> Any:
    return averaging_pb2.MessageFromLeader(
        code=averaging_pb2.BEGIN_ALLREDUCE,
        group_id=name,
        ordered_peer_ids=peers,
        gathered=[brought] * (len(peers) if count is None else count),
    )


ACCEPTED = averaging_pb2.MessageFromLeader(code=averaging_pb2.ACCEPTED)
ME, EVIL, STRANGER = (peer_id_bytes(make_identity(number).peer) for number in (1, 9, 99))

LIES: dict[str, tuple[averaging_pb2.MessageFromLeader, str]] = {
    "a word that there is not": (averaging_pb2.MessageFromLeader(code=77), "answers 77, which means nothing"),
    "a group without us": (begin([EVIL, STRANGER]), "its group is malformed"),
    "nobody": (begin([]), "its group is malformed"),
    "a peer twice": (begin([ME, EVIL, EVIL]), "its group is malformed"),
    "too little brought along": (begin([ME, EVIL], count=1), "its group is malformed"),
    "a nameless group": (begin([ME, EVIL], b""), "its group has a name of 0 bytes"),
    "a long name": (begin([ME, EVIL], bytes(65)), "its group has a name of 65 bytes"),
    "an earlier group": (begin([ME, EVIL], brought=b"brought before"), "something else than this peer brings along"),
    "strangers": (begin([ME, EVIL, STRANGER]), "not let in"),
    "no peer ID": (begin([ME, b"\xff"]), "is not the peer ID"),
}


def admit_two(peer: str, _gathered: bytes) -> None:
    if peer_id_bytes(peer) not in (ME, EVIL):
        raise Reject("not let in")


@pytest.mark.parametrize(("message", "reason"), LIES.values(), ids=LIES)
def test_what_no_leader_may_say_is_refused(message: averaging_pb2.MessageFromLeader, reason: str) -> None:
    with pytest.raises(Reject, match=reason):
        _check_message(message, WHO.peer, BROUGHT, admit_two)


@pytest.mark.parametrize("message", [ACCEPTED, begin([ME, EVIL]), begin([EVIL, ME])])
def test_what_a_leader_may_say_passes(message: averaging_pb2.MessageFromLeader) -> None:
    _check_message(message, WHO.peer, BROUGHT, admit_two)


@pytest.mark.parametrize("lie", ["a word that there is not", "a group without us", "strangers", "an earlier group"])
def test_a_leader_that_lies_is_told_and_does_not_end_the_search(tmp_path: Path, lie: str) -> None:
    message, reason = LIES[lie]

    async def story(market: Market) -> None:
        host, matchmaker = await market.join(1)
        evil, _ = await market.join(9)
        await market.evil_leader(evil, [ACCEPTED, message])
        with pytest.raises(
            TransportError, match=rf"no group of 2 within 1 s: …\w{{6}} cannot be followed \(.*{reason}"
        ):
            await find(matchmaker, [host, evil], timeout=1.0, window=0.4, admit=admit_two)

    on_a_market(tmp_path, story)


def test_who_is_not_expected_is_not_even_asked(tmp_path: Path) -> None:
    async def story(market: Market) -> None:
        host, matchmaker = await market.join(1)
        (evil, _), (other, _) = await market.join(9), await market.join(2)
        asked: list[str] = []

        async def note(stream: Stream) -> None:
            asked.append(stream.peer)

        await market.evil_leader(evil, [])
        await evil.serve("join", note)
        with pytest.raises(TransportError, match="nothing is known of it in this round"):
            await find(matchmaker, [host, other], timeout=1.0, window=0.4)
        assert asked == []

    on_a_market(tmp_path, story)


def test_whatever_goes_wrong_in_the_search_is_a_failed_attempt_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(market: Market) -> None:
        host, matchmaker = await market.join(1)
        for error, reason in ((RuntimeError("something odd"), "something odd"), (AssertionError(), "AssertionError")):

            async def fail(*_: object, error: Exception = error) -> None:
                raise error

            monkeypatch.setattr("hivemind.averaging.matchmaking.Matchmaking.look_for_group", fail)
            with pytest.raises(TransportError, match=rf"no group could be formed \({reason}\)"):
                await find(matchmaker, [host])
            with pytest.raises(Reject, match="not forming a group"):
                matchmaker._admit(host.peer, b"")

    on_a_market(tmp_path, story)
