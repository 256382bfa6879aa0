"""One round, told from top to bottom: sync → assign → train → commit → average → apply → attest → audit.

A swarm that is too large for one group goes through its rounds in cohorts, and every so often a round
is a mix of them instead: sync → contribute → agree on a mix → exchange → attest.

Every step is a function of this file that calls into its room. Whatever fails before a round is
committed leaves the state untouched, and says why.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Final, TypeVar

import numpy as np

from p2pasr import __version__
from p2pasr.auditing import check_last_round, convict, hear, offer, probe_loss
from p2pasr.averaging import outer
from p2pasr.averaging.codec import Decoded, Flat, Layout
from p2pasr.averaging.merkle import Tree
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.rules import norm
from p2pasr.errors import LocalError, NonFiniteStep, Reject, RemoteError, RoundFailed, TransportError
from p2pasr.excision import agreed_undos, taken_out, undos_of
from p2pasr.having import fetch_shards, shard_path
from p2pasr.peers import sync as syncing
from p2pasr.peers.blobs import BlobStore, file_digest
from p2pasr.peers.identity import Identity
from p2pasr.peers.journal import Journal, Pending
from p2pasr.peers.link import Link
from p2pasr.peers.records import Records
from p2pasr.peers.streams import patience
from p2pasr.private import PrivateShards, require_shards
from p2pasr.protocol import admission, mixing
from p2pasr.protocol.admission import read_invite
from p2pasr.protocol.agreement import Agreement, quorum, result_of
from p2pasr.protocol.cohorts import EVERYBODY, MAX_BITS, Cohort, cohort_of
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import (
    MAX_AGAINST,
    MAX_ANCESTORS,
    MAX_RECEIPT_BYTES,
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
    seal,
    unseal,
)
from p2pasr.protocol.mixing import NO_CHOICE, Ledger, Part, Tally
from p2pasr.protocol.private import conceal, counted_seconds, draw
from p2pasr.protocol.rules import RoundView, view_of
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, advance, mix_due, parse_state, remember, undone
from p2pasr.protocol.tensors import Tensors
from p2pasr.report import Report
from p2pasr.tasks.base import Bounded, Checkpoint, OnStep, SegmentPlan, Task
from p2pasr.verify.conflict import Conflict, contradict
from p2pasr.verify.evidence import ConflictProof
from p2pasr.verify.probe import measure
from p2pasr.verify.record import MixRecord, RoundRecord, check_record, in_every_part
from p2pasr.verify.trace import Trace, retain_traces
from p2pasr.withholding import ask_again

T = TypeVar("T")
R = TypeVar("R", Roster, Mix)

FIRST_POLL_SECONDS: Final = 0.05
POLL_SECONDS: Final = 0.5
"""How often the directory is read while waiting for others, at first and in the end."""

QUIET_SECONDS: Final = 3.0
"""Peers finish a round within moments of each other; only a longer wait is worth a sentence."""

AHEAD_SECONDS: Final = 10.0
"""How long a peer that is alone in its round gives others, who say that they are further, to show it."""

PATIENCE_SECONDS: Final = 30.0
"""How long one wait lasts before the round is looked at afresh from its first step."""

GROUP_WINDOW_SECONDS: Final = 8.0
"""How long a leader waits for peers that were expected but do not come."""

GROUP_SECONDS: Final = 30.0
"""How long finding a group may take."""

EXCHANGE_PATIENCE: Final = 4
"""An exchange has so many times as long as its bytes take on the slowest link that is put up with."""

QUORUM_SECONDS: Final = 20.0
RECEIPTS_SECONDS: Final = 30.0
ATTEMPTS: Final = 3
"""How often averaging is tried before the round starts over."""

SLACK: Final = 1.01
"""How much further than the task's bound a value may have moved: the optimizer's own arithmetic is rounded too."""

MAX_HALVINGS: Final = 8
"""How often a delta of private shards is made shorter before its peer gives up."""

LOOKS_AT_ONCE: Final = 8
"""How many places of the directory are read at a time."""

VOTE_ROUNDS: Final = 2
"""In how many rounds a peer names another for a strike: not all see in the same one what it did."""

CONTRIBUTE_SECONDS: Final = 120.0
STATUS_SECONDS: Final = 20.0


@dataclass
class Member:
    """A peer of one run, with everything that its rounds need.

    Attributes:
        like: the initial parameters, for names and shapes.
        state: what this peer holds; replaced only by a committed round or by the state that holds.
        private: its own shards, where the run trains on such.
        lineage: digests of the states that `state` grew from, the newest first, as far as they are known.
        attested: this peer's current attestation, None before its first.
        attested_in: the cohort that can see it.
        unsettled: what this peer made of the round and attests, while not enough others do.
        fresh: whether it fetched or loaded its state instead of taking part in the round before.
        closes_at: when this peer's training of the round ends at the latest, seconds since 1970.
        proved: peers that this one has seen proved to cheat.
        shunned: those that gave members of this round different results; it is averaged without them.
        charges: where the proofs that this peer holds can be had, by the accused.
        strikes: peers that it names for a strike, and the round in which it saw why.
        undos: how often this peer computed what takes another's work out again.
        checked: digest of the state whose round it has checked last.
        asked: digest of the state of whose round it has asked again for what others could not have.
        heard: digests of the proofs that it has looked at.
        distrusted: peers that accused somebody without proof.
        model: a local folder to load a pretrained base from, in place of the one that the manifest names.
        settles: whether segments in the grey zone are trained again in the canonical class; not when one took too long.
        opened: bytes of others' checkpoints that it was given to check, since it started.
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
    lineage: tuple[bytes, ...] = field(default=(), init=False)
    attested: Signed[Attestation] | None = None
    attested_in: Cohort = EVERYBODY
    unsettled: Result | None = None
    fresh: bool = True
    closes_at: float = 0.0
    proved: set[str] = field(default_factory=set)
    shunned: set[str] = field(default_factory=set)
    charges: dict[str, Charge] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    undos: Counter[str] = field(default_factory=Counter)
    checked: bytes = b""
    asked: bytes = b""
    heard: set[bytes] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    settles: bool = True
    opened: int = 0
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


