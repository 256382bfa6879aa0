"""Many peers, some of which lie, on a clock of their own: the honest ones end in one state, and in no lie.

Everything that decides is the real thing: `assign`, `advance`, `agree`, `quorum`, `newest_state`,
`parse_state`. Only the network, the clock and the training are made up: records come late or not at all,
peers leave and come back.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from p2pasr.errors import Reject
from p2pasr.peers.sync import newest_state
from p2pasr.protocol.agreement import quorum
from p2pasr.protocol.messages import MAX_ANCESTORS, Attestation
from p2pasr.protocol.state import State, advance, parse_state
from tests.unit.builders import (
    initial_params,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_state,
)

TICK_SECONDS = 60.0
TTL_SECONDS = 60.0
"""What is not renewed in a tick is gone in the next."""

TICKS = 25
PATIENT, IMPATIENT = 50, 3
"""How often a peer reads the directory while it waits for a quorum; the impatient often part ways."""

MANIFEST = make_manifest(rounds={"rounds": 40})
LIKE = initial_params()
GENESIS = make_state(MANIFEST)


@dataclass
class Peer:
    """An honest peer; it has what `newest_state` wants of a journal."""

    number: int
    state: State = GENESIS
    online: bool = True
    attested: Attestation | None = None
    lineage: tuple[bytes, ...] = ()
    unsettled: tuple[State, set[str]] | None = None
    states: dict[int, bytes] = field(default_factory=lambda: {0: GENESIS.digest})

    def __post_init__(self) -> None:
        self.identity = make_identity(self.number)
        self.name = self.identity.peer

    def held(self) -> dict[int, bytes]:
        return self.states

    def hold(self, state: State) -> None:
        self.states = {number: digest for number, digest in self.states.items() if number < state.round}
        self.states[state.round] = state.digest
        self.lineage = self.line_to(state)
        self.state, self.unsettled = state, None

    def line_to(self, state: State) -> tuple[bytes, ...]:
        if state.digest == self.state.digest:
            return self.lineage
        if state.parent == self.state.digest:
            return (self.state.digest, *self.lineage)[:MAX_ANCESTORS]
        return (state.parent,)


class World:
    """The network, the clock, and what everybody has published."""

    def __init__(self, seed: int, honest: int, liars: int, strategy: str, looks: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.luck = 0.8  # the share of records that are seen as they are
        self.honest = [Peer(number + 1) for number in range(honest)]
        self.liars = [make_identity(number + 101) for number in range(liars)]
        self.strategy = strategy
        self.looks = looks
        self.board: dict[str, list[tuple[float, Attestation]]] = {}
        self.blobs = {GENESIS.digest: GENESIS.blob}
        self.lies: set[bytes] = set()
        self.claimed: dict[bytes, set[str]] = {}
        self.committed = 0
        self.eclipsed: Peer | None = None
        self.victim: Peer | None = None

    @property
    def online(self) -> list[Peer]:
        return [peer for peer in self.honest if peer.online]

    @property
    def lying(self) -> list[str]:
        """The liars, and the victim that repeats what it heard from them."""
        believers = [] if self.victim is None else [self.victim.name]
        return [liar.peer for liar in self.liars] + believers

    def publish(self, attestation: Attestation) -> None:
        self.board.setdefault(attestation.peer, []).append((self.now, attestation))

    def seen_by(self, viewer: Peer) -> dict[str, Attestation]:
        """What a peer reads: some records are missing, some are not the newest, but lies are never the most."""
        seen: dict[str, Attestation] = {}
        for name, published in self.board.items():
            alive = [attestation for at, attestation in published[-2:] if at > self.now - TTL_SECONDS]
            if name == viewer.name or not alive:
                continue
            if viewer is self.eclipsed:
                if any(liar.peer == name for liar in self.liars):
                    seen[name] = alive[-1]
                continue
            draw = self.random.random()
            if draw < self.luck:
                seen[name] = alive[-1]
            elif draw < 0.95:
                seen[name] = alive[0]
        if viewer is self.eclipsed:
            return seen
        lying = [name for name in self.lying if name in seen]
        self.random.shuffle(lying)
        mine = viewer.attested is not None
        while 2 * len(lying) >= len(seen) + mine and lying:
            del seen[lying.pop()]
        return seen

    def sync(self, peer: Peer) -> None:
        """What `round.sync` does."""
        votes = self.votes_seen_by(peer)
        if peer.unsettled is not None:
            after, electorate = peer.unsettled
            if quorum(after.round, after.digest, votes, electorate)[0]:
                peer.hold(after)
                self.committed += 1
                return
        electorate = self.claimed.get(peer.state.digest, set()) - (set() if peer.unsettled else {peer.name})
        agreement = newest_state(peer.state, votes, electorate, peer)
        if agreement is not None and agreement.state in self.blobs:
            try:
                state = parse_state(self.blobs[agreement.state], MANIFEST, LIKE)
            except Reject:
                state = peer.state
            if (state.round, state.digest) == (agreement.round, agreement.state):
                peer.hold(state)
        if peer.attested is None or peer.attested.at(peer.state.round) != peer.state.digest:
            self.attest(peer, peer.state)
        believes = peer.state.digest in self.lies and peer is not self.victim
        assert not believes, f"…{peer.name[-6:]} believes a lie: {agreement}"

    def attest(self, peer: Peer, state: State) -> None:
        peer.attested = make_attestation(peer.identity, state, ancestors=peer.line_to(state))
        self.publish(peer.attested)

    def renew(self) -> None:
        for peer in self.online:
            if peer.attested is not None:
                self.publish(peer.attested)

    def average(self, group: list[Peer]) -> None:
        """A round of peers that hold the same state: those who see a quorum commit it, the others may do so later."""
        before = group[0].state
        claims = [make_claim(peer.identity, MANIFEST, before) for peer in group]
        params = {
            name: value + np.float32(0.001 * sum(peer.number for peer in group))
            for name, value in before.params.items()
        }
        after = advance(before, MANIFEST, claims, params, {})
        self.blobs[after.digest] = after.blob
        for peer in group:
            self.attest(peer, after)
            if self.random.random() < 0.03 and self.luck < 1:
                peer.online = False
        electorate = {peer.name for peer in group}
        self.claimed.setdefault(before.digest, set()).update(electorate)
        for peer in [peer for peer in group if peer.online]:
            if any(self.has_quorum(peer, after, electorate) for _ in range(self.looks)):
                peer.hold(after)
                self.committed += 1
            else:
                peer.unsettled = after, electorate

    def has_quorum(self, peer: Peer, after: State, electorate: set[str]) -> bool:
        return quorum(after.round, after.digest, self.votes_seen_by(peer), electorate)[0]

    def votes_seen_by(self, peer: Peer) -> list[Attestation]:
        return [*self.seen_by(peer).values(), *([peer.attested] if peer.attested is not None else [])]

    def lie(self) -> None:
        """Everything that the liars publish in a tick."""
        strategies = ["none", "stubborn", "fork", "work", "future", "parent"]
        strategy = self.random.choice(strategies) if self.strategy == "mixed" else self.strategy
        if not self.liars or strategy == "none":
            return
        counts = Counter(peer.state.digest for peer in self.honest)
        common = next(peer.state for peer in self.honest if peer.state.digest == counts.most_common(1)[0][0])
        if strategy == "stubborn":
            for liar in self.liars:
                self.publish(make_attestation(liar, GENESIS))
            return
        if strategy == "parent":
            if common.round < 2:
                return
            lie = self.invent(round=common.round - 1, parent=common.parent)
            first, *rest = self.liars
            self.publish(make_attestation(first, common, ancestors=(lie.digest,)))
            for liar in rest:
                self.publish(make_attestation(liar, lie))
            return
        if strategy == "future":
            lie = self.invent(round=MANIFEST.rounds.rounds, parent=common.digest)
        elif strategy == "work":
            lie = self.invent(round=common.round + 1, parent=common.digest, credit={self.liars[0].peer: 1e14})
        else:
            lie = self.invent(round=common.round + 1, parent=common.digest)
        for liar in self.liars:
            self.publish(make_attestation(liar, lie))

    def invent(self, **changes: object) -> State:
        """A state that nobody trained, which anybody can fetch and parse."""
        params = {name: value * np.float32(-1) for name, value in GENESIS.params.items()}
        state = dataclasses.replace(GENESIS, params=params, **changes)
        self.blobs[state.digest] = state.blob
        self.lies.add(state.digest)
        return state

    def churn(self) -> None:
        """Some leave without a word and some come back; the honest stay more than the liars."""
        for peer in self.honest:
            if peer.online and self.random.random() < 0.05:
                peer.online = False
            elif not peer.online and self.random.random() < 0.4:
                self.come_back(peer)
        while len(self.online) - (self.victim is not None) <= len(self.lying):
            self.come_back(self.random.choice([peer for peer in self.honest if not peer.online]))

    def come_back(self, peer: Peer) -> None:
        """A peer that starts again looks around before it says anything."""
        peer.online, peer.attested, peer.unsettled = True, None, None

    def tick(self) -> None:
        self.now += TICK_SECONDS
        self.churn()
        self.renew()
        self.lie()
        for peer in self.random.sample(self.online, len(self.online)):
            self.sync(peer)
        if self.random.random() < 0.7:
            self.train()
            self.lie()
            for peer in self.random.sample(self.online, len(self.online)):
                self.sync(peer)

    def train(self) -> None:
        """One round of each state that peers hold."""
        by_state: dict[bytes, list[Peer]] = {}
        for peer in self.online:
            by_state.setdefault(peer.state.digest, []).append(peer)
        for group in by_state.values():
            if group[0].state.round < MANIFEST.rounds.rounds:
                self.average(group)

    def heal(self) -> None:
        """Everybody is back and sees everything; the liars lie on."""
        self.luck = 1.0
        for _ in range(6):
            self.now += TICK_SECONDS
            for peer in self.honest:
                peer.online = True
            self.renew()
            self.lie()
            for peer in self.random.sample(self.honest, len(self.honest)):
                self.sync(peer)
            self.train()


def live(seed: int, honest: int, liars: int, strategy: str, looks: int = PATIENT) -> World:
    """A run from its first tick to its last; the seed is in the message of whatever fails."""
    world = World(seed, honest, liars, strategy, looks)
    try:
        for _ in range(TICKS):
            world.tick()
        world.heal()
        states = {peer.state.digest for peer in world.honest}
        rounds = sorted(peer.state.round for peer in world.honest)
        assert len(states) == 1, f"{len(states)} states, before rounds {rounds}"
        assert not states & world.lies
        assert world.committed > 0
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {honest} honest peers, {liars} liars, {strategy}: {error}") from error
    return world


@pytest.mark.parametrize("looks", [PATIENT, IMPATIENT])
@pytest.mark.parametrize("seed", range(12))
def test_honest_peers_alone_end_in_one_state(seed: int, looks: int) -> None:
    world = live(seed, honest=1 + seed % 7, liars=0, strategy="none", looks=looks)
    assert max(peer.state.round for peer in world.honest) >= 5


@pytest.mark.parametrize("strategy", ["stubborn", "fork", "work", "future"])
@pytest.mark.parametrize("seed", range(12))
def test_a_lying_minority_neither_wins_nor_splits_the_others(seed: int, strategy: str) -> None:
    honest = 3 + seed % 5
    live(seed, honest, liars=1 + seed % (honest - 1), strategy=strategy)


@pytest.mark.parametrize("strategy", ["parent", "mixed"])
@pytest.mark.parametrize("seed", range(12))
def test_a_minority_that_lies_about_parents_neither_wins_nor_splits_the_others(seed: int, strategy: str) -> None:
    honest = 3 + seed % 5
    live(seed, honest, liars=1 + seed % (honest - 1), strategy=strategy)


@pytest.mark.parametrize("strategy", ["stubborn", "fork", "work", "future", "mixed"])
@pytest.mark.parametrize("seed", range(6))
def test_a_joiner_that_saw_nobody_but_liars_comes_back_as_soon_as_it_sees_the_others(seed: int, strategy: str) -> None:
    world = World(seed, honest=5 + seed % 4, liars=2, strategy=strategy, looks=PATIENT)
    world.eclipsed = world.victim = world.honest[0]
    for _ in range(8):
        world.tick()
    believed = world.victim.state.digest
    assert believed in world.lies or strategy in ("stubborn", "mixed")
    world.eclipsed = None
    for _ in range(8):
        world.tick()
    world.heal()
    assert len({peer.state.digest for peer in world.honest}) == 1
    assert world.victim.state.digest != believed
    assert world.victim.state.digest not in world.lies


def test_a_run_of_the_simulation_repeats_exactly() -> None:
    one, other = (live(1, honest=5, liars=1, strategy="stubborn") for _ in range(2))
    assert [peer.state.digest for peer in one.honest] == [peer.state.digest for peer in other.honest]
    assert one.board == other.board
