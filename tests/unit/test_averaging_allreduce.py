"""The all-reduce: everybody ends with the same bytes, made of what was committed to and of nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr.averaging import allreduce as module
from p2pasr.averaging import reducer as reducer_module
from p2pasr.averaging.allreduce import AllReduce
from p2pasr.averaging.codec import Layout, Vector
from p2pasr.averaging.group import Brought, Members, check_gathered, check_group, group_id
from p2pasr.averaging.matchmaking import Group
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.reducer import PartReducer
from p2pasr.averaging.rules import Center, aggregate, drawn_order, weighted_mean, weights
from p2pasr.averaging.shares import split
from p2pasr.errors import Ignore, LocalError, Reject, TransportError
from p2pasr.peers import host as host_module
from p2pasr.peers.host import Host
from p2pasr.protocol.encoding import blob_digest, pack, unpack
from p2pasr.protocol.manifest import RuleSection
from p2pasr.protocol.messages import MAX_RECEIPT_BYTES, NO_UNDO, Claim, PartReceipt, Receipt, Signed, seal, unseal
from p2pasr.protocol.rules import check_receipts
from p2pasr.protocol.signing import short
from p2pasr.verify.conflict import Conflict, contradict
from p2pasr.verify.record import in_every_part

from .builders import (
    GROUP,
    LocalNetwork,
    delta_claim,
    make_claim,
    make_identity,
    make_manifest,
    make_receipt,
    make_state,
    random_delta,
    view_of,
)

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
VIEW = view_of(MANIFEST, STATE)
LAYOUT = Layout.of(MANIFEST.parameters, MANIFEST.averaging)
PARTS = LAYOUT.parts


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers that were refused by a test do not wait long for the test to hang up."""
    monkeypatch.setattr(host_module, "LINGER_SECONDS", 0.1)


def members_of(count: int, reducers: tuple[int, ...] | None = None) -> Members:
    claims = tuple(
        seal(make_identity(n + 1), delta_claim(make_identity(n + 1), MANIFEST, STATE, random_delta(n)))
        for n in range(count)
    )
    weighing = weights([claim.message for claim in claims], MANIFEST, {}, {})
    return Members(GROUP, claims, shares_of(count, reducers), weighing, frozenset(reducers or range(count)))


def shares_of(count: int, reducers: tuple[int, ...] | None = None) -> tuple[range, ...]:
    return split(PARTS, [1.0 if position in (reducers or range(count)) else 0.0 for position in range(count)])


def encoded(position: int) -> list[bytes]:
    return LAYOUT.encode(random_delta(position))


def mean_of(index: int, positions: list[int], members: Members) -> bytes:
    size = LAYOUT.part_size(index)
    parts = {position: LAYOUT.codec.decode(encoded(position)[index], size) for position in positions}
    return LAYOUT.codec.encode(weighted_mean(parts, members.weights))


def test_a_member_has_a_position_and_a_stranger_has_none() -> None:
    members = members_of(3)
    assert [members.position(claim.message.peer) for claim in members.claims] == [0, 1, 2]
    with pytest.raises(Reject, match="is not in this group"):
        members.position(make_identity(9).peer)


class Bench:
    """A reducer of some parts, and what comes out of it."""

    def __init__(self, members: Members, indices: range, reference: PartFile | None = None) -> None:
        self.members = members
        self.kept: dict[int, bytes] = {}
        everybody = set(range(len(members.claims)))
        self.reducer = PartReducer(members, LAYOUT, indices, everybody, self.kept.__setitem__, reference)

    def submit(self, position: int, index: int) -> None:
        self.reducer.submit(position, index, encoded(position)[index])

    async def result(self, index: int) -> tuple[bytes, PartReceipt]:
        async with asyncio.timeout(10):
            receipt = await asyncio.shield(self.reducer.results[index])
        return self.kept[index], receipt

    def waits(self, index: int) -> bool:
        return index not in self.reducer._started


def on_the_bench(story: Callable[[Bench], Awaitable[None]], count: int = 3, indices: range = range(PARTS)) -> None:
    async def main() -> None:
        await story(Bench(members_of(count), indices))

    asyncio.run(main())


def test_a_part_is_reduced_once_all_have_sent_it() -> None:
    async def story(bench: Bench) -> None:
        for position in (2, 0):
            bench.submit(position, 1)
            assert bench.waits(1)
        bench.submit(1, 1)
        data, receipt = await bench.result(1)
        assert data == mean_of(1, [0, 1, 2], bench.members)
        assert receipt == PartReceipt(1, (0, 1, 2), blob_digest(data))
        assert bench.waits(0)

    on_the_bench(story)


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    results = set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):

        async def story(bench: Bench, order: tuple[int, ...] = order) -> None:
            for position in order:
                bench.submit(position, 0)
            results.add((await bench.result(0))[0])

        on_the_bench(story)
    assert len(results) == 1


def test_a_dropped_sender_is_waited_for_no_longer_and_the_rest_share_its_weight() -> None:
    async def story(bench: Bench) -> None:
        bench.submit(0, 1)
        bench.submit(2, 1)
        bench.reducer.drop(1)
        data, receipt = await bench.result(1)
        assert data == mean_of(1, [0, 2], bench.members)
        assert receipt.senders == (0, 2)

    on_the_bench(story)


def test_what_a_dropped_sender_did_send_still_counts() -> None:
    async def story(bench: Bench) -> None:
        bench.submit(1, 0)
        bench.reducer.drop(1)
        for index in (0, 1):
            bench.submit(0, index)
            bench.submit(2, index)
        assert (await bench.result(0))[1].senders == (0, 1, 2)
        assert (await bench.result(1))[1].senders == (0, 2)
        assert (await bench.result(0))[0] == mean_of(0, [0, 1, 2], bench.members)

    on_the_bench(story)