def run_round(member: Member) -> bool:
    """Take part in one round.

    Returns:
        Whether a round was committed with this peer's work in it; otherwise the reason was reported
        and the next call starts over from the state that holds by then.

    Raises:
        LocalError: something here must be mended by a person.
        TransportError: the network is not there; the call can be repeated.
    """
    if sync(member):
        return True
    if member.state.round >= member.manifest.rounds.rounds:
        return False
    if member.fresh:  # who was away is asked for what it claimed before it can join a round
        offer(member)
    check_admitted(member)
    if is_suspended(member):
        return False
    if mix_due(member.state, member.manifest):
        return mix_cohorts(member)
    if not ready_to_train(member):
        return False
    work = resume(member)
    if work is None:
        checked = check_last_round(member) + ask_again(member)
        shards = assign_shards(member)
        trained = train(member, shards, max(1, member.manifest.rounds.segments - checked))
        if trained is None:
            return False
        work = commit(member, shards, *trained)
    reasons: list[str] = []
    for _attempt in range(ATTEMPTS):
        expected = wait_for_claims(member)
        if expected is None:
            return False
        try:
            merged = average(member, work, expected)
            result = apply(member, work, merged, expected)
            attestations = attest(member, result)
        except (TransportError, RemoteError) as error:
            reasons.append(str(error))
            member.report.warn(f"round {member.state.round} is not averaged yet: {error}")
            if overtaken(member):
                return False
            continue
        conclude(member, result, attestations)
        return True
    raise RoundFailed(f"round {member.state.round} was not averaged in {ATTEMPTS} attempts: {reasons[-1]}")


def between_looks() -> Iterator[float]:
    """Seconds from one look at the directory to the next, in proportion to the wait: most waits are short."""
    pause = FIRST_POLL_SECONDS
    while True:
        yield pause
        pause = min(1.25 * pause, POLL_SECONDS)


# --- sync ---------------------------------------------------------------------------------------


def sync(member: Member) -> bool:
    """Hold the state that most peers attest; fetch it if it is not ours.

    Returns:
        Whether our own result of the round was committed by that: its quorum came after we waited for it.
    """
    member.step("sync", f"round {member.state.round}: looking for the state that holds")
    seen = attestations_around(member)
    late = member.unsettled
    if late is not None and agreeing(late, seen)[0]:
        member.unsettled = None
        member.report.emit("late", f"round {member.state.round}: enough peers attest its result by now")
        conclude(member, late, attesters(late, seen))
        return True
    agreement = what_holds(member, seen)
    if agreement is not None:
        member.report.wait(f"{agreement.reason}; fetching it")
        votes = [signed.message for signed in seen.values()]
        tell_what_is_left(member, agreement, votes)
        hold(member, syncing.adopt(member.link, member.store, member.manifest, member.like, agreement, votes))
        member.fresh = True
    attested = member.attested is not None and member.attested.message.at(member.state.round) == member.state.digest
    if not attested or member.attested_in != member.cohort:
        publish_attestation(member, member.state)
    return False


def tell_what_is_left(member: Member, agreement: Agreement, votes: Sequence[Attestation]) -> None:
    """Say which rounds of this peer are not in the state that it is about to hold."""
    lines = [vote for vote in votes if vote.peer in agreement.supporters]
    apart = [
        number
        for number, digest in member.journal.held().items()
        if 0 < number <= member.state.round and {vote.at(number) for vote in lines} - {None, digest}
    ]
    if apart:
        member.report.warn(
            f"what this peer trained apart from the others since round {min(apart) - 1} is not in the state that "
            f"holds; the shards of these rounds are still to cover there and will be trained again"
        )


def attestations(member: Member) -> dict[str, Signed[Attestation]]:
    """What everybody in our cohort attests now, this peer too if it has said anything since it started."""
    return _with_ours(member, attested_in(member, member.cohort))


def attested_in(member: Member, cohort: Cohort) -> dict[str, Signed[Attestation]]:
    """What others attest in a cohort, but for those that are banned or suspended."""
    seen, out = member.records.attestations(member.believed, cohort), member.out
    return {peer: signed for peer, signed in seen.items() if peer not in out}


def attestations_around(member: Member) -> dict[str, Signed[Attestation]]:
    """What everybody attests in the cohorts that this peer may belong to.

    Others may have split or joined cohorts meanwhile: into how many is looked for near what this peer knows, and
    everywhere by one that was away or sees nobody.
    """
    bits = member.state.bits
    near = range(max(0, bits - 1), min(bits + 1, MAX_BITS) + 1)
    seen = _with_ours(member, attestations_in(member, near))
    if member.fresh or seen.keys() <= {member.peer}:
        seen = _with_ours(member, attestations_in(member, range(MAX_BITS + 1)))
    return seen


def attestations_in(member: Member, bits: Iterable[int]) -> dict[str, Signed[Attestation]]:
    """What others attest in our cohorts of so many bits; of one that moved from one to the other, what is later."""
    cohorts = [cohort_of(member.state.run, member.peer, number) for number in bits]
    seen: dict[str, Signed[Attestation]] = {}
    for found in at_once(lambda cohort: attested_in(member, cohort), cohorts):
        for peer, signed in found.items():
            if peer not in seen or seen[peer].message.round < signed.message.round:
                seen[peer] = signed
    return seen


