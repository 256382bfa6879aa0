"""A peer of one run: what it holds, and what its rounds come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from p2pasr import __version__
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.identity import Identity
from p2pasr.peers.journal import Journal
from p2pasr.peers.link import Link
from p2pasr.peers.records import Records
from p2pasr.private import PrivateShards
from p2pasr.protocol import admission
from p2pasr.protocol.admission import read_invite
from p2pasr.protocol.cohorts import EVERYBODY, Cohort, cohort_of
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import (
    MAX_ANCESTORS,
    NO_TICKET,
    Attestation,
    Charge,
    Claim,
    Mix,
    Receipt,
    Roster,
    Signed,
    Stage,
    Ticket,
)
from p2pasr.protocol.rules import RoundView, view_of
from p2pasr.protocol.state import State, mix_due
from p2pasr.protocol.tensors import Tensors
from p2pasr.protocol.tiers import EVERY, trains_all
from p2pasr.report import Report
from p2pasr.tasks.base import Task

R = TypeVar("R", Roster, Mix)


@dataclass
class Member:
    """A peer of one run, with everything that its rounds need.

    Attributes:
        like: the initial parameters, for names and shapes.
        state: what this peer holds; replaced only by a committed round or by the state that holds.
        private: its own shards, where the run trains on such.
        tier: which shards its memory is enough for, see :mod:`p2pasr.protocol.tiers`.
        lineage: digests of the states that `state` grew from, the newest first, as far as they are known.
        attested: this peer's current attestation, None before its first.
        attested_in: the cohort that can see it.
        unsettled: what this peer made of the round and attests, while not enough others do.
        fresh: whether it fetched or loaded its state instead of taking part in the round before.
        closes_at: when this peer's training of the round ends at the latest, seconds since 1970.
        grouped: whether the averaging under way has found its group.
        proved: peers that this one has seen proved to cheat.
        shunned: those that gave members of this round different results; it is averaged without them.
        shown: the claims that others showed in the directory when this peer last looked.
        charges: where the proofs that this peer holds can be had, by the accused.
        strikes: peers that it names for a strike, and the round in which it saw why.
        undos: how often this peer computed what takes another's work out again.
        checked: digest of the state whose round it has checked last.
        asked: digest of the state of whose round it has asked again for what others could not have.
        heard: digests of the proofs that it has looked at.
        distrusted: peers that accused somebody without proof.
        put_off: those that did not give a proof in time: how often, and the round from which they are heard again.
        model: a local folder to load a pretrained base from, in place of the one that the manifest names.
        settles: whether segments in the grey zone are trained again in the canonical class; not when one took too long.
        opened: bytes of others' checkpoints that it was given to check, since it started.
        opened_parts: bytes of others' deltas that it was given to reduce again or to measure, since it started.
        whole: shards whose bytes this process has compared with their digests.
        traffic: bytes sent and received, and connections open, when last counted.
        ticket: what this peer shows to be admitted.
    """

    manifest: RunManifest
    identity: Identity
    task: Task
    link: Link
    store: BlobStore
    journal: Journal
    records: Records
    report: Report
    like: Tensors
    state: State
    client_mode: bool = False
    model: str | None = None
    private: PrivateShards | None = None
    tier: int = EVERY
    lineage: tuple[bytes, ...] = field(default=(), init=False)
    attested: Signed[Attestation] | None = None
    attested_in: Cohort = EVERYBODY
    unsettled: Result | None = None
    fresh: bool = True
    closes_at: float = 0.0
    grouped: bool = False
    proved: set[str] = field(default_factory=set)
    shunned: set[str] = field(default_factory=set)
    shown: dict[str, Signed[Claim]] = field(default_factory=dict)
    charges: dict[str, Charge] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    undos: Counter[str] = field(default_factory=Counter)
    checked: bytes = b""
    asked: bytes = b""
    heard: set[bytes] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    put_off: dict[str, tuple[int, int]] = field(default_factory=dict)
    settles: bool = True
    opened: int = 0
    opened_parts: int = 0
    whole: set[bytes] = field(default_factory=set)
    traffic: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("bytes_sent", "bytes_received", "connections"), 0)
    )
    ticket: Ticket = NO_TICKET

    def __post_init__(self) -> None:
        self.lineage = self.line_to(self.state)
        self._view = view_of(self.state, self.manifest, self.cohort)

    @property
    def peer(self) -> str:
        """This peer's ID."""
        return self.identity.peer

    @property
    def cohort(self) -> Cohort:
        """The part of the swarm that this peer goes through its rounds with."""
        return cohort_of(self.state.run, self.peer, self.state.bits)

    @property
    def view(self) -> RoundView:
        """What the rules judge this round's records against."""
        if self._view.state != self.state.digest:
            self._view = view_of(self.state, self.manifest, self.cohort)
        return self._view

    @property
    def out(self) -> set[str]:
        """Those who take no part in this round: banned for good, or suspended for a while."""
        return {*self.state.bans, *self.view.suspended}

    def can_train(self, claim: Claim) -> bool:
        """Whether this peer's memory is enough for the shards of a claim."""
        return trains_all(self.tier, claim.shards, self.manifest.clip_lengths)

    def line_to(self, state: State) -> tuple[bytes, ...]:
        """Digests of the states that a state grew from, the newest first, as far as they are known here."""
        if state.digest == self.state.digest and self.lineage:
            return self.lineage
        line = (self.state.digest, *self.lineage)
        rounds = state.round - self.state.round
        if state.parent == self.state.digest or (rounds == 1 and mix_due(self.state, self.manifest)):
            return line[:MAX_ANCESTORS]  # a mixed state names no single one that it grew from
        if rounds == 2 and mix_due(self.state, self.manifest):
            return (state.parent, *line)[:MAX_ANCESTORS]
        return (state.parent,) if state.round > 0 else ()

    def in_our_round(self, roster: Mapping[str, Roster]) -> dict[str, Roster]:
        """Those of a roster who work on the same round from the same state."""
        ours = (self.state.round, self.state.digest)
        return self.admitted({peer: entry for peer, entry in roster.items() if (entry.round, entry.state) == ours})

    def admitted(self, records: Mapping[str, R]) -> dict[str, R]:
        """Those of these records whose authors take part, as far as this peer knows."""
        out = self.out
        present = {peer: record for peer, record in records.items() if peer not in out}
        return admission.admitted(present, self.manifest, self.view)

    @property
    def believed(self) -> RoundView:
        """What attestations are judged against: the state, and who invited this peer as long as it holds the first."""
        if self.state.round > 0 or not self.ticket.invite:
            return self.view
        inviter = read_invite(self.ticket.invite, self.state.run, self.peer).peer
        return replace(self.view, guests={**self.state.guests, inviter: inviter})

    def say(self, stage: Stage, segments: int = 0) -> None:
        """Tell the others what this peer does now."""
        self.records.announce_roster(
            Roster(
                run=self.state.run,
                peer=self.peer,
                ticket=self.ticket,
                round=self.state.round,
                state=self.state.digest,
                stage=stage,
                segments=segments,
                closes_at=self.closes_at,
                client_mode=self.client_mode,
                hardware=self.task.hardware_class[:128],
                version=__version__,
                addresses=self.link.maddrs[:8],
            ),
            self.cohort,
        )

    def step(self, name: str, message: str) -> None:
        """Report that a step of the round begins."""
        self.report.stop_if_interrupted()
        self.report.emit("step", message, step=name, round=self.state.round, state=self.state.digest)


@dataclass(frozen=True, slots=True)
class Work:
    """What a peer trained in a round, committed to but not yet averaged."""

    claim: Signed[Claim]
    delta: bytes
    checkpoints: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """An average, and who is in it."""

    group: bytes
    members: tuple[Signed[Claim], ...]
    receipts: tuple[Signed[Receipt], ...]
    average: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """What a peer made of a round: the next state, and who must agree before it counts."""

    after: State
    electorate: frozenset[str]


@dataclass(frozen=True, slots=True)
class Mixed(Result):
    """The same of a round that mixed cohorts, with what mates stated of the shares that they reduced."""

    receipts: tuple[Signed[Receipt], ...]


@dataclass(frozen=True, slots=True)
class Averaged(Result):
    """The same of a round that was trained, with how it came about.

    Attributes:
        excised: peer that it bans → the rounds out of which its work was taken again.
    """

    work: Work
    merged: Merged
    excised: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