def test_the_last_part_of_a_share_may_be_smaller() -> None:
    async def story(bench: Bench) -> None:
        for position in range(3):
            bench.submit(position, PARTS - 1)
        data, _ = await bench.result(PARTS - 1)
        assert len(data) == LAYOUT.part_bytes(PARTS - 1) == 4 * 88
        assert data == mean_of(PARTS - 1, [0, 1, 2], bench.members)

    on_the_bench(story)


def test_dropping_everybody_else_leaves_our_own_part() -> None:
    async def story(bench: Bench) -> None:
        bench.submit(0, 0)
        bench.reducer.drop(1)
        bench.reducer.drop(2)
        bench.reducer.drop(2)
        assert (await bench.result(0))[0] == encoded(0)[0]

    on_the_bench(story)


def test_a_part_that_nobody_sent_is_not_reduced_to_nothing() -> None:
    async def story(bench: Bench) -> None:
        for position in range(3):
            bench.reducer.drop(position)
        assert bench.waits(0)
        bench.submit(1, 0)
        assert (await bench.result(0))[1].senders == (1,)

    on_the_bench(story)


def test_what_comes_twice_or_late_changes_no_result() -> None:
    async def story(bench: Bench) -> None:
        bench.submit(0, 0)
        bench.submit(0, 0)
        assert bench.waits(0)
        bench.submit(1, 0)
        bench.reducer.drop(2)
        first = await bench.result(0)
        assert first[1].senders == (0, 1)
        for position in (0, 2):
            bench.submit(position, 0)
        assert await bench.result(0) == first

    on_the_bench(story)


def test_what_comes_late_is_not_kept() -> None:
    async def story(bench: Bench) -> None:
        bench.submit(0, 0)
        bench.reducer.drop(1)
        bench.reducer.drop(2)
        await bench.result(0)
        bench.submit(2, 0)
        assert not bench.reducer.received.get(0)

    on_the_bench(story)


def test_centered_clip_starts_from_the_references_part_and_fills_buckets_by_lot(tmp_path: Path) -> None:
    last = random_delta(9)
    path = tmp_path / "reference"
    path.write_bytes(b"".join(LAYOUT.encode(last)))
    members = dataclasses.replace(members_of(8), rule=RuleSection(kind="centered-clip", radius=0.5))
    order = drawn_order(STATE.digest, [claim.message.peer for claim in members.claims])

    async def story(reference: PartFile | None) -> None:
        bench = Bench(members, range(PARTS), reference)
        for index, position in itertools.product(range(PARTS), (2, 0, 1, 7, 5, 6, 4, 3)):
            bench.submit(position, index)
        for index in range(PARTS):
            cut = slice(256 * index, 256 * index + LAYOUT.part_size(index))
            center = Center(last[cut] if reference else None, order)
            parts = {position: random_delta(position)[cut] for position in range(8)}
            expected = LAYOUT.codec.encode(aggregate(parts, members.weights, members.rule, center))
            assert (await bench.result(index))[0] == expected

    asyncio.run(story(None))
    with PartFile(path, LAYOUT) as reference:
        asyncio.run(story(reference))


def gathered(claim: Signed[Claim], /, **changes: Any) -> bytes:
    nothing: dict[str, Any] = {"rates": {}, "failed": (), "nonce": bytes(16)}
    return pack({"claim": claim.pack(), "reduces": True, **nothing, **changes})


def group_of(members: Members, reduces: tuple[bool, ...] | None = None) -> Group:
    each = reduces or (True,) * len(members.claims)
    return Group(
        GROUP,
        tuple(claim.message.peer for claim in members.claims),
        tuple(gathered(claim, reduces=does) for claim, does in zip(members.claims, each, strict=True)),
    )


def test_a_group_of_valid_claims_becomes_members_in_its_order() -> None:
    members = members_of(3)
    checked = check_group(group_of(members), VIEW, members.claims[1])
    assert checked == dataclasses.replace(members, group=group_id(group_of(members)))
    some = check_group(group_of(members, (True, False, True)), VIEW, members.claims[1])
    assert some.reducers == (0, 2)
    assert check_group(group_of(members), VIEW, members.claims[1], (1.0, 2.0)).limits == (1.0, 2.0)


def test_members_weigh_what_the_ledger_of_the_state_trusts_them_with() -> None:
    members = members_of(3)
    credit = {members.claims[1].message.peer: 1e6}
    checked = check_group(group_of(members), dataclasses.replace(VIEW, credit=credit), members.claims[0])
    claims = [claim.message for claim in members.claims]
    assert checked.weights == weights(claims, MANIFEST, credit, {}) != members.weights


def test_a_peer_alone_reduces_even_in_client_mode() -> None:
    members = members_of(1)
    assert check_group(group_of(members, (False,)), VIEW, members.claims[0]).reducers == (0,)


def test_a_group_in_which_nobody_can_be_reached_cannot_average() -> None:
    members = members_of(2)
    with pytest.raises(TransportError, match="client mode"):
        check_group(group_of(members, (False, False)), VIEW, members.claims[0])


def test_a_group_without_our_claim_is_refused() -> None:
    members = members_of(3)
    ours = seal(make_identity(9), make_claim(make_identity(9), MANIFEST, STATE))
    with pytest.raises(Reject, match="lacks this peer's claim"):
        check_group(group_of(members), VIEW, ours)
    other = seal(make_identity(1), make_claim(make_identity(1), MANIFEST, STATE, segments=1))
    with pytest.raises(Reject, match="lacks this peer's claim"):
        check_group(group_of(members), VIEW, other)