def at_once(read: Callable[[Cohort], T], cohorts: Sequence[Cohort]) -> list[T]:
    """What is read of several cohorts, a few at a time: most of a look at the directory is waiting."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return list(pool.map(read, cohorts))


def _with_ours(member: Member, seen: dict[str, Signed[Attestation]]) -> dict[str, Signed[Attestation]]:
    return seen if member.attested is None else seen | {member.peer: member.attested}


def what_holds(member: Member, seen: dict[str, Signed[Attestation]]) -> Agreement | None:
    """The state that holds, if it is another than ours."""
    votes = [signed.message for signed in seen.values()]
    return syncing.newest_state(member.state, votes, electorate(member, votes), member.journal)


def electorate(member: Member, votes: Sequence[Attestation]) -> set[str]:
    """Who has a say in what comes of the round under way: the peers that claimed in it or still train.

    This peer is one of them while its own part can still be averaged, or when it has a result of its own; otherwise
    it follows the rest.
    """
    number, state = member.state.round, member.state.digest
    if not any(vote.at(number) == state and vote.at(number + 1) for vote in votes):
        return set()  # nobody says that the round is over
    roster = member.records.roster(member.cohort)
    working = {peer for peer, entry in member.in_our_round(roster).items() if entry.stage != "waiting"}
    if member.unsettled is not None or time.time() < member.closes_at + member.manifest.rounds.grace_seconds:
        working.add(member.peer)
    return working | takers(member)


def takers(member: Member) -> set[str]:
    """Who takes part in the round for all to see: those that claimed in it, or stated their part in its mix."""
    if not mix_due(member.state, member.manifest):
        return set(member.records.claims(member.view))
    mixes = mixes_in(member, member.cohort)
    return {mix.peer for mix in mixes if mix.state == member.state.digest}


def hold(member: Member, state: State) -> None:
    """Make a state ours, on disk first."""
    member.store.put("state", *state.pieces)
    member.journal.hold(state.round, state.digest)
    if state.strikes.get(member.peer) not in (None, member.state.strikes.get(member.peer)):
        member.report.warn(strike_warning(member, state))
    member.lineage = member.line_to(state)
    member.state = state
    member.unsettled = None
    member.closes_at = 0.0
    member.shunned.clear()
    kept = sorted(member.journal.held().items())[-member.manifest.retention.state_rounds :]
    member.store.retain("state", {digest for _, digest in kept} | {state.common})


def strike_warning(member: Member, state: State) -> str:
    """What a peer is told that has a new strike in a state."""
    (count, last), section = state.strikes[member.peer], member.manifest.verify
    reach = "; in client mode only peers that it is connected to reach it, so leave that out if you can"
    return (
        f"this peer was struck in round {last}: more than half of the round's peers could not have what it claimed, or "
        f"were shown a false proof by it. Until round {last + section.strike_rounds} it weighs what a newcomer does, "
        f"is audited more often, and after {section.strikes} strikes it is suspended; these are {count}"
        + (reach if member.client_mode else "")
    )


def overtaken(member: Member) -> bool:
    """Whether the others have agreed on a result of this round without waiting for us."""
    seen = attestations(member)
    if member.unsettled is not None and agreeing(member.unsettled, seen)[0]:
        return True
    agreement = what_holds(member, seen)
    if agreement is not None:
        member.report.wait(f"{agreement.reason}; joining it")
    return agreement is not None


# --- assign -------------------------------------------------------------------------------------


def check_admitted(member: Member) -> None:
    """May this peer take part?

    Raises:
        LocalError: it was banned, is not admitted, or has no shards of its own where the run needs them.
        TooEarly: who invited it has not merged enough work yet.
    """
    require_shards(member.private, member.manifest)
    section = member.manifest.admission
    try:
        admission.check_admitted(member.peer, member.ticket, member.manifest, member.state)
    except admission.TooEarly:
        raise  # time can mend it
    except RemoteError as error:
        if section.kind != "invite":
            raise LocalError(
                f"this run admits listed peers only, and {member.peer} is not among them; ask whoever made the run to "
                f"make one that lists it"
            ) from error
        raise LocalError(
            f"{error}; ask a member of this run for an invite of {member.peer} and start with --invite FILE"
        ) from error
    if member.peer in member.state.bans:
        raise LocalError(
            f"this peer was banned from the run in round {member.state.bans[member.peer]}: more than half of the "
            f"round's peers hold a proof that it cheated; see the run's evidence folder of any of them"
        )


def is_suspended(member: Member) -> bool:
    """Whether this peer takes no part in the round for its strikes; it waits a while for the others to finish it."""
    until = member.view.suspended.get(member.peer)
    if until is None:
        return False
    count, last = member.state.strikes[member.peer]
    member.say("waiting")
    started, pauses = time.monotonic(), between_looks()
    while not overtaken(member) and time.monotonic() < started + PATIENCE_SECONDS:
        member.report.wait(
            f"this peer is suspended until round {until}, for {count} strikes, the last in round {last}: more than "
            f"half of the round's peers could not have what it claimed, or were shown a false proof by it"
        )
        time.sleep(next(pauses))
    return True


def ready_to_train(member: Member) -> bool:
    """Whether there are peers enough and the round is still at its beginning; waits a while for both."""
    rounds = member.manifest.rounds
    started = time.monotonic()
    waiting = False
    pauses = between_looks()
    while True:
        roster = member.records.roster(member.cohort)
        here = member.in_our_round(roster)
        training = [r for r in here.values() if r.stage != "waiting"]
        begun = [r for r in training if r.segments > 0 or r.stage == "claimed"]
        pending = member.journal.pending()
        resuming = pending is not None and (pending.round, pending.state) == (member.state.round, member.state.digest)
        late = member.fresh and len(training) >= rounds.min_peers and bool(begun) and not resuming
        missing = rounds.min_peers - 1 - len(here)
        ahead = [r.round for r in roster.values() if r.round > member.state.round]
        waited = time.monotonic() - started
        left_behind = not here and bool(ahead) and waited < AHEAD_SECONDS
        if missing <= 0 and not late and not left_behind:
            return not (ahead and overtaken(member))
        if not waiting:
            member.say("waiting")
            waiting = True
        elsewhere = [r for p, r in roster.items() if p not in here]
        if late:
            reason = f"round {member.state.round} is under way with {len(training)} peers: this one joins the next"
        elif left_behind:
            reason = f"the others are in round {max(ahead)} already: waiting for what they agree on"
        else:
            reason = f"waiting for {missing} more peer{'s' if missing > 1 else ''} (a round needs {rounds.min_peers})"
            if elsewhere:
                rounds_seen = ", ".join(sorted({f"round {r.round} {r.state.hex()[:8]}" for r in elsewhere}))
                reason += (
                    f"; {len(elsewhere)} hold another state ({rounds_seen}), this one {member.state.digest.hex()[:8]}"
                )
        if waited > QUIET_SECONDS:
            member.report.wait(reason)
        if overtaken(member) or waited > PATIENCE_SECONDS:
            return False
        time.sleep(next(pauses))


def assign_shards(member: Member) -> tuple[bytes, ...]:
    """This peer's shards for the round: fetched, or drawn from its own."""
    private, state = member.private, member.state
    if private is not None:
        shards = draw(private.paths, state.digest, member.peer, member.manifest.rounds.shards_per_peer)
    else:
        shards = member.view.assigned(member.peer)
    member.step("assign", f"round {state.round}: {len(shards)} shards")
    if private is None:
        fetch_shards(member, shards)
    return shards


# --- train --------------------------------------------------------------------------------------


