"""A swarm of any size on a clock of its own: what decides and what computes is real, the network and training are not.

Real are `cohort_of`, `bits_for`, `assign`, `advance`, `newest_state`, `quorum`, the codec, the averaging
rules, the outer optimizer, and everything about a mix: ledgers, votes, shares and the mixed state. Peers
leave and come back, records are missed, and a cohort may be late. Parameters are few; what peers would
receive is counted for a delta of `DELTA_VALUES` in int8, without the states that those who were away fetch.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from p2pasr.averaging import outer, rules
from p2pasr.averaging.codec import Codec, Decoded, Flat, Layout
from p2pasr.averaging.mix import mix_tree, shares_of
from p2pasr.peers.sync import newest_state
from p2pasr.protocol import mixing
from p2pasr.protocol.admission import newcomers
from p2pasr.protocol.agreement import quorum
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.cohorts import MAX_BITS, Cohort, bits_for, cohort_of
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import MAX_ANCESTORS, NO_TICKET, Attestation, Claim, Message, Mix, Roster, Signed
from p2pasr.protocol.mixing import NO_CHOICE, Ledger, Part, Tally
from p2pasr.protocol.signing import SIGNATURE_BYTES
from p2pasr.protocol.state import State, advance, genesis, mix_due, params_digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.protocol.tiers import EVERY

PARAMETERS: Final = 300
SHARDS: Final = 48
DELTA_VALUES: Final = 1_769_472
"""Trained values of the run whose traffic is counted: whisper-small with adapters of rank 16."""

DHT_BYTES: Final = 38 + 64 + 8
"""What the directory adds to a record: its owner, a signature, its expiry."""

LOOKS: Final = 6
"""How often a peer reads the directory in a round, while it waits for others."""

VIEWERS: Final = 4
"""So many members of a cohort look at the others for themselves; their mates see what one of them sees."""

LEAVE, RETURN = 0.1, 0.5
"""The share of peers that leaves before a round, and of those away that comes back."""

LUCK: Final = 0.98
"""The share of records that a look at the directory finds."""


def simulated_manifest(peers: int, rounds: int) -> RunManifest:
    """A run of few parameters and shards; a crowd starts in as many cohorts as it will need."""
    here = int(peers * RETURN / (LEAVE + RETURN))
    first_bits = bits_for(here, 64, 1, 0)
    return RunManifest.model_validate(
        {
            "name": "simulated",
            "task": {"kind": "toy"},
            "rounds": {"rounds": rounds, "segments": 2, "shards_per_peer": 2},
            "averaging": {"codec": "int8", "block": 16, "part_values": 256, "first_bits": first_bits},
            "shards": tuple(
                {
                    "digest": blob_digest(b"shard %d" % number).hex(),
                    "bytes": 1000,
                    "clips": 10,
                    "seconds": 60.0 + number,
                    "dialect": "yue",
                }
                for number in range(SHARDS)
            ),
            "initial": params_digest(_initial()).hex(),
            "parameters": PARAMETERS,
        }
    )


def _initial() -> Tensors:
    return {"weights": np.linspace(-1, 1, PARAMETERS, dtype=np.float32)}


@dataclass
class SimulatedPeer:
    """An honest peer; it has what `newest_state` wants of a journal.

    Attributes:
        fresh: whether it has just come back, and looks everywhere.
        kept: digests of states that it has on disk.
    """

    name: str
    state: State
    online: bool = True
    fresh: bool = True
    lineage: tuple[bytes, ...] = ()
    states: dict[int, bytes] = field(default_factory=dict)
    kept: set[bytes] = field(default_factory=set)

    def held(self) -> dict[int, bytes]:
        """Round → digest of the state that it held before it."""
        return self.states

    def hold(self, state: State, *, grown: bool) -> None:
        """Replace its state.

        Args:
            grown: whether it took part in the round that led there.
        """
        self.lineage = self.line_to(state, grown=grown)
        self.states = {number: digest for number, digest in self.states.items() if number < state.round}
        self.states[state.round] = state.digest
        self.kept = {state.digest, state.common}
        self.state = state

    def line_to(self, state: State, *, grown: bool) -> tuple[bytes, ...]:
        """What `round.Member.line_to` returns."""
        if not grown:
            return (state.parent,) if state.round else ()
        mixed = (state.parent,) if state.round == self.state.round + 2 else ()
        return (*mixed, self.state.digest, *self.lineage)[:MAX_ANCESTORS]

    def attestation(self, after: State | None = None) -> Attestation:
        """What it attests: its state, or what it made of a round."""
        state = after or self.state
        line = self.lineage if after is None else self.line_to(after, grown=True)
        return Attestation(state.run, self.name, NO_TICKET, state.round, state.digest, line, float(state.work))


@dataclass(frozen=True, slots=True)
class SimulatedMix:
    """One mix, for whoever checks the simulation.

    Attributes:
        states: the states that those who took part computed, one for each cohort.
        left_out: cohorts with members that were not in it.
    """

    number: int
    cohorts: int
    states: frozenset[bytes]
    left_out: tuple[int, ...]


class Simulation:
    """A swarm.

    Args:
        late: at which mix, counted from 0, the last cohort is late; None for never.
    """

    def __init__(self, peers: int, rounds: int, seed: int = 0, late: int | None = None) -> None:
        self.random = random.Random(seed)
        self.noise = np.random.default_rng(seed)
        self.manifest = simulated_manifest(peers, rounds)
        self.layout = Layout.of(PARAMETERS, self.manifest.averaging)
        self.delta = Layout(DELTA_VALUES, 1 << 17, Codec("int8"))
        first = genesis(self.manifest, _initial())
        self.run = first.run
        self.states = {first.digest: first}
        self.peers = [SimulatedPeer(f"12D3KooW{number:044d}", first) for number in range(peers)]
        for peer in self.peers:
            peer.hold(first, grown=False)
        self.late, self.held_up = late, 0
        self.waited: set[int] = set()
        self.mixes: list[SimulatedMix] = []
        self.received: Counter[str] = Counter()
        self.peer_rounds = 0
        self.differing = 0
        self.sizes = _record_bytes(first)

    # --- the clock ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """As long as a round takes."""
        self.churn()
        board = self.board()
        for peer in self.online:
            self.sync(peer, board)
        cohorts = self.cohorts()
        self.peer_rounds += len(self.online)
        due = [cohort for cohort, group in cohorts.items() if mix_due(group[0].state, self.manifest)]
        for cohort, group in cohorts.items():
            if cohort not in due and group[0].state.round < self.manifest.rounds.rounds and not self._held_up(cohort):
                self.train(group)
        if due:
            self.mix({cohort: cohorts[cohort] for cohort in due})
        self._check()

    def run_to_the_end(self) -> Iterator[int]:
        """Tick until the run is over; yields the ticks."""
        rounds = self.manifest.rounds.rounds
        for number in range(2 * rounds):
            if all(peer.state.round >= rounds for peer in self.online):
                return
            self.tick()
            yield number

    @property
    def online(self) -> list[SimulatedPeer]:
        """Who is here."""
        return [peer for peer in self.peers if peer.online]

    def churn(self) -> None:
        """Some leave without a word, and some come back."""
        for peer in self.peers:
            if peer.online and self.random.random() < LEAVE:
                peer.online = False
            elif not peer.online and self.random.random() < RETURN:
                peer.online = peer.fresh = True

    def board(self) -> dict[Cohort, dict[str, Attestation]]:
        """What lies in the directory: by cohort, of those who were here before."""
        board: dict[Cohort, dict[str, Attestation]] = defaultdict(dict)
        for peer in self.online:
            if not peer.fresh:
                board[self.cohort(peer)][peer.name] = peer.attestation()
        return board

    def cohort(self, peer: SimulatedPeer) -> Cohort:
        """Where a peer belongs, as far as it knows."""
        return cohort_of(self.run, peer.name, peer.state.bits)

    def cohorts(self) -> dict[Cohort, list[SimulatedPeer]]:
        """Those who are here, by cohort, and of each the ones that hold what most of it hold."""
        members: dict[Cohort, list[SimulatedPeer]] = defaultdict(list)
        for peer in self.online:
            members[self.cohort(peer)].append(peer)
        common = {c: Counter(p.state.digest for p in group).most_common(1)[0][0] for c, group in members.items()}
        return {c: [p for p in members[c] if p.state.digest == common[c]] for c in sorted(members)}

    def sync(self, peer: SimulatedPeer, board: Mapping[Cohort, Mapping[str, Attestation]]) -> None:
        """What `round.sync` does."""
        bits = range(MAX_BITS + 1) if peer.fresh else range(max(0, peer.state.bits - 1), peer.state.bits + 2)
        votes: dict[str, Attestation] = {}
        for number in bits:
            found = board.get(cohort_of(self.run, peer.name, number), {})
            self._receive("records", self.sizes["attestation"] * len(found))
            votes.update({name: vote for name, vote in found.items() if self._lucky()})
        agreement = newest_state(peer.state, list(votes.values()), set(), peer)  # type: ignore[arg-type]
        if agreement is not None and agreement.state is not None:
            peer.hold(self.states[agreement.state], grown=False)
        peer.fresh = False

    # --- a round ------------------------------------------------------------------------------------

    def train(self, group: list[SimulatedPeer]) -> None:
        """One round of the members of a cohort: those in its group commit it if they are a quorum."""
        before = group[0].state
        cohort = self.cohort(group[0])
        most = self.manifest.averaging.max_group
        members = self.random.sample(group, min(most, len(group)))
        claims = [self._claim(peer, before, cohort) for peer in members]
        weights = rules.weights(claims, self.manifest, before.standing, before.guests)
        deltas = [self.layout.encode(self._learned(before)) for _ in members]
        rule = self.manifest.averaging.rule
        center = rules.Center(None, range(len(members)), newcomers(claims, self.manifest, before.standing))
        average = b"".join(
            self.layout.codec.encode(rules.aggregate(self._decoded(index, deltas), weights, rule, center))
            for index in range(self.layout.parts)
        )
        delta = Decoded(average, self.layout, before.params)
        section = self.manifest.averaging.outer
        params, moments = outer.step(before.params, before.moments, delta, section, before.round)
        after = advance(before, self.manifest, claims, params, moments)
        self._receive("delta exchange", 2 * self.delta.total_bytes * (len(members) - 1))
        one = self.sizes["roster"] + self.sizes["claim"] + self.sizes["attestation"]
        self._receive("records", LOOKS * one * len(group) ** 2)
        attested = [peer.attestation(after) for peer in members]
        self.commit(members, after, attested, {peer.name for peer in group})

    def commit(
        self, members: Iterable[SimulatedPeer], after: State, votes: list[Attestation], electorate: set[str]
    ) -> None:
        """Each member that sees a quorum holds the result."""
        self.states[after.digest] = after
        for peer in members:
            seen = [vote for vote in votes if vote.peer == peer.name or self._lucky()]
            if quorum(after.round, after.digest, seen, electorate)[0]:
                peer.hold(after, grown=True)

    def _claim(self, peer: SimulatedPeer, before: State, cohort: Cohort) -> Claim:
        shards = assign(self.manifest, before.digest, before.covered, peer.name, cohort)
        return _claim_of(before, peer.name, shards)

    def _learned(self, before: State) -> Any:
        towards = -0.1 * before.params["weights"]
        return (towards + 0.01 * self.noise.normal(size=PARAMETERS)).astype(np.float32)

    def _decoded(self, index: int, deltas: list[list[bytes]]) -> dict[int, Any]:
        size = self.layout.part_size(index)
        return {position: self.layout.codec.decode(parts[index], size) for position, parts in enumerate(deltas)}

    # --- a mix --------------------------------------------------------------------------------------

    def mix(self, due: dict[Cohort, list[SimulatedPeer]]) -> None:
        """The cohorts that have come to a boundary mix, if those that have not are waited for no longer."""
        groups = list(due.values())
        number, bits = groups[0][0].state.round, groups[0][0].state.bits
        common = self.states[groups[0][0].state.common]
        board = {cohort: found for cohort, found in self.board().items() if cohort.bits == bits}
        stated: dict[Cohort, dict[str, Mix]] = {cohort: self._state(cohort, due[cohort]) for cohort in due}
        tallies = {
            peer.name: (cohort, Tally(number, common.digest, common.round))
            for cohort, group in due.items()
            for peer in group[:VIEWERS]
        }
        patient = number not in self.waited
        self.waited.add(number)
        for _ in range(LOOKS):
            for name, (cohort, tally) in tallies.items():
                self._look(tally, board, stated)
                self._vote(name, tally, stated[cohort], patient=patient)
            self._follow(due, stated)
        decided = {cohort: self._decided(tally) for cohort, tally in tallies.values()}
        ends: dict[Cohort, State] = {}
        mixed: set[Cohort] = set()
        for cohort, group in due.items():
            tally = next(tally for of, tally in tallies.values() if of == cohort)
            parts = decided[cohort]
            if parts is not None and cohort.index in {part.index for part in parts}:
                ends[cohort] = self._mixed(common, number, parts)
                self._count_mix(common, group, parts)
                mixed.add(cohort)
            elif (result := tally.result()) is not None:
                ends[cohort] = mixing.caught_up(group[0].state, common, self.states[result], self.manifest)
                self._receive("mix", 4 * DELTA_VALUES * len(group))
            else:
                continue
            votes = [peer.attestation(ends[cohort]) for peer in group]
            self.commit(group, ends[cohort], votes, {peer.name for peer in group})
        if mixed:
            left_out = tuple(sorted(cohort.index for cohort in board.keys() - mixed))
            states = frozenset(ends[cohort].digest for cohort in mixed)
            self.mixes.append(SimulatedMix(number, len(mixed), states, left_out))

    def _state(self, cohort: Cohort, group: list[SimulatedPeer]) -> dict[str, Mix]:
        state = group[0].state
        common = self.states[state.common]
        tree = mix_tree(self.run, state.round, cohort)
        ledger = mixing.ledger_since(state, common).pack(self.manifest)
        root = tree.root([*map(blob_digest, self._encoded(state, common)), blob_digest(ledger)])
        return {
            peer.name: Mix(
                self.run, peer.name, NO_TICKET, state.round, state.digest, common.digest, root, True, (), NO_CHOICE
            )
            for peer in group
        }

    def _encoded(self, state: State, common: State) -> list[bytes]:
        before, after = Flat(common.params), Flat(state.params)
        return [self.layout.codec.encode(after[cut] - before[cut]) for cut in self.layout.cuts()]

    def _look(
        self,
        tally: Tally,
        board: Mapping[Cohort, Mapping[str, Attestation]],
        stated: Mapping[Cohort, Mapping[str, Mix]],
    ) -> None:
        missing = {*tally.missing, *({cohort.index for cohort in board} - tally.attesters.keys())}
        for cohort, votes in board.items():
            if cohort.index in missing:
                tally.see_attestations(cohort.index, [vote for vote in votes.values() if self._lucky()])
        for cohort, mixes in stated.items():
            tally.see_mixes(cohort.index, [mix for mix in mixes.values() if self._lucky()])

    def _vote(self, name: str, tally: Tally, mates: dict[str, Mix], *, patient: bool) -> None:
        mine = mates[name]
        decided, better = mixing.decide(tally.votes)
        if decided is not None or tally.result() is not None:
            return
        parts: tuple[Part, ...] | None = None
        if mine.chosen == NO_CHOICE and (not tally.missing or not patient):
            parts = tally.parts
        elif better is not None:
            parts = tally.named(better)
        if parts:
            mates[name] = _voting(mine, tally.common, parts)

    def _follow(self, due: Mapping[Cohort, list[SimulatedPeer]], stated: Mapping[Cohort, dict[str, Mix]]) -> None:
        """Those who do not look for themselves vote as a mate does, once."""
        for cohort, group in due.items():
            voted = [stated[cohort][peer.name] for peer in group[:VIEWERS] if any(stated[cohort][peer.name].chosen)]
            for peer in group[VIEWERS:]:
                if voted and not any(stated[cohort][peer.name].chosen):
                    like = self.random.choice(voted)
                    stated[cohort][peer.name] = _renamed(like, peer.name)

    def _decided(self, tally: Tally) -> tuple[Part, ...] | None:
        decided, _ = mixing.decide(tally.votes)
        return None if decided is None else tally.named(decided)

    def _mixed(self, common: State, number: int, parts: tuple[Part, ...]) -> State:
        states = [self.states[part.state] for part in parts]
        rounds = number - common.round
        ledgers = [
            Ledger.unpack(
                mixing.ledger_since(state, common).pack(self.manifest),
                self.manifest,
                Cohort(common.bits, part.index),
                rounds,
            )
            for state, part in zip(states, parts, strict=True)
        ]
        weights = mixing.weights(ledgers, self.manifest)
        deltas = [self._encoded(state, common) for state in states]
        clip = self.manifest.averaging.rule.clip_norm
        average = b"".join(
            self.layout.codec.encode(rules.weighted_mean(rules.clip(self._decoded(index, deltas), clip), weights))
            for index in range(self.layout.parts)
        )
        delta = Decoded(average, self.layout, common.params)
        return mixing.mixed(common, self.manifest, number, [part.state for part in parts], ledgers, delta)

    def _count_mix(self, common: State, group: list[SimulatedPeer], parts: tuple[Part, ...]) -> None:
        """What the members of one cohort receive in a mix."""
        shares = shares_of(self.delta.parts, [peer.name for peer in group], parts[0].root)
        ledgers = sum(len(mixing.ledger_since(self.states[p.state], common).pack(self.manifest)) for p in parts)
        one = self.delta.total_bytes / self.delta.parts
        everybody = len(self.online) * (2 * self.sizes["mix"] + self.sizes["attestation"])
        for peer in group:
            reduced = len(shares[peer.name])
            self._receive("mix", int(one * (reduced * (len(parts) - 1) + self.delta.parts - reduced)) + ledgers)
            self._receive("mix", 0 if common.digest in peer.kept else 4 * DELTA_VALUES)
            self._receive("records", everybody)

    # --- what is looked at --------------------------------------------------------------------------

    def _check(self) -> None:
        """Count states that members of one cohort hold beside each other in one round."""
        held: dict[tuple[Cohort, int], set[bytes]] = defaultdict(set)
        for peer in self.online:
            held[self.cohort(peer), peer.state.round].add(peer.state.digest)
        self.differing += sum(len(states) - 1 for states in held.values())

    def agreement(self) -> float:
        """The share of peers here that hold what most of their cohort hold."""
        return sum(map(len, self.cohorts().values())) / max(1, len(self.online))

    def bytes_a_round(self, kind: str) -> float:
        """What a peer receives of a kind, a round."""
        return self.received[kind] / max(1, self.peer_rounds)

    def _held_up(self, cohort: Cohort) -> bool:
        """Whether a cohort trains no round now: the last one, for two rounds before the mix that it is to miss."""
        section, rounds = self.manifest.averaging, self.manifest.rounds.rounds
        if self.late is None or len(self.mixes) != self.late or cohort.index != (1 << cohort.bits) - 1:
            return False
        ahead = max(peer.state.round for peer in self.online)
        if self.held_up < 2 and (rounds - ahead) % section.mix_rounds in (3, 2):
            self.held_up += 1
            return True
        return False

    def _receive(self, kind: str, size: int) -> None:
        self.received[kind] += size

    def _lucky(self) -> bool:
        return self.random.random() < LUCK


def _voting(mix: Mix, common: bytes, parts: tuple[Part, ...]) -> Mix:
    indices = tuple(part.index for part in parts)
    chosen = mixing.choice(common, parts)
    return replace(mix, cohorts=indices, chosen=chosen)


def _renamed(mix: Mix, peer: str) -> Mix:
    return replace(mix, peer=peer)


def _claim_of(before: State, peer: str, shards: tuple[bytes, ...]) -> Claim:
    """What a peer claims that trained these shards from a state; nothing in it but what rounds and their bytes need."""
    nothing = bytes(32)
    return Claim(
        run=before.run,
        peer=peer,
        ticket=NO_TICKET,
        round=before.round,
        state=before.digest,
        shards=shards,
        tier=EVERY,
        seconds=0.0,
        segments=2,
        steps=50,
        samples=800,
        trace_root=nothing,
        delta_root=nothing,
        delta_norm=1.0,
        loss_before=2.0,
        loss_after=1.0,
        hardware="cpu",
        against=(),
        undo=(),
        strikes=(),
    )


def _record_bytes(state: State) -> dict[str, int]:
    """Kind → bytes of a record in the directory."""
    who, nothing = f"12D3KooW{0:044d}", bytes(32)
    address = "/ip4/203.0.113.5/tcp/31337/p2p/" + who
    messages: list[Message] = [
        Roster(state.run, who, NO_TICKET, 0, nothing, "training", 1, 1.5e9, False, "cpu x86-64", "0.1.0", (address,)),
        _claim_of(state, who, (nothing,) * 2),
        Attestation(state.run, who, NO_TICKET, 16, nothing, (nothing,) * MAX_ANCESTORS, 1.0),
        Mix(state.run, who, NO_TICKET, 0, nothing, nothing, nothing, True, tuple(range(32)), nothing),
    ]
    return {m.kind: len(Signed(m, bytes(SIGNATURE_BYTES)).pack()) + DHT_BYTES for m in messages}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it."""

    peers: int
    cohorts: int
    rounds: int
    mixes: int
    seconds: float
    delta_megabytes: float
    mix_megabytes: float
    record_megabytes: float
    megabytes_a_round: float
    states_that_differ: int
    percent_in_agreement: float


def measure(peers: list[int], rounds: int) -> list[Row]:
    """Simulate a swarm of each size."""
    return [_measure(count, rounds) for count in peers]


def _measure(peers: int, rounds: int) -> Row:
    began = time.monotonic()
    world = Simulation(peers, rounds, late=1)
    agreement = []
    cohorts = 1
    for _ in world.run_to_the_end():
        agreement.append(world.agreement())
        cohorts = max(cohorts, *(1 << peer.state.bits for peer in world.online))
    parts = [world.bytes_a_round(kind) / 1e6 for kind in ("delta exchange", "mix", "records")]
    return Row(
        peers=peers,
        cohorts=cohorts,
        rounds=rounds,
        mixes=len(world.mixes),
        seconds=time.monotonic() - began,
        delta_megabytes=parts[0],
        mix_megabytes=parts[1],
        record_megabytes=parts[2],
        megabytes_a_round=sum(parts),
        states_that_differ=world.differing + sum(len(mix.states) - 1 for mix in world.mixes),
        percent_in_agreement=100 * sum(agreement) / len(agreement),
    )