def test_a_group_that_names_a_peer_twice_or_lacks_a_claim_is_refused() -> None:
    members = members_of(2)
    group = group_of(members)
    twice = Group(GROUP, group.peers * 2, group.gathered * 2)
    short = Group(GROUP, group.peers, group.gathered[:1])
    for malformed in (twice, short):
        with pytest.raises(Reject, match="malformed"):
            check_group(malformed, VIEW, members.claims[0])


def test_a_group_with_one_bad_claim_is_refused() -> None:
    who = make_identity(1), make_identity(2)
    for changes, error in (
        ({"samples": 7}, Reject),
        ({"round": 5}, Ignore),
        ({"state": bytes(32)}, Ignore),
        ({"run": bytes(32)}, Reject),
    ):
        claims = (
            seal(who[0], make_claim(who[0], MANIFEST, STATE)),
            seal(who[1], make_claim(who[1], MANIFEST, STATE, **changes)),
        )
        group = Group(GROUP, tuple(w.peer for w in who), tuple(map(gathered, claims)))
        with pytest.raises(error):
            check_group(group, VIEW, claims[0])


def test_what_a_stranger_brings_is_a_claim_of_its_own_or_refused() -> None:
    claim = members_of(1).claims[0]
    peer = claim.message.peer
    assert check_gathered(peer, gathered(claim), VIEW) == Brought(claim, True)
    assert check_gathered(peer, gathered(claim, reduces=False), VIEW) == Brought(claim, False)
    for brought in (
        b"",
        b"\xc1",
        pack(None),
        pack((claim.pack(), True)),
        pack({}),
        pack({"claim": claim.pack()}),
        pack({"claim": claim.pack(), "reduces": True}),
        gathered(claim, more=1),
        gathered(claim, rates=None),
        gathered(claim, rates={"someone": 1.5}),
        gathered(claim, rates={"someone": 0}),
        gathered(claim, rates={"someone": True}),
        gathered(claim, rates={"someone": 1 << 41}),
        gathered(claim, failed="all"),
        gathered(claim, failed=(1,)),
        gathered(claim, nonce=b""),
        gathered(claim, nonce=bytes(17)),
        gathered(claim, nonce="text"),
        gathered(claim, reduces=1),
        gathered(claim, reduces=None),
        gathered(claim, claim=None),
        gathered(claim, claim="text"),
        gathered(claim, claim=claim.pack()[:-1]),
        gathered(claim) + b"\x00",
        bytes(20_000),
    ):
        with pytest.raises(Reject):
            check_gathered(peer, brought, VIEW)
    with pytest.raises(Reject, match="brought the claim of"):
        check_gathered(make_identity(2).peer, gathered(claim), VIEW)


class Swarm:
    """Members of one group, each with a host of its own."""

    def __init__(self, network: LocalNetwork, count: int, reducers: tuple[int, ...]) -> None:
        self.network = network
        self.members = members_of(count, reducers)
        self.hosts: list[Host] = []
        self.services: dict[int, AllReduce] = {}

    async def join(self, position: int) -> None:
        """An honest member, which serves and takes part."""
        service = AllReduce()
        await service.start(self.hosts[position])
        self.services[position] = service

    async def average(self, position: int) -> tuple[list[bytes], list[Signed[Receipt]]]:
        service, host, parts = self.services[position], self.hosts[position], encoded(position)
        path = host.store.find(host.store.put("delta", b"".join(parts)))
        assert path is not None
        delta = PartFile(path, LAYOUT)
        session = await service._open(self.members, LAYOUT, VIEW, delta, tuple(part_digests(parts)))
        receipts = await service._run(session)
        return [session.average.read(index) for index in range(PARTS)], receipts

    async def average_all(self) -> list[tuple[list[bytes], list[Signed[Receipt]]]]:
        async with asyncio.timeout(20):
            return await asyncio.gather(*map(self.average, self.services))

    async def send(
        self, cheat: int, to: int, parts: list[bytes], digests: list[bytes] | None = None, opening: Any = None
    ) -> None:
        """A member that sends one reducer what it likes."""
        stated = tuple(digests or part_digests(parts))
        async with self.hosts[cheat].open(self.hosts[to].peer, "reduce") as stream:
            await stream.send(opening or {"group": GROUP, "digests": stated})
            await stream.receive()
            for index in self.members.shares[to]:
                await stream.send_frame(parts[index])
            for index in self.members.shares[to]:
                data = await stream.receive_frame(LAYOUT.part_bytes(index))
                if len(data) != LAYOUT.part_bytes(index):
                    raise TransportError(unpack(data, len(data))["error"])
            await stream.receive_frame(MAX_RECEIPT_BYTES)


def in_a_swarm(
    folder: Path,
    story: Callable[[Swarm], Awaitable[None]],
    count: int = 3,
    reducers: tuple[int, ...] = (0, 1, 2),
) -> None:
    async def main() -> None:
        async with LocalNetwork(folder, STATE.run) as network:
            swarm = Swarm(network, count, reducers)
            swarm.hosts = [network.host(position + 1) for position in range(count)]
            await story(swarm)

    asyncio.run(main())


def check_outcome(swarm: Swarm, outcomes: list[Any], included: dict[int, list[int]] | None = None) -> None:
    """All have the same result, which is the mean of who is included, and receipts that say so."""
    results = [b"".join(outcome[0]) for outcome in outcomes]
    assert len(set(results)) == 1
    expected = [
        mean_of(index, (included or {}).get(index, list(range(len(swarm.members.claims)))), swarm.members)
        for index in range(PARTS)
    ]
    assert results[0] == b"".join(expected)
    for _, receipts in outcomes:
        check_receipts(receipts, GROUP, swarm.members.claims, PARTS)
    assert len({frozenset(receipt.pack() for receipt in receipts) for _, receipts in outcomes}) == 1