def train(member: Member, shards: Sequence[bytes], segments: int) -> tuple[Checkpoint, Trace, list[float]] | None:
    """Train segments until they are done or the round closes; None if nothing of it may be used."""
    rounds = member.manifest.rounds
    member.closes_at = time.time() + rounds.max_seconds
    member.step("train", f"round {member.state.round}: training")
    member.say("training")
    paths = [shard_path(member, shard) for shard in shards]
    kept = member.store if member.private is None else None
    trace = Trace(kept, member.state.run, member.state.round, member.peer)
    now = Checkpoint(member.state.params)
    losses: list[float] = []
    for segment in range(segments):
        started = time.time()
        plan = SegmentPlan.of(rounds, member.state.round, member.state.digest, member.peer, segment)
        try:
            now, report = member.task.segment(now, paths, plan, _progress(member, segment))
        except NonFiniteStep as error:
            member.report.warn(f"round {member.state.round} is left out: {error}")
            wait_for_next_round(member)
            return None
        trace.add(*now.pieces)
        losses.append(report.loss)
        seconds = time.time() - started
        member.report.emit(
            "segment",
            f"round {member.state.round}: segment {segment + 1}/{segments}, loss {report.loss:.3f}",
            round=member.state.round,
            segment=segment + 1,
            segments=segments,
            loss=report.loss,
            seconds=round(seconds, 2),
        )
        if segment + 1 < segments:
            if time.time() + seconds > member.closes_at:
                break
            member.say("training", segments=segment + 1)
    return now, trace, losses


def wait_for_next_round(member: Member) -> None:
    """Sit a round out.

    Raises:
        LocalError: nobody finished it either, so that trying it again would end the same way.
    """
    member.closes_at = 0.0
    member.say("waiting")
    rounds = member.manifest.rounds
    deadline = time.time() + rounds.max_seconds + rounds.grace_seconds
    while not overtaken(member):
        if time.time() > deadline:
            raise LocalError(
                f"round {member.state.round} could not be trained here and no other peer finished it; if training "
                f"diverges, start a run with a lower task.config.learning_rate"
            )
        time.sleep(POLL_SECONDS)


def _progress(member: Member, segment: int) -> OnStep:
    rounds = member.manifest.rounds
    total = rounds.segments * rounds.steps_per_segment

    def on_step(done: int, loss: float) -> None:
        member.report.stop_if_interrupted()
        label = f"round {member.state.round} segment {segment + 1}/{rounds.segments} loss {loss:.3f}"
        member.report.progress(label, segment * rounds.steps_per_segment + done, total)

    return on_step


# --- commit -------------------------------------------------------------------------------------


def commit(member: Member, shards: tuple[bytes, ...], end: Checkpoint, trace: Trace, losses: Sequence[float]) -> Work:
    """Encode the delta, commit to its parts and to the trace, write the claim down, publish it.

    Raises:
        LocalError: the delta is none that the task's optimizer can have made.
    """
    member.step("commit", f"round {member.state.round}: committing to the delta")
    write = write_delta if member.private is None else write_private_delta
    encoded = write(member, member.state.params, end.params)
    check_moves(member, encoded.largest, len(losses))
    rounds = member.manifest.rounds
    steps = len(losses) * rounds.steps_per_segment
    names, seconds, said = shards, 0.0, (losses[0], losses[-1])
    if (private := member.private) is not None:  # losses would tell how well the model hears these people
        names, said = conceal(shards, member.state.digest, private.secret), (0.0, 0.0)
        seconds = counted_seconds([private.seconds[shard] for shard in shards], member.manifest)
    hear(member)
    against = accused(member)
    claim = seal(
        member.identity,
        Claim(
            run=member.state.run,
            peer=member.peer,
            ticket=member.ticket,
            round=member.state.round,
            state=member.state.digest,
            shards=names,
            seconds=seconds,
            segments=len(losses),
            steps=steps,
            samples=steps * rounds.samples_per_step,
            trace_root=trace.root,
            delta_root=Tree("delta", member.state.run, member.state.round, member.peer).root(encoded.parts),
            delta_norm=encoded.norm,
            loss_before=said[0],
            loss_after=said[1],
            hardware=member.task.hardware_class[:128],
            against=against,
            undo=undos_of(member, against),
            strikes=struck(member),
        ),
    )
    work = Work(claim, encoded.digest, tuple(trace.checkpoints))
    member.journal.pend(Pending(member.state.round, member.state.digest, claim.pack(), work.delta, work.checkpoints))
    publish_claim(member, work)
    return work


def accused(member: Member) -> tuple[str, ...]:
    """The peers of our cohort that are proved to cheat and are not banned yet."""
    proved = member.proved - member.state.bans.keys()
    return tuple(sorted(peer for peer in proved if member.cohort.has(member.state.run, peer))[:MAX_AGAINST])


def struck(member: Member) -> tuple[str, ...]:
    """The peers of our cohort that this one names for a strike, as long as they have none for what it saw."""
    number, counted = member.state.round, member.state.strikes
    member.strikes = {
        peer: since
        for peer, since in member.strikes.items()
        if number < since + VOTE_ROUNDS and (peer not in counted or counted[peer][1] < since)
    }
    named = member.strikes.keys() - member.out - {member.peer}
    return tuple(sorted(peer for peer in named if member.cohort.has(member.state.run, peer))[:MAX_AGAINST])


@dataclass(frozen=True, slots=True)
class Encoded:
    """A delta in the blob store.

    Attributes:
        digest: the blob's.
        parts: digests of its parts.
        norm: L2 norm of the delta before it was encoded.
        largest: the largest magnitude in it, likewise.
    """

    digest: bytes
    parts: tuple[bytes, ...]
    norm: float
    largest: float


def write_delta(member: Member, start: Tensors, end: Tensors) -> Encoded:
    """Encode what training changed into a blob, part by part."""
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    digests: list[bytes] = []
    squares = largest = 0.0
    member.store.make_room(layout.total_bytes)
    path = member.store.scratch("delta")
    try:
        with PartFile(path, layout) as file:
            for index, vector in enumerate(layout.differences(start, end)):
                encoded = layout.codec.encode(vector)
                file.write(index, encoded)
                digests.append(blob_digest(encoded))
                squares += norm(vector) ** 2
                largest = max(largest, float(np.abs(vector).max()))
        delta = file_digest(path)
        member.store.commit(path, delta, "delta")
    finally:
        path.unlink(missing_ok=True)
    return Encoded(delta, tuple(digests), sqrt(squares), largest)


