"""The exchange of a mix: all members of all cohorts end with the same bytes, from what the cohorts agreed on alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging import mix as module
from p2pasr.averaging import rules
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.mix import MixExchange, Offer, shares_of
from p2pasr.errors import LocalError, Reject, TransportError
from p2pasr.peers import host as host_module
from p2pasr.peers.host import Host
from p2pasr.protocol import mixing
from p2pasr.protocol.cohorts import Cohort, cohort_of
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.messages import Receipt, unseal
from p2pasr.protocol.mixing import Ledger, Part, choice

from .builders import LocalNetwork, digest_of, make_identity, make_manifest, random_delta

MANIFEST = make_manifest(averaging={"codec": "int8", "first_bits": 1})
LAYOUT = Layout.of(MANIFEST.parameters, MANIFEST.averaging)
RUN = MANIFEST.run_id
COMMON = digest_of("the common state")
COHORTS = [Cohort(1, 0), Cohort(1, 1)]
HALVES = [
    [number for number in range(1, 40) if cohort_of(RUN, make_identity(number).peer, 1) == cohort][:3]
    for cohort in COHORTS
]
LEDGERS = [
    Ledger(0, {MANIFEST.shards[index].digest: 2}, {make_identity(HALVES[index][0]).peer: 60.0 * (1 + 2 * index)})
    for index in (0, 1)
]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.5)


def encoded(index: int) -> list[bytes]:
    return LAYOUT.encode(random_delta(index))


def expected() -> bytes:
    """The clipped weighted mean, computed here."""
    results = []
    for index in range(LAYOUT.parts):
        size = LAYOUT.part_size(index)
        parts = {half: LAYOUT.codec.decode(encoded(half)[index], size) for half in (0, 1)}
        clipped = rules.clip(parts, MANIFEST.averaging.rule.clip_norm)
        results.append(LAYOUT.codec.encode(rules.weighted_mean(clipped, mixing.weights(LEDGERS, MANIFEST))))
    return b"".join(results)


class Crowd:
    """Two cohorts of three, each of which offers its delta."""

    def __init__(self, network: LocalNetwork) -> None:
        self.network = network
        self.hosts: dict[str, Host] = {}
        self.services: dict[str, MixExchange] = {}
        self.halves: list[list[str]] = [[], []]
        self.roots: list[bytes] = []

    async def gather(self) -> None:
        for half, numbers in enumerate(HALVES):
            for number in numbers:
                host = self.network.host(number)
                host.store.put("manifest", MANIFEST.canonical())
                service = MixExchange()
                await service.start(host)
                self.hosts[host.peer], self.services[host.peer] = host, service
                self.halves[half].append(host.peer)
        self.roots = [{await self.offer(peer) for peer in half}.pop() for half in self.halves]

    async def offer(self, peer: str, parts: list[bytes] | None = None) -> bytes:
        half = self.half(peer)
        delta = self.hosts[peer].store.put("delta", *(parts or encoded(half)))
        args = {"round": 8, "cohort": (1, half), "delta": delta, "ledger": LEDGERS[half].pack(MANIFEST)}
        return (await self.hosts[peer].calls["contribute"](args))["root"]

    def half(self, peer: str) -> int:
        return cohort_of(RUN, peer, 1).index

    def parts(self) -> list[Part]:
        return [Part(half, digest_of(f"state of {half}"), root) for half, root in enumerate(self.roots)]

    def args(self, peer: str, **changes: Any) -> dict[str, Any]:
        half = self.half(peer)
        return {
            "name": choice(COMMON, self.parts()),
            "round": 8,
            "since": 1,
            "state": digest_of(f"state of {half}"),
            "cohort": (1, half),
            "sources": [(p.index, p.state, p.root, self.halves[p.index]) for p in self.parts()],
            "mates": self.halves[half],
            **changes,
        }

    async def mix(self, peer: str, **changes: Any) -> dict[str, Any]:
        return await self.hosts[peer].calls["mix"](self.args(peer, **changes))

    def result(self, peer: str, answer: dict[str, Any]) -> bytes:
        return self.hosts[peer].store.get(answer["average"])


def in_a_crowd(tmp_path: Path, story: Callable[[Crowd], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LocalNetwork(tmp_path, RUN) as network, asyncio.timeout(60):
            crowd = Crowd(network)
            await crowd.gather()
            await story(crowd)
            for service in crowd.services.values():
                service._stop()

    asyncio.run(main())


def test_all_members_of_all_cohorts_get_the_clipped_weighted_mean(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        peers = [*crowd.halves[0], *crowd.halves[1]]
        answers = await asyncio.gather(*map(crowd.mix, peers))
        for peer, answer in zip(peers, answers, strict=True):
            assert crowd.result(peer, answer) == expected()
            assert answer["ledgers"] == [ledger.pack(MANIFEST) for ledger in LEDGERS]
            receipts = [unseal(data, Receipt).message for data in answer["receipts"]]
            shares = shares_of(LAYOUT.parts, crowd.halves[crowd.half(peer)], choice(COMMON, crowd.parts()))
            assert {receipt.peer for receipt in receipts} == {mate for mate, share in shares.items() if share} - {peer}
            assert all(part.senders == (0, 1) for receipt in receipts for part in receipt.parts)
        assert crowd.network.events == []

    in_a_crowd(tmp_path, story)


def test_a_member_alone_computes_the_same(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        peer = crowd.halves[0][0]
        assert crowd.result(peer, await crowd.mix(peer, mates=[peer])) == expected()
        behind_nat = crowd.halves[0][1]
        assert crowd.result(behind_nat, await crowd.mix(behind_nat, mates=[])) == expected()

    in_a_crowd(tmp_path, story)


def test_the_share_of_a_mate_that_is_gone_is_reduced_by_the_others(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        gone, *rest = crowd.halves[0]
        del crowd.network.hosts[gone]
        answers = await asyncio.gather(*map(crowd.mix, rest))
        assert [crowd.result(peer, answer) for peer, answer in zip(rest, answers, strict=True)] == [expected()] * 2
        assert all("mixed nothing for this peer" in event["reason"] for event in crowd.network.events)

    in_a_crowd(tmp_path, story)


def test_another_member_is_asked_when_one_gives_other_parts_than_its_cohort_agreed_on(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        liars = crowd.halves[1][:2]
        for liar in liars:
            service = crowd.services[liar]
            (true,) = service._offers.values()
            await crowd.offer(liar, [bytes(len(part)) for part in encoded(1)])
            (false,) = service._offers.values()
            service._offers[true.root] = dataclasses.replace(true, delta=false.delta)
        for peer in crowd.halves[0]:
            assert crowd.result(peer, await crowd.mix(peer, mates=[peer])) == expected()

    in_a_crowd(tmp_path, story)


def test_a_mix_fails_where_nobody_gives_what_a_cohort_agreed_on(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        for peer in crowd.halves[1]:
            del crowd.network.hosts[peer]
        peer = crowd.halves[0][0]
        with pytest.raises(TransportError, match="cohort 1-1 gives no part"):
            await crowd.mix(peer)

    in_a_crowd(tmp_path, story)


def test_a_ledger_that_credits_strangers_ends_the_mix(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        peer = crowd.halves[1][0]
        host = crowd.hosts[peer]
        delta = host.store.put("delta", *encoded(1))
        lie = Ledger(0, {}, LEDGERS[0].credit).pack(MANIFEST)
        crowd.roots[1] = (
            await host.calls["contribute"]({"round": 8, "cohort": (1, 1), "delta": delta, "ledger": lie})
        )["root"]
        crowd.halves[1] = [peer]
        with pytest.raises(Reject, match="is about peers of another cohort"):
            await crowd.mix(crowd.halves[0][0])

    in_a_crowd(tmp_path, story)


def test_a_mate_that_lies_about_its_results_is_not_believed(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        name = choice(COMMON, crowd.parts())
        shares = shares_of(LAYOUT.parts, crowd.halves[0], name)
        liar = next(peer for peer in crowd.halves[0] if shares[peer])
        honest = [peer for peer in crowd.halves[0] if peer != liar]
        service = crowd.services[liar]
        sent = service._receipt

        async def receipt(session: module.Session) -> Any:
            return await sent(dataclasses.replace(session, name=digest_of("another mix")))

        service._receipt = receipt
        answers = await asyncio.gather(*map(crowd.mix, [liar, *honest]))
        assert [crowd.result(peer, a) for peer, a in zip(honest, answers[1:], strict=True)] == [expected()] * 2
        assert any("not those that its receipt states" in event["reason"] for event in crowd.network.events)

    in_a_crowd(tmp_path, story)


@pytest.mark.parametrize("items", [(-1,), (4,), (1, 0), (0, 0), ("0",), (True,)])
def test_items_that_there_are_not_are_refused(tmp_path: Path, items: tuple[Any, ...]) -> None:
    async def story(crowd: Crowd) -> None:
        asker, giver = crowd.halves[0][0], crowd.halves[1][0]
        async with crowd.hosts[asker].open(giver, "mix-parts") as stream:
            await stream.send({"root": crowd.roots[1], "items": items})
            with pytest.raises(TransportError, match="items that there are not"):
                await stream.receive()

    in_a_crowd(tmp_path, story)


def test_results_are_for_mates_and_of_ones_own_share(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        giver, mate, _ = crowd.halves[0]
        await crowd.mix(giver, mates=[giver, mate])
        name = choice(COMMON, crowd.parts())
        shares = shares_of(LAYOUT.parts, [giver, mate], name)
        refusals = [
            (crowd.halves[1][0], name, shares[giver], "is of another cohort"),
            (mate, name, shares[mate], "does not reduce"),
            (mate, digest_of("another mix"), shares[giver], "not in such a mix"),
        ]
        for asker, which, items, sentence in refusals:
            async with crowd.hosts[asker].open(giver, "mix-results") as stream:
                await stream.send({"name": which, "items": tuple(items)})
                with pytest.raises(TransportError, match=sentence):
                    await stream.receive()

    in_a_crowd(tmp_path, story)


def test_a_delta_that_is_gone_cannot_be_offered(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        args = {"round": 8, "cohort": (1, 0), "delta": digest_of("nothing"), "ledger": b""}
        with pytest.raises(LocalError, match="is not in"):
            await crowd.hosts[crowd.halves[0][0]].calls["contribute"](args)

    in_a_crowd(tmp_path, story)


def test_the_root_commits_to_every_part_and_the_ledger(tmp_path: Path) -> None:
    async def story(crowd: Crowd) -> None:
        (offer,) = crowd.services[crowd.halves[0][0]]._offers.values()
        assert offer.digests == (*map(blob_digest, encoded(0)), blob_digest(LEDGERS[0].pack(MANIFEST)))
        for index in range(LAYOUT.parts + 1):
            proof = offer.tree.prove(offer.digests, index)
            offer.tree.check(offer.root, index, LAYOUT.parts + 1, blob_digest(offer.read(index)), proof)
        assert isinstance(offer, Offer)
        assert len(set(crowd.roots)) == 2

    in_a_crowd(tmp_path, story)


@given(
    parts=st.integers(1, 60),
    peers=st.sets(st.text(max_size=4), min_size=1, max_size=20),
    name=st.binary(min_size=32, max_size=32),
)
def test_every_part_is_reduced_by_one_member_and_nobody_reduces_much_more_than_others(
    parts: int, peers: set[str], name: bytes
) -> None:
    shares = shares_of(parts, peers, name)
    assert sorted(index for share in shares.values() for index in share) == list(range(parts))
    assert max(map(len, shares.values())) <= -(-parts // len(peers))
    assert shares == shares_of(parts, sorted(peers), name), "the order in which members are known changes nothing"