@pytest.mark.parametrize(
    ("count", "reducers"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (3, (1,)), (4, (0, 3)), (5, (2, 4))]
)
def test_members_end_with_the_same_bytes_and_the_same_receipts(
    tmp_path: Path, count: int, reducers: tuple[int, ...]
) -> None:
    async def story(swarm: Swarm) -> None:
        for position in range(count):
            await swarm.join(position)
        outcomes = await swarm.average_all()
        check_outcome(swarm, outcomes)
        _, receipts = outcomes[0]
        assert in_every_part(tuple(receipts)) == tuple(range(count))
        assert {swarm.members.position(r.message.peer) for r in receipts} == {
            position for position in reducers if len(swarm.members.shares[position])
        }

    in_a_swarm(tmp_path, story, count, reducers)


def test_the_average_is_the_weighted_mean_of_the_deltas(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        for position in range(3):
            await swarm.join(position)
        (results, _), *_ = await swarm.average_all()
        average: Vector = LAYOUT.decode(b"".join(results))
        deltas = [random_delta(position).astype(np.float64) for position in range(3)]
        expected = np.average(deltas, axis=0, weights=swarm.members.weights)
        np.testing.assert_allclose(average, expected, rtol=1e-4, atol=1e-6)

    in_a_swarm(tmp_path, story)


def test_a_member_that_never_comes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_SECONDS", 1.5)

    async def story(swarm: Swarm) -> None:
        for position in (0, 1):
            await swarm.join(position)
        check_outcome(swarm, await swarm.average_all(), {index: [0, 1] for index in range(PARTS)})

    in_a_swarm(tmp_path, story, 3, (0, 1))


async def with_a_cheat(swarm: Swarm, cheat: Callable[[int], Awaitable[None]]) -> tuple[list[Any], list[Any]]:
    """Members 0 and 1 are honest and reduce; member 2 does what `cheat` does to each of them."""
    for position in (0, 1):
        await swarm.join(position)
    honest = asyncio.create_task(swarm.average_all())
    told = await asyncio.gather(*map(cheat, (0, 1)), return_exceptions=True)
    return await honest, told


def test_parts_other_than_committed_to_are_refused_by_their_announcement(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        other = LAYOUT.encode(random_delta(77))
        outcomes, told = await with_a_cheat(swarm, lambda to: swarm.send(2, to, other))
        check_outcome(swarm, outcomes, {index: [0, 1] for index in range(PARTS)})
        assert all("announces other parts than its claim commits to" in str(error) for error in told)
        assert {event["peer"] for event in swarm.network.events} == {swarm.hosts[2].peer}

    in_a_swarm(tmp_path, story, 3, (0, 1))


def test_parts_other_than_announced_are_refused_one_by_one(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        right = encoded(2)
        wrong = [right[0], right[1], bytes(len(right[2]))]
        outcomes, told = await with_a_cheat(swarm, lambda to: swarm.send(2, to, wrong, part_digests(right)))
        check_outcome(swarm, outcomes, {2: [0, 1]})
        assert told[0] is None
        assert "part 2 of" in str(told[1])
        assert in_every_part(tuple(outcomes[0][1])) == (0, 1), "who is not in every part earns nothing"

    in_a_swarm(tmp_path, story, 3, (0, 1))


@pytest.mark.parametrize("change", [lambda part: part[:-4], lambda part: b""])
def test_a_part_that_is_too_short_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    async def story(swarm: Swarm) -> None:
        wrong = list(map(change, encoded(2)))
        outcomes, told = await with_a_cheat(swarm, lambda to: swarm.send(2, to, wrong, part_digests(encoded(2))))
        check_outcome(swarm, outcomes, {index: [0, 1] for index in range(PARTS)})
        assert all("is not the one it committed to" in str(error) for error in told)

    in_a_swarm(tmp_path, story, 3, (0, 1))


def test_a_part_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        wrong = [part + b"x" for part in encoded(2)]
        outcomes, told = await with_a_cheat(swarm, lambda to: swarm.send(2, to, wrong, part_digests(encoded(2))))
        check_outcome(swarm, outcomes, {index: [0, 1] for index in range(PARTS)})
        assert all("announces 1025 bytes where at most 1024 belong" in str(error) for error in told)

    in_a_swarm(tmp_path, story, 3, (0, 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, np.finfo(np.float32).max, -1e10])
def test_one_member_that_committed_to_values_that_nobody_can_reckon_with_does_not_spoil_the_round(
    tmp_path: Path, value: float
) -> None:
    # The hash is right; if the part were taken, decoding it would fail inside the reduction, for everybody.
    delta = random_delta(2)
    delta[300] = value
    poisoned = [delta[cut : cut + 256].tobytes() for cut in range(0, 600, 256)]
    cheat = make_identity(3)
    root = Tree("delta", STATE.run, STATE.round, cheat.peer).root(part_digests(poisoned))

    async def story(swarm: Swarm) -> None:
        honest = swarm.members.claims[:2]
        claim = seal(cheat, make_claim(cheat, MANIFEST, STATE, delta_root=root))
        swarm.members = dataclasses.replace(swarm.members, claims=(*honest, claim))
        outcomes, _ = await with_a_cheat(swarm, lambda to: swarm.send(2, to, poisoned))
        results = {b"".join(results) for results, _ in outcomes}
        assert len(results) == 1
        assert np.isfinite(LAYOUT.decode(results.pop())).all()
        assert in_every_part(tuple(outcomes[0][1])) == (0, 1)

    in_a_swarm(tmp_path, story, 3, (0, 1))


def limited_swarm(swarm: Swarm, delta: Vector, segments: int) -> None:
    """Make member 2 commit to this delta, where 1 segment moves a value by 6 at most and 2 by 7."""
    who = swarm.members.claims[2].message.peer
    assert who == make_identity(3).peer
    claim = seal(make_identity(3), delta_claim(make_identity(3), MANIFEST, STATE, delta, segments=segments))
    claims = (*swarm.members.claims[:2], claim)
    swarm.members = dataclasses.replace(swarm.members, claims=claims, limits=(6.0, 7.0, 7.5, 8.0))


@pytest.mark.parametrize(("segments", "value", "limit"), [(2, 7.01, 7), (2, -7.01, 7), (1, 6.5, 6), (2, 4e9, 7)])
def test_a_sender_that_moved_a_value_further_than_training_can_is_dropped(
    tmp_path: Path, segments: int, value: float, limit: float
) -> None:
    delta = random_delta(2)
    delta[550] = value  # in the last part

    async def story(swarm: Swarm) -> None:
        limited_swarm(swarm, delta, segments)
        parts = LAYOUT.encode(delta)
        outcomes, told = await with_a_cheat(swarm, lambda to: swarm.send(2, to, parts))
        check_outcome(swarm, outcomes, {2: [0, 1]})
        assert told[0] is None
        sentence = (
            f"part 2 of {short(swarm.hosts[2].peer)} moves a value by {abs(value):.4g}, which {segments} segments"
        )
        assert f"{sentence} cannot move by more than {limit}" in str(told[1])
        assert {event["peer"] for event in swarm.network.events} == {swarm.hosts[2].peer}
        assert in_every_part(tuple(outcomes[0][1])) == (0, 1), "who is not in every part earns nothing"

    in_a_swarm(tmp_path, story, 3, (0, 1))


@pytest.mark.parametrize(("segments", "value"), [(2, 6.99), (2, -6.99), (1, 5.99), (2, 7.0)])
def test_a_sender_that_moved_a_value_as_far_as_training_can_is_averaged(
    tmp_path: Path, segments: int, value: float
) -> None:
    delta = random_delta(2)
    delta[550] = value

    async def story(swarm: Swarm) -> None:
        limited_swarm(swarm, delta, segments)
        outcomes, told = await with_a_cheat(swarm, lambda to: swarm.send(2, to, LAYOUT.encode(delta)))
        assert told == [None, None]
        assert len({b"".join(results) for results, _ in outcomes}) == 1
        assert in_every_part(tuple(outcomes[0][1])) == (0, 1, 2)

    in_a_swarm(tmp_path, story, 3, (0, 1))


def test_a_member_that_hangs_up_halfway_is_in_the_parts_that_it_sent(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        async def send_one(to: int) -> None:
            parts = encoded(2)
            async with swarm.hosts[2].open(swarm.hosts[to].peer, "reduce") as stream:
                await stream.send({"group": GROUP, "digests": tuple(part_digests(parts))})
                await stream.receive()
                await stream.send_frame(parts[swarm.members.shares[to][0]])

        outcomes, _ = await with_a_cheat(swarm, send_one)
        check_outcome(swarm, outcomes, {2: [0, 1]})

    in_a_swarm(tmp_path, story, 3, (0, 1))


@pytest.mark.parametrize(
    "opening",
    [
        {},
        {"group": GROUP},
        {"group": GROUP, "digests": None},
        {"group": GROUP, "digests": ()},
        {"group": GROUP, "digests": (bytes(32),) * (PARTS - 1)},
        {"group": GROUP, "digests": (bytes(31),) * PARTS},
        {"group": GROUP, "digests": ("x" * 32,) * PARTS},
        {"group": GROUP, "digests": bytes(32) * PARTS},
        {"group": "text", "digests": ()},
    ],
)
def test_an_opening_that_is_malformed_is_refused(tmp_path: Path, opening: dict[str, Any]) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        honest = asyncio.create_task(swarm.average(0))
        with pytest.raises(TransportError, match="refuses"):
            await swarm.send(1, 0, encoded(1), opening=opening or {"nothing": 1})
        honest.cancel()
        await asyncio.gather(honest, return_exceptions=True)

    in_a_swarm(tmp_path, story, 2, (0,))


def test_a_stranger_is_refused_and_does_not_disturb(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        swarm.hosts.append(swarm.network.host(9))
        await swarm.join(0)
        honest = asyncio.create_task(swarm.average(0))
        with pytest.raises(TransportError, match="is not in this group"):
            await swarm.send(2, 0, encoded(2))
        await swarm.send(1, 0, encoded(1))
        check_outcome(swarm, [await honest])

    in_a_swarm(tmp_path, story, 2, (0,))


def test_a_group_that_nobody_here_knows_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.05)

    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        with pytest.raises(TransportError, match="not in such a group"):
            await swarm.send(1, 0, encoded(1))

    in_a_swarm(tmp_path, story, 2, (0,))


def test_parts_are_taken_from_a_member_once(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        outcomes, told = await with_a_cheat(swarm, lambda to: swarm.send(2, to, encoded(2)))
        check_outcome(swarm, outcomes)
        assert told == [None, None]
        with pytest.raises(TransportError, match="sends its parts twice"):
            await swarm.send(2, 0, encoded(2))

    in_a_swarm(tmp_path, story, 3, (0, 1))


def test_a_member_that_comes_before_the_group_is_known_here_is_waited_with(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        early = asyncio.create_task(swarm.send(1, 0, encoded(1)))
        while not swarm.network.serving:
            await asyncio.sleep(0)
        outcome = await swarm.average(0)
        await early
        check_outcome(swarm, [outcome])

    in_a_swarm(tmp_path, story, 2, (0,))


async def reduce_in_own_way(
    swarm: Swarm, position: int, answer: Callable[[Any, dict[int, bytes]], Awaitable[None]]
) -> None:
    """Make a member a reducer that receives like an honest one and then answers in its own way."""

    async def handler(stream: Any) -> None:
        await stream.receive()
        await stream.send({"ok": True})
        share = swarm.members.shares[position]
        parts = {index: await stream.receive_frame(LAYOUT.part_bytes(index)) for index in share}
        await answer(stream, parts)

    await swarm.hosts[position].serve("reduce", handler)


def test_a_reducer_whose_results_are_not_those_of_its_receipt_is_refused(tmp_path: Path) -> None:
    async def answer(stream: Any, parts: dict[int, bytes]) -> None:
        for data in parts.values():
            await stream.send_frame(data)
        receipt = make_receipt(make_identity(2), STATE, members_of(2).claims, dict.fromkeys(parts, b"other"))
        await stream.send_frame(seal(make_identity(2), receipt).pack())

    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        await reduce_in_own_way(swarm, 1, answer)
        with pytest.raises(TransportError, match=r"reduced nothing .*not those that its receipt states"):
            await swarm.average(0)

    in_a_swarm(tmp_path, story, 2, (1,))


@pytest.mark.parametrize(("value", "refused"), [(7.5, True), (-3e3, True), (7.0, False), (-7.0, False)])
def test_a_result_that_lies_further_out_than_any_claim_can_is_refused(
    tmp_path: Path, value: float, refused: bool
) -> None:
    async def answer(stream: Any, parts: dict[int, bytes]) -> None:
        made = {index: LAYOUT.codec.encode(np.full(LAYOUT.part_size(index), value, np.float32)) for index in parts}
        for data in made.values():
            await stream.send_frame(data)
        await stream.send_frame(seal(make_identity(2), make_receipt(make_identity(2), STATE, claims, made)).pack())

    claims = members_of(2).claims

    async def story(swarm: Swarm) -> None:
        assert {claim.message.segments for claim in claims} == {2}
        swarm.members = dataclasses.replace(swarm.members, limits=(6.0, 7.0, 7.5, 8.0))
        await swarm.join(0)
        await reduce_in_own_way(swarm, 1, answer)
        if refused:
            with pytest.raises(TransportError, match=f"by {abs(value):.4g}, and no claim by more than 7"):
                await swarm.average(0)
        else:
            _, receipts = await swarm.average(0)
            assert len(receipts) == 1

    in_a_swarm(tmp_path, story, 2, (1,))


def test_a_reducer_with_the_receipt_of_somebody_else_is_refused(tmp_path: Path) -> None:
    async def answer(stream: Any, parts: dict[int, bytes]) -> None:
        for data in parts.values():
            await stream.send_frame(data)
        receipt = make_receipt(make_identity(1), STATE, members_of(2).claims, parts)
        await stream.send_frame(seal(make_identity(1), receipt).pack())

    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        await reduce_in_own_way(swarm, 1, answer)
        with pytest.raises(TransportError, match="not those that its receipt states"):
            await swarm.average(0)

    in_a_swarm(tmp_path, story, 2, (1,))


def test_a_result_that_is_longer_than_its_part_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async def answer(stream: Any, parts: dict[int, bytes]) -> None:
        for data in parts.values():
            await stream.send_frame(data + b"x")

    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        await reduce_in_own_way(swarm, 1, answer)
        with pytest.raises(TransportError, match="announces 1025 bytes where at most 1024 belong"):
            await swarm.average(0)

    in_a_swarm(tmp_path, story, 2, (1,))


@pytest.mark.parametrize("spoil", [lambda data: data[:-4], lambda data: b"\x00\x00\xc0\x7f" + data[4:]])
def test_a_result_that_cannot_be_decoded_is_refused_where_it_is_received(
    tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    async def answer(stream: Any, parts: dict[int, bytes]) -> None:
        results = {index: spoil(data) for index, data in parts.items()}
        for data in results.values():
            await stream.send_frame(data)
        receipt = make_receipt(make_identity(2), STATE, members_of(2).claims, results)
        await stream.send_frame(seal(make_identity(2), receipt).pack())

    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        await reduce_in_own_way(swarm, 1, answer)
        with pytest.raises(TransportError, match=r"reduced nothing .*(1020 bytes where 1024 belong|not finite)"):
            await swarm.average(0)

    in_a_swarm(tmp_path, story, 2, (1,))


async def serve_once(swarm: Swarm, position: int, receipts: list[Any], lucky: int | None = None) -> None:
    """Make a member a reducer that answers one member (or all) in full and hangs up on the others.

    Args:
        receipts: results and receipt for each member in the order in which they come.
        lucky: the member that is answered; None for all.
    """
    answers = iter(receipts)

    async def handler(stream: Any) -> None:
        await stream.receive()
        await stream.send({"ok": True})
        share = swarm.members.shares[position]
        for index in share:
            await stream.receive_frame(LAYOUT.part_bytes(index))
        if lucky is not None and stream.peer != swarm.hosts[lucky].peer:
            raise TransportError("the power is cut")
        results, receipt = next(answers)
        for index in share:
            await stream.send_frame(results[index])
        await stream.send_frame(receipt.pack())

    await swarm.hosts[position].serve("reduce", handler)


def signed_results(swarm: Swarm, position: int, change: bytes = b"") -> tuple[dict[int, bytes], Signed[Receipt]]:
    who = make_identity(position + 1)
    everybody = list(range(len(swarm.members.claims)))
    results = {index: mean_of(index, everybody, swarm.members) for index in swarm.members.shares[position]}
    results = {index: change + data[len(change) :] for index, data in results.items()}
    return results, seal(who, make_receipt(who, STATE, swarm.members.claims, results))


@pytest.mark.parametrize("lucky", [0, 1])
def test_the_results_of_a_reducer_that_dies_come_from_a_member_that_has_them(tmp_path: Path, lucky: int) -> None:
    async def story(swarm: Swarm) -> None:
        for position in (0, 1):
            await swarm.join(position)
        await serve_once(swarm, 2, [signed_results(swarm, 2)], lucky)
        for to in (0, 1):
            asyncio.get_running_loop().create_task(swarm.send(2, to, encoded(2)))
        check_outcome(swarm, await swarm.average_all())
        told = [event["reason"] for event in swarm.network.events if event["event"] == "warning"]
        assert len(told) == 1
        assert "the power is cut" in told[0]
        assert "its results came from" in told[0]

    in_a_swarm(tmp_path, story)


def test_results_that_nobody_has_fail_the_attempt_and_the_reducer_is_named_to_the_next_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "JOIN_SECONDS", 1.0)

    async def story(swarm: Swarm) -> None:
        for position in (0, 1):
            await swarm.join(position)
        await serve_once(swarm, 2, [], lucky=2)
        async with asyncio.timeout(20):
            outcomes = await asyncio.gather(swarm.average(0), swarm.average(1), return_exceptions=True)
        assert all(isinstance(outcome, TransportError) and "the power is cut" in str(outcome) for outcome in outcomes)
        assert all(swarm.services[position]._failed[1] == {swarm.hosts[2].peer} for position in (0, 1))

    in_a_swarm(tmp_path, story)


def test_results_from_another_member_that_the_receipt_does_not_state_are_refused(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        results, receipt = signed_results(swarm, 2)

        async def lie(stream: Any) -> None:
            await stream.receive()
            await stream.send_frame(receipt.pack())
            for data in results.values():
                await stream.send_frame(b"\x00\x00\x00\x01" + data[4:])

        await reduce_in_own_way(swarm, 2, lambda _stream, _parts: _raise(TransportError("the power is cut")))
        await swarm.hosts[1].serve("results", lie)
        with pytest.raises(TransportError, match="the power is cut"):
            await swarm.average(0)

    in_a_swarm(tmp_path, story, 3, (0, 2))


async def _raise(error: Exception) -> None:
    raise error


def test_two_receipts_for_one_part_are_proof_against_their_reducer(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        for position in (0, 1):
            await swarm.join(position)
        await serve_once(swarm, 2, [signed_results(swarm, 2), signed_results(swarm, 2, b"\x00\x00\x00\x00")])
        for to in (0, 1):
            asyncio.get_running_loop().create_task(swarm.send(2, to, encoded(2)))
        outcomes = await swarm.average_all()
        assert len({b"".join(results) for results, _ in outcomes}) == 2, "nobody can tell by itself"
        for position in (0, 1):
            answer = await swarm.hosts[position].calls["receipts"]({"group": GROUP})
            theirs = [unseal(data, Receipt, MAX_RECEIPT_BYTES) for data in answer["receipts"]]
            ours = outcomes[position][1]
            (proof,) = [Conflict(one, other) for one in ours for other in theirs if contradict(one, other)]
            assert Conflict.unpack(proof.pack()).peer == swarm.hosts[2].peer

    in_a_swarm(tmp_path, story)


def test_receipts_of_honest_members_agree(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        for position in range(3):
            await swarm.join(position)
        (_, ours), *_ = await swarm.average_all()
        answer = await swarm.hosts[0].calls["receipts"]({"group": GROUP})
        assert sorted(answer["receipts"]) == sorted(receipt.pack() for receipt in ours)
        with pytest.raises(TransportError, match="kept no longer"):
            await swarm.hosts[0].calls["receipts"]({"group": bytes(32)})

    in_a_swarm(tmp_path, story)


def test_a_fast_sender_is_held_back_while_a_slow_one_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducer_module, "AHEAD_BYTES", 1)  # so two parts

    async def story(bench: Bench) -> None:
        for index in (0, 1):
            await bench.reducer.room(index)
            for position in (0, 1):
                bench.submit(position, index)
        waiting = asyncio.create_task(bench.reducer.room(2))
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        assert not done
        bench.submit(2, 0)
        await asyncio.wait_for(waiting, 10)

    on_the_bench(story)


def test_a_member_that_failed_some_member_before_does_not_reduce_again() -> None:
    members = members_of(4)
    group = group_of(members)
    named = gathered(members.claims[0], failed=(group.peers[3], group.peers[2]))
    checked = check_group(dataclasses.replace(group, gathered=(named, *group.gathered[1:])), VIEW, members.claims[0])
    assert checked.reducers == (0, 1, 2), "each member may name a quarter of the others, here one"
    alone = gathered(members.claims[0], failed=(group.peers[1],), reduces=False)
    pair = Group(GROUP, group.peers[:2], (alone, group.gathered[1]))
    assert check_group(pair, VIEW, members.claims[0]).reducers == (1,), "somebody must"


def test_whom_a_group_bans_reduces_nothing_in_it_and_weighs_nothing() -> None:
    members = members_of(4)
    last = members.claims[3].message.peer
    claims = [
        seal(make_identity(number), dataclasses.replace(claim.message, against=against, undo=(NO_UNDO,) * len(against)))
        for number, (claim, against) in enumerate(zip(members.claims, ((last,), (last,), (last,), ()), strict=True), 1)
    ]
    checked = check_group(group_of(dataclasses.replace(members, claims=tuple(claims))), VIEW, claims[0])
    assert checked.reducers == (0, 1, 2)
    assert checked.weights[3] == 0.0
    half = (*claims[:2], *members.claims[2:])
    assert check_group(group_of(dataclasses.replace(members, claims=half)), VIEW, half[0]).weights[3] > 0.0


def test_shares_follow_what_members_measured() -> None:
    members = members_of(3)
    group = group_of(members)
    rates = dict(zip(group.peers, (100, 100, 1), strict=True))
    slow = tuple(gathered(claim, rates=rates) for claim in members.claims)
    checked = check_group(dataclasses.replace(group, gathered=slow), VIEW, members.claims[0])
    assert len(checked.shares[2]) < len(checked.shares[0])


def test_a_group_told_in_two_ways_has_two_names() -> None:
    members = members_of(3)
    group = group_of(members)
    other = dataclasses.replace(group, peers=group.peers[:2], gathered=group.gathered[:2])
    assert group_id(group) != group_id(other)


def test_what_a_peer_brings_a_second_time_gives_its_group_another_name() -> None:
    claim = members_of(1).claims[0]
    again = [Group(GROUP, (claim.message.peer,), (Brought(claim, True).pack(),)) for _ in range(2)]
    assert len(set(map(group_id, again))) == 2


def test_a_shunned_peer_is_not_averaged_with() -> None:
    members = members_of(2)
    group = group_of(members)
    with pytest.raises(Reject, match="is proved to cheat"):
        check_group(group, VIEW, members.claims[0], shunned={group.peers[1]})


def test_the_reason_of_a_reducer_that_gives_up_is_told(tmp_path: Path) -> None:
    async def answer(stream: Any, _parts: dict[int, bytes]) -> None:
        raise TransportError("the disk is full")

    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        await reduce_in_own_way(swarm, 1, answer)
        with pytest.raises(TransportError, match="the disk is full"):
            await swarm.average(0)

    in_a_swarm(tmp_path, story, 2, (1,))


def test_a_reducer_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        with pytest.raises(TransportError, match=r"reduced nothing .*cannot be reached"):
            await swarm.average(0)

    in_a_swarm(tmp_path, story, 2, (1,))


def call_of(host: Host, claim: Signed[Claim], delta: bytes) -> dict[str, Any]:
    return {
        "round": STATE.round,
        "state": STATE.digest,
        "covered": {},
        "credit": {},
        "bans": {},
        "suspended": {},
        "guests": {},
        "bits": 0,
        "claim": claim.pack(),
        "delta": host.store.put("delta", delta),
        "reference": None,
        "limits": None,
        "expected": (host.peer,),
        "shunned": (),
        "min_size": 1,
        "window": 1.0,
        "timeout": 1.0,
    }


def test_a_peer_alone_averages_with_itself_through_its_store(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        (host,), (claim,) = swarm.hosts, swarm.members.claims
        host.store.put("manifest", MANIFEST.canonical())
        answer = await host.calls["average"](call_of(host, claim, b"".join(encoded(0))))
        assert host.store.get(answer["average"]) == b"".join(encoded(0))
        assert answer["members"] == [claim.pack()]
        (receipt,) = answer["receipts"]
        check_receipts([unseal(receipt, Receipt)], answer["group"], (claim,), PARTS)

    in_a_swarm(tmp_path, story, 1, (0,))


@pytest.mark.parametrize("damaged", [False, True])
def test_the_reference_comes_from_the_store_and_is_not_used_when_it_is_damaged(tmp_path: Path, damaged: bool) -> None:
    centered = make_manifest(averaging={"rule": {"kind": "centered-clip", "radius": 0.25, "iterations": 1}})
    state = make_state(centered)
    who = make_identity(1)
    claim = seal(who, delta_claim(who, centered, state, random_delta(0)))
    last = random_delta(9)

    async def main() -> None:
        async with LocalNetwork(tmp_path, state.run) as network:
            host = network.host(1)
            await AllReduce().start(host)
            host.store.put("manifest", centered.canonical())
            reference = host.store.put("average", b"".join(LAYOUT.encode(last)))
            call = call_of(host, claim, b"".join(encoded(0))) | {"state": state.digest, "reference": reference}
            if damaged:
                (tmp_path / "blobs 1" / "average" / reference.hex()).write_bytes(bytes(LAYOUT.total_bytes))
                with pytest.raises(TransportError, match="was damaged on disk"):
                    await host.calls["average"](call)
                assert host.store.find(reference) is None, "so that the next attempt writes it anew"
                return
            answer = await host.calls["average"](call)
            average = LAYOUT.decode(host.store.get(answer["average"]))
            np.testing.assert_allclose(average, 0.75 * last + 0.25 * random_delta(0), rtol=1e-4, atol=1e-5)

    asyncio.run(main())


def test_the_limits_of_a_call_are_those_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Members] = []

    def noted(*args: Any) -> Members:
        groups.append(check_group(*args))
        return groups[-1]

    monkeypatch.setattr(module, "check_group", noted)

    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        (host,), (claim,) = swarm.hosts, swarm.members.claims
        host.store.put("manifest", MANIFEST.canonical())
        await host.calls["average"]({**call_of(host, claim, b"".join(encoded(0))), "limits": (1.0, 2.0, 3.0, 4.0)})

    in_a_swarm(tmp_path, story, 1, (0,))
    assert [group.limits for group in groups] == [(1.0, 2.0, 3.0, 4.0)]


def test_a_delta_other_than_the_claims_is_not_averaged(tmp_path: Path) -> None:
    async def story(swarm: Swarm) -> None:
        await swarm.join(0)
        (host,), (claim,) = swarm.hosts, swarm.members.claims
        host.store.put("manifest", MANIFEST.canonical())
        with pytest.raises(LocalError, match="not the one this peer's claim commits to"):
            await host.calls["average"](call_of(host, claim, b"".join(encoded(1))))

    in_a_swarm(tmp_path, story, 1, (0,))