def write_private_delta(member: Member, start: Tensors, end: Tensors) -> Encoded:
    """The same for private shards: what others would take for poison on the probe is halved until they do not.

    An honest delta can go too far, for what one home records is not what the probe holds.

    Raises:
        LocalError: however short it is, it makes the loss on the probe too large.
    """
    for _ in range(MAX_HALVINGS):
        encoded = write_delta(member, start, end)
        delta = member.store.get(encoded.digest)
        measured = measure(member.state, delta, member.manifest, lambda params: probe_loss(member, params))
        if not measured.is_proof:
            return encoded
        member.report.warn(f"round {member.state.round}: the delta {measured}, so half of it is claimed")
        end = {name: start[name] + np.float32(0.5) * (end[name] - start[name]) for name in start}
    raise LocalError(
        f"round {member.state.round} was not claimed: even a small part of what was trained here makes the loss on the "
        f"probe too large; see whether transcripts fit their recordings, and whether the run's probe is of such speech"
    )


def check_moves(member: Member, largest: float, segments: int) -> None:
    """Would others take a delta whose largest magnitude is this?

    Raises:
        LocalError: a value moved further than the task says that its optimizer can move one.
    """
    limits = largest_values(member)
    if limits is not None and largest > limits[segments - 1]:
        raise LocalError(
            f"round {member.state.round} was trained wrongly: a value moved by {largest:.4g}, and by the task's "
            f"largest_move {segments} segments cannot move one by more than {limits[segments - 1]:.4g}, so that others "
            f"would refuse it; correct the task's segment or its largest_move"
        )


def largest_values(member: Member) -> tuple[float, ...] | None:
    """The most that a value of a decoded delta can be after 1, 2, … segments of the round.

    It follows from the state and the manifest, so that all peers have the same. None if the task states no bound.
    """
    task, rounds = member.task, member.manifest.rounds
    if not isinstance(task, Bounded):
        return None
    in_round = rounds.segments * rounds.steps_per_segment
    first, total = member.state.round * in_round, rounds.rounds * in_round
    counts = range(rounds.steps_per_segment, in_round + 1, rounds.steps_per_segment)
    moves = [task.largest_move(member.state.params, first, steps, total) for steps in counts]
    codec = Layout.of(member.manifest.parameters, member.manifest.averaging).codec
    return tuple(codec.ceiling(SLACK * move) for move in moves)


def resume(member: Member) -> Work | None:
    """The claim that this peer already made for this round, if it was killed or failed after making it."""
    pending = member.journal.pending()
    if pending is None or (pending.round, pending.state) != (member.state.round, member.state.digest):
        return None
    if member.store.find(pending.delta) is None:
        raise LocalError(
            f"the delta of the claim that this peer published for round {member.state.round} is gone from "
            f"{member.store.root}, and a second claim would look like cheating; join again with a new --identity-path"
        )
    work = Work(unseal(pending.claim, Claim), pending.delta, pending.checkpoints)
    member.step("commit", f"round {member.state.round}: publishing the claim made before")
    publish_claim(member, work)
    return work


def publish_claim(member: Member, work: Work) -> None:
    """Put the claim into the directory."""
    member.records.announce_claim(work.claim, member.cohort)
    member.say("claimed", segments=work.claim.message.segments)


# --- average ------------------------------------------------------------------------------------


def wait_for_claims(member: Member) -> set[str] | None:
    """The peers to average with: everybody whose claim is there when all are done or the round closes.

    Returns:
        Their IDs, this peer's among them; None when the round was over before it came to that.
    """
    rounds = member.manifest.rounds
    began = time.time()
    alone_before = False
    pauses = between_looks()
    while True:
        roster = member.records.roster(member.cohort)
        here = member.in_our_round(roster)
        claims = set(member.records.claims(member.view)) - member.shunned
        ready = (claims & set(here)) | {member.peer}
        awaited = here.keys() - claims - member.shunned - member.proved
        training = {p: r for p, r in here.items() if r.stage != "waiting" and p in awaited}
        theirs = min(max((r.closes_at for r in training.values()), default=0.0), began + rounds.max_seconds)
        closes = max(began, member.closes_at, theirs) + rounds.grace_seconds
        closed = time.time() > closes
        alone = len(ready) == 1 and not training
        if len(ready) >= rounds.min_peers and (not training or closed) and (alone_before or not alone):
            return ready
        alone_before = alone  # one look at the directory can miss everybody, two in a row hardly
        if training and not closed:
            member.report.wait(
                f"round {member.state.round}: waiting for {len(training)} peers that still train "
                f"({', '.join(sorted(map(short, training)))}), {closes - time.time():.0f} s at most"
            )
        elif len(ready) < rounds.min_peers:
            missing = rounds.min_peers - len(ready)
            member.report.wait(f"round {member.state.round}: {missing} more claims are needed before averaging")
        if overtaken(member):
            return None
        time.sleep(POLL_SECONDS if alone else next(pauses))


def average(member: Member, work: Work, expected: set[str]) -> Merged:
    """Find a group and merge the deltas of its members."""
    count = min(len(expected), member.manifest.averaging.max_group)
    with_whom = f"with {count - 1} others" if count > 1 else "alone"
    member.step("average", f"round {member.state.round}: averaging {with_whom}")
    delta_bytes = Layout.of(member.manifest.parameters, member.manifest.averaging).total_bytes
    answer = member.link.call(
        "average",
        GROUP_SECONDS + EXCHANGE_PATIENCE * patience(2 * delta_bytes),
        round=member.state.round,
        state=member.state.digest,
        covered=dict(member.state.covered),
        credit=dict(member.view.credit),
        bans=dict(member.state.bans),
        suspended=dict(member.view.suspended),
        guests=dict(member.state.guests),
        bits=member.state.bits,
        claim=work.claim.pack(),
        delta=work.delta,
        reference=store_reference(member),
        limits=largest_values(member),
        expected=sorted(expected),
        shunned=sorted(member.shunned),
        min_size=member.manifest.rounds.min_peers,
        window=GROUP_WINDOW_SECONDS,
        timeout=GROUP_SECONDS,
    )
    return Merged(
        group=answer["group"],
        members=tuple(unseal(data, Claim) for data in answer["members"]),
        receipts=tuple(unseal(data, Receipt, MAX_RECEIPT_BYTES) for data in answer["receipts"]),
        average=answer["average"],
    )


def store_reference(member: Member) -> bytes | None:
    """Put the last round's aggregate where the network process finds it; the codec gives everybody the same bytes.

    Returns:
        Its digest; None if the averaging rule starts from none, and in round 0.
    """
    if not member.state.reference:
        return None
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    reference = Flat(member.state.reference)
    return member.store.put("average", *(layout.codec.encode(reference[cut]) for cut in layout.cuts()), durable=False)


# --- apply --------------------------------------------------------------------------------------


def apply(member: Member, work: Work, merged: Merged, expected: set[str]) -> Averaged:
    """The next state: the outer optimizer's step on the decoded average, less what is undone, and the ledger.

    Raises:
        Reject: its parameters would not be finite, or an undo that the claims agree on is none.
        TransportError: nobody gives that undo.
    """
    member.step("apply", f"round {member.state.round}: applying the average of {len(merged.members)} peers")
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    delta = Decoded(member.store.get(merged.average), layout, member.like)
    section = member.manifest.averaging
    params, moments = outer.step(member.state.params, member.state.moments, delta, section.outer, member.state.round)
    moments = remember(moments, delta, section.rule)
    everybody = [claim.message for claim in merged.members]
    counted = admission.counting(everybody, member.manifest, member.state.standing, member.state.guests)
    if member.peer not in counted:
        member.report.warn(f"round {member.state.round} has no room for this newcomer; its work is not in the average")
    claims = [everybody[at] for at in in_every_part(merged.receipts) if everybody[at].peer in counted]
    undos = agreed_undos(member, claims)
    for undo in undos:
        params = undo.taken_from(params)
    if not all(np.isfinite(value).all() for value in (*params.values(), *moments.values())):
        raise Reject("the average moves the parameters beyond what float32 holds")
    after = advance(member.state, member.manifest, claims, params, moments)
    electorate = frozenset(expected | {claim.peer for claim in everybody})
    return Averaged(after, electorate, work, merged, excised={undo.peer: undo.rounds for undo in undos})


# --- attest -------------------------------------------------------------------------------------


def attest(member: Member, result: Result) -> tuple[Signed[Attestation], ...]:
    """Sign the new state and wait until more than half of the round's peers have signed the same.

    Returns:
        The attestations that make the quorum.

    Raises:
        TransportError: no quorum in time, or one for another result. Our attestation stands, and should the quorum
            come later, the result counts then: to take a vote back could split those who have counted it already.
    """
    after = result.after
    member.step("attest", f"round {member.state.round}: attesting state {after.digest.hex()[:8]}")
    member.store.put("state", *after.pieces)
    publish_attestation(member, after)
    member.unsettled = result
    deadline = time.monotonic() + QUORUM_SECONDS
    compared = False
    pauses = between_looks()
    while True:
        seen = attestations(member)
        others = rivals(member, result, seen)
        if not others <= result.electorate:
            result = member.unsettled = replace(result, electorate=result.electorate | others)
        enough, reason = agreeing(result, seen)
        if enough:
            return attesters(result, seen)
        if isinstance(result, Averaged) and others and not compared:
            compared = True
            compare_receipts(member, result)
        votes = [signed.message for signed in seen.values()]
        other = result_of(member.state.round, member.state.digest, votes, result.electorate)
        if other is not None and other.state != after.parent:  # a mix can lead on by two rounds
            raise TransportError(f"the round ended otherwise: {other.reason}")
        if time.monotonic() > deadline:
            raise TransportError(f"no quorum within {QUORUM_SECONDS:.0f} s: {reason}")
        member.report.wait(f"round {member.state.round}: {reason}; waiting for more")
        time.sleep(next(pauses))


def agreeing(result: Result, seen: dict[str, Signed[Attestation]]) -> tuple[bool, str]:
    """Whether more than half of a round's peers attest this result, and the sentence that says so."""
    votes = [signed.message for signed in seen.values()]
    return quorum(result.after.round, result.after.digest, votes, result.electorate)


def rivals(member: Member, result: Result, seen: dict[str, Signed[Attestation]]) -> set[str]:
    """The peers of the round that made something else of it, also those that this one did not expect to average.

    These have a say too: groups that know nothing of each other could else each reach a quorum of their own.
    """
    before, after = member.state, result.after
    votes = [v for v in (signed.message for signed in seen.values()) if v.at(before.round) == before.digest]
    others = {v.peer for v in votes if v.at(after.round) not in (None, after.digest)}
    if others <= result.electorate:
        return others
    return others & (result.electorate | takers(member))


def compare_receipts(member: Member, result: Averaged) -> None:
    """See whether a reducer told others something else than us, and keep the proof.

    Raises:
        Reject: one did; the round is averaged again without it.
    """
    packed = member.link.call("receipts", RECEIPTS_SECONDS, group=result.merged.group)["receipts"]
    theirs = [unseal(data, Receipt, MAX_RECEIPT_BYTES) for data in packed]
    found = {
        ours.message.peer: Conflict(ours, other)
        for ours in result.merged.receipts
        for other in theirs
        if contradict(ours, other)
    }
    for conflict in found.values():
        convict(member, ConflictProof(conflict), str(conflict))
    if found:
        member.shunned.update(found)
        raise Reject(f"{', '.join(map(short, sorted(found)))} gave members different results")


def attesters(result: Result, seen: dict[str, Signed[Attestation]]) -> tuple[Signed[Attestation], ...]:
    """The attestations that speak for a result."""
    return tuple(s for s in seen.values() if s.message.at(result.after.round) == result.after.digest)


def publish_attestation(member: Member, state: State) -> None:
    """Attest a state in the directory; the state must be in the store, for others will ask for it."""
    line, work = member.line_to(state), float(state.work)
    member.attested = seal(
        member.identity, Attestation(state.run, member.peer, member.ticket, state.round, state.digest, line, work)
    )
    member.attested_in = member.cohort
    member.records.announce_attestation(member.attested, member.cohort)


# --- mix ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contribution:
    """What our cohort brings to a mix; all of its members compute the same.

    Attributes:
        common: the state that all cohorts grew from.
        root: Merkle root over the parts of the encoded delta from there, and the ledger.
    """

    common: State
    root: bytes


def mix_cohorts(member: Member) -> bool:
    """Take part in a round that mixes the cohorts into one state.

    Returns:
        Whether a state was committed; otherwise the next call starts over from the state that holds by then.

    Raises:
        LocalError, TransportError: as :func:`run_round`.
    """
    reasons: list[str] = []
    check_last_round(member)
    member.closes_at = time.time() + member.manifest.rounds.max_seconds
    for attempt in range(ATTEMPTS):
        try:
            ours = contribute(member)
            tally = Tally(member.state.round, ours.common.digest, ours.common.round)
            parts = agree_on_mix(member, ours, tally)
            if parts is None:
                return False
            receipts: tuple[Signed[Receipt], ...] = ()
            if member.cohort.index in {part.index for part in parts}:
                after, receipts = exchange(member, ours, tally, parts, alone=attempt > 0)
            else:
                after = catch_up(member, ours, tally)
            mates = tally.stated[member.cohort.index]
            voters = {peer for peer, mix in mates.items() if mix.state == member.state.digest}
            result = Mixed(after, frozenset(voters | {member.peer}), receipts)
            seen = attest(member, result)
        except (TransportError, RemoteError) as error:
            reasons.append(str(error))
            member.report.warn(f"round {member.state.round}: the cohorts are not mixed yet: {error}")
            if overtaken(member):
                return False
            continue
        conclude(member, result, seen)
        return True
    raise RoundFailed(f"round {member.state.round} was not mixed in {ATTEMPTS} attempts: {reasons[-1]}")


def contribute(member: Member) -> Contribution:
    """Encode what our cohort has learned since the last mix, and give it to others from now on."""
    state, name = member.state, member.cohort.name
    member.step("commit", f"round {state.round}: offering what cohort {name} has learned since the last mix")
    member.say("mixing")
    common = common_state(member)
    encoded = write_delta(member, common.params, state.params)
    root = member.link.call(
        "contribute",
        CONTRIBUTE_SECONDS,
        round=state.round,
        cohort=(state.bits, member.cohort.index),
        delta=encoded.digest,
        ledger=mixing.ledger_since(state, common).pack(member.manifest),
    )["root"]
    return Contribution(common, root)


def common_state(member: Member) -> State:
    """The state that all cohorts grew from; fetched by a peer that came later."""
    digest = member.state.common
    if member.store.find(digest) is None:
        peers = member.records.roster(member.cohort)
        return syncing.fetch_state(member.link, member.store, member.manifest, member.like, digest, peers)
    return parse_state(member.store.get(digest), member.manifest, member.like)


def agree_on_mix(member: Member, ours: Contribution, tally: Tally) -> tuple[Part, ...] | None:
    """Wait until more than half of all peers want to mix the same cohorts.

    A cohort that is late is waited for as long as a round may take.

    Returns:
        What these cohorts contribute; nothing if others have mixed without ours; None when our cohort has a result.
    """
    number, rounds = member.state.round, member.manifest.rounds
    member.step("mix", f"round {number}: agreeing with the other cohorts on what is mixed")
    mix = state_mix(member, stated_before(member, ours))
    deadline = time.time() + rounds.max_seconds + rounds.grace_seconds
    pauses = between_looks()
    while True:
        look_at_cohorts(member, tally)
        decided, better = mixing.decide(tally.votes)
        parts = None if decided is None else tally.named(decided)
        if parts is not None:
            return parts
        if tally.result() is not None:
            return ()
        if mix.chosen == NO_CHOICE and (not tally.missing or time.time() > deadline):
            mix = state_mix(member, _vote(mix, tally.parts, ours.common))
        elif better is not None and (named := tally.named(better)) is not None and better != mix.chosen:
            mix = state_mix(member, _vote(mix, named, ours.common))
        if overtaken(member):
            return None
        late = f", {len(tally.missing)} cohorts are late" if tally.missing else ""
        member.report.wait(
            f"round {number}: {sum(map(any, tally.votes.values()))} of {len(tally.votes)} peers voted{late}"
        )
        time.sleep(next(pauses) * (1 << member.state.bits))


def stated_before(member: Member, ours: Contribution) -> Mix:
    """What this peer stated about this mix before it was killed or failed, for votes are final; at first, no vote."""
    packed, state = member.journal.stated(), member.state
    mix = Mix(
        run=state.run,
        peer=member.peer,
        ticket=member.ticket,
        round=state.round,
        state=state.digest,
        common=ours.common.digest,
        root=ours.root,
        serves=not member.client_mode,
        cohorts=(),
        chosen=NO_CHOICE,
    )
    if packed is None:
        return mix
    before = unseal(packed, Mix).message
    return before if replace(before, cohorts=(), chosen=NO_CHOICE) == mix else mix


def _vote(mix: Mix, parts: tuple[Part, ...], common: State) -> Mix:
    indices = tuple(part.index for part in parts)
    return replace(mix, cohorts=indices, chosen=mixing.choice(common.digest, parts))


def state_mix(member: Member, mix: Mix) -> Mix:
    """Publish what this peer states about the mix, on disk first."""
    signed = seal(member.identity, mix)
    member.journal.state_mix(signed.pack())
    member.records.announce_mix(signed, member.cohort)
    return mix


def look_at_cohorts(member: Member, tally: Tally) -> None:
    """Read what cohorts state about the mix, and who is in those of which no part is agreed yet."""
    bits = member.state.bits
    missing = {*tally.missing, *(set(range(1 << bits)) - tally.attesters.keys())}

    def read(cohort: Cohort) -> None:
        if cohort.index in missing:
            seen = attested_in(member, cohort)
            seen = _with_ours(member, seen) if cohort == member.cohort else seen
            tally.see_attestations(cohort.index, (signed.message for signed in seen.values()))
        tally.see_mixes(cohort.index, mixes_in(member, cohort))

    at_once(read, [Cohort(bits, index) for index in range(1 << bits)])


def mixes_in(member: Member, cohort: Cohort) -> list[Mix]:
    """What those who take part state about the mix under way in a cohort."""
    mixes = member.records.mixes(cohort, member.state.round)
    return list(member.admitted({peer: signed.message for peer, signed in mixes.items()}).values())


def exchange(
    member: Member, ours: Contribution, tally: Tally, parts: tuple[Part, ...], *, alone: bool
) -> tuple[State, tuple[Signed[Receipt], ...]]:
    """Mix the cohorts' deltas together with our mates, and apply the mean to the common state.

    Args:
        alone: whether this peer computes all of it by itself, because together it did not come to the same.

    Returns:
        The mixed state, and what mates stated of the shares that they reduced.
    """
    number, common = member.state.round, ours.common
    member.step("average", f"round {number}: mixing {len(parts)} cohorts")
    givers = {part.index: sorted(givers_of(tally, part)) for part in parts}
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    answer = member.link.call(
        "mix",
        EXCHANGE_PATIENCE * patience((2 + len(parts)) * layout.total_bytes if alone else 4 * layout.total_bytes),
        name=mixing.choice(common.digest, parts),
        round=number,
        since=common.round,
        state=member.state.digest,
        cohort=(member.state.bits, member.cohort.index),
        sources=[(part.index, part.state, part.root, givers[part.index]) for part in parts],
        mates=[member.peer] if alone else givers[member.cohort.index],
    )
    ledgers = [
        Ledger.unpack(data, member.manifest, Cohort(member.state.bits, part.index), number - common.round)
        for data, part in zip(answer["ledgers"], parts, strict=True)
    ]
    delta = Decoded(member.store.get(answer["average"]), layout, member.like)
    after = mixing.mixed(common, member.manifest, number, [part.state for part in parts], ledgers, delta)
    receipts = tuple(unseal(data, Receipt, MAX_RECEIPT_BYTES) for data in answer["receipts"])
    return _finite(after), receipts


def givers_of(tally: Tally, part: Part) -> set[str]:
    """The members of a cohort that others can get its part from."""
    stated = tally.stated[part.index].items()
    return {peer for peer, mix in stated if mix.serves and (mix.state, mix.root) == (part.state, part.root)}


def catch_up(member: Member, ours: Contribution, tally: Tally) -> State:
    """What our cohort makes of a mix that others made without it.

    Raises:
        TransportError: they are not done yet.
        Reject: what they attest is no mixed state.
    """
    number = member.state.round
    deadline = time.monotonic() + GROUP_SECONDS
    while (result := tally.result()) is None:
        if time.monotonic() > deadline:
            raise TransportError("others mix without this cohort, and have not attested a result yet")
        time.sleep(POLL_SECONDS)
        tally.attesters.clear()
        look_at_cohorts(member, tally)
    holders = [peer for peer, state in tally.results.items() if state == result]
    member.report.wait(f"others have mixed without cohort {member.cohort.name}; fetching their state")
    mixed = syncing.fetch_state(member.link, member.store, member.manifest, member.like, result, holders)
    if mixed.round != number + 1 or not mixed.is_common:
        raise Reject(f"state {result.hex()[:8]}, which others attest, is no mixed state")
    return _finite(mixing.caught_up(member.state, ours.common, mixed, member.manifest))


def _finite(state: State) -> State:
    """The state, if all of its values are finite.

    Raises:
        Reject: they are not.
    """
    if not all(np.isfinite(value).all() for value in state.params.values()):
        raise Reject("the mix moves the parameters beyond what float32 holds")
    return state


def settle_mix(member: Member, result: Mixed, seen: tuple[Signed[Attestation], ...]) -> None:
    """A mix is committed: keep its record, hold its state, and say so."""
    finished, cohort, after = member.state.round, member.cohort, result.after
    record = MixRecord(
        run=after.run,
        round=finished,
        before=member.state.digest,
        after=after.digest,
        next_round=after.round,
        covered=after.covered,
        credit=after.credit,
        bans=after.bans,
        strikes=after.strikes,
        bits=after.bits,
        guests=dict(after.guests),
        receipts=result.receipts,
        attestations=seen,
    )
    member.journal.record(finished, record.pack())
    hold(member, after)
    member.fresh = False
    try:
        offer(member)
    except TransportError as error:  # the mix stands all the same; it is offered again before the next round
        member.report.warn(f"what was claimed in the last rounds is not open to others: {error}")
    member.report.emit(
        "mix",
        f"round {finished} is done: cohort {cohort.name} mixed with the others, state {after.digest.hex()[:8]}, "
        f"{1 << after.bits} cohorts from now on",
        round=finished,
        state=after.digest,
        cohort=cohort.name,
        bits=after.bits,
        work=after.work,
    )


# --- audit --------------------------------------------------------------------------------------


def conclude(member: Member, result: Result, seen: tuple[Signed[Attestation], ...]) -> None:
    """Enough peers attest a result: it is committed."""
    if isinstance(result, Averaged):
        audit(member, result, seen)
        settle(member, result)
    elif isinstance(result, Mixed):
        settle_mix(member, result, seen)


def audit(member: Member, result: Averaged, seen: tuple[Signed[Attestation], ...]) -> None:
    """Check the round's record once more as a stranger would, and keep it."""
    member.step("audit", f"round {member.state.round}: checking the round's record")
    merged = result.merged
    record = RoundRecord(
        run=member.state.run,
        round=member.state.round,
        before=member.state.digest,
        after=result.after.digest,
        group=merged.group,
        members=merged.members,
        receipts=merged.receipts,
        average=merged.average,
        attestations=seen,
    )
    packed = record.pack()
    check_record(RoundRecord.unpack(packed), member.view, member.store.get(merged.average))
    member.journal.record(member.state.round, packed)


def settle(member: Member, result: Averaged) -> None:
    """The round is committed: hold its state, keep what may be asked for, let the rest go, and say so."""
    finished, after, work = member.state.round, result.after, result.work
    banned = sorted(after.bans.keys() - member.state.bans.keys())
    fresh = sorted(peer for peer, (_, last) in after.strikes.items() if last == finished)
    hold(member, after)
    member.fresh = False
    retention = member.manifest.retention.checkpoint_rounds
    kept = work.claim.pack(), work.delta, work.checkpoints, result.merged.average
    retain_traces(member.journal, member.store, finished, *kept, retention)
    member.store.retain("undo", set(undone(claim.message for claim in result.merged.members).values()))
    peers = [claim.message.peer for claim in result.merged.members]
    try:
        offer(member)
        roster = member.records.roster(member.cohort)
        member.journal.remember_peers(tuple(a for r in roster.values() for a in r.addresses)[:32])
        status = member.link.call("status", STATUS_SECONDS)
        member.traffic = {name: status[name] for name in member.traffic}
    except TransportError as error:  # the round stands all the same
        member.report.warn(f"what was sent in round {finished} is not counted: {error}")
    member.report.emit(
        "round",
        f"round {finished} is done: state {after.digest.hex()[:8]}, {len(peers)} peers, "
        f"{after.work:.0f} s of audio so far, {member.traffic['bytes_sent'] / 1e6:.1f} MB sent"
        + (f"; banned for proved cheating: {', '.join(map(short, banned))}" if banned else "")
        + (f"; strikes for withholding or a false proof: {', '.join(map(short, fresh))}" if fresh else "")
        + "".join(f"; {taken_out(peer, rounds)}" for peer, rounds in result.excised.items()),
        round=finished,
        state=after.digest,
        peers=peers,
        banned=banned,
        struck=fresh,
        excised=sorted(result.excised),
        epoch=after.epoch,
        work=after.work,
        bytes_opened=member.opened,
        **member.traffic,
    )
