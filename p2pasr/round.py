"""One round, told from top to bottom: sync → assign → train → commit → average → apply → attest → audit.

Every step is a function of this file that calls into its room. Whatever fails before a round is
committed leaves the state untouched, and says why.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import numpy as np

from p2pasr import __version__
from p2pasr.auditing import check_last_round, convict, hear, offer
from p2pasr.averaging import outer
from p2pasr.averaging.codec import Decoded, Flat, Layout
from p2pasr.averaging.merkle import Tree
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.rules import norm
from p2pasr.errors import LocalError, NonFiniteStep, Reject, RemoteError, RoundFailed, TransportError
from p2pasr.having import fetch_shards, shard_path
from p2pasr.peers import sync as syncing
from p2pasr.peers.blobs import BlobStore, file_digest
from p2pasr.peers.identity import Identity
from p2pasr.peers.journal import Journal, Pending
from p2pasr.peers.link import Link
from p2pasr.peers.records import Records
from p2pasr.peers.streams import patience
from p2pasr.protocol.agreement import Agreement, quorum, result_of
from p2pasr.protocol.assignment import assign
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import (
    MAX_AGAINST,
    MAX_ANCESTORS,
    MAX_RECEIPT_BYTES,
    Attestation,
    Charge,
    Claim,
    Receipt,
    Roster,
    Signed,
    Stage,
    seal,
    unseal,
)
from p2pasr.protocol.rules import RoundView
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, advance, remember
from p2pasr.protocol.tensors import Tensors
from p2pasr.report import Report
from p2pasr.tasks.base import Bounded, Checkpoint, OnStep, SegmentPlan, Task
from p2pasr.verify.conflict import Conflict, contradict
from p2pasr.verify.evidence import ConflictProof
from p2pasr.verify.record import RoundRecord, check_record, in_every_part
from p2pasr.verify.trace import Trace, retain_traces

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

STATUS_SECONDS: Final = 20.0


@dataclass
class Member:
    """A peer of one run, with everything that its rounds need.

    Attributes:
        like: the initial parameters, for names and shapes.
        state: what this peer holds; replaced only by a committed round or by the state that holds.
        lineage: digests of the states that `state` grew from, the newest first, as far as they are known.
        attested: this peer's current attestation, None before its first.
        unsettled: what this peer made of the round and attests, while not enough others do.
        fresh: whether it fetched or loaded its state instead of taking part in the round before.
        closes_at: when this peer's training of the round ends at the latest, seconds since 1970.
        proved: peers that this one has seen proved to cheat.
        shunned: those that gave members of this round different results; it is averaged without them.
        charges: where the proofs that this peer holds can be had, by the accused.
        heard: digests of the proofs that it has looked at.
        slanderers: peers that offered a proof which proves nothing.
        whole: shards whose bytes this process has compared with their digests.
        traffic: bytes sent and received, and connections open, when last counted.
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
    lineage: tuple[bytes, ...] = field(default=(), init=False)
    attested: Signed[Attestation] | None = None
    unsettled: Result | None = None
    fresh: bool = True
    closes_at: float = 0.0
    proved: set[str] = field(default_factory=set)
    shunned: set[str] = field(default_factory=set)
    charges: dict[str, Charge] = field(default_factory=dict)
    heard: set[bytes] = field(default_factory=set)
    slanderers: set[str] = field(default_factory=set)
    whole: set[bytes] = field(default_factory=set)
    traffic: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("bytes_sent", "bytes_received", "connections"), 0)
    )

    def __post_init__(self) -> None:
        self.lineage = self.line_to(self.state)
        self._view = _view(self.manifest, self.state)

    @property
    def peer(self) -> str:
        """This peer's ID."""
        return self.identity.peer

    @property
    def view(self) -> RoundView:
        """What the rules judge this round's records against."""
        if self._view.state != self.state.digest:
            self._view = _view(self.manifest, self.state)
        return self._view

    def line_to(self, state: State) -> tuple[bytes, ...]:
        """Digests of the states that a state grew from, the newest first, as far as they are known here."""
        if state.digest == self.state.digest and self.lineage:
            return self.lineage
        if state.parent == self.state.digest:
            return (self.state.digest, *self.lineage)[:MAX_ANCESTORS]
        return (state.parent,) if state.round > 0 else ()

    def in_our_round(self, roster: Mapping[str, Roster]) -> dict[str, Roster]:
        """Those of a roster who work on the same round from the same state."""
        ours = (self.state.round, self.state.digest)
        present = {peer: entry for peer, entry in roster.items() if peer not in self.state.bans}
        return {peer: entry for peer, entry in present.items() if (entry.round, entry.state) == ours}

    def say(self, stage: Stage, segments: int = 0) -> None:
        """Tell the others what this peer does now."""
        self.records.announce_roster(
            Roster(
                run=self.state.run,
                peer=self.peer,
                round=self.state.round,
                state=self.state.digest,
                stage=stage,
                segments=segments,
                closes_at=self.closes_at,
                client_mode=self.client_mode,
                hardware=self.task.hardware_class[:128],
                version=__version__,
                addresses=self.link.maddrs[:8],
            )
        )

    def step(self, name: str, message: str) -> None:
        """Report that a step of the round begins."""
        self.report.emit("step", message, step=name, round=self.state.round, state=self.state.digest)


def _view(manifest: RunManifest, state: State) -> RoundView:
    return RoundView(manifest, state.run, state.round, state.digest, state.covered, state.credit, state.bans)


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
    """What a peer made of a round: the next state, how it came about, and who must agree before it counts."""

    after: State
    work: Work
    merged: Merged
    electorate: frozenset[str]


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
    if not ready_to_train(member):
        return False
    work = resume(member)
    if work is None:
        checked = check_last_round(member)
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
        audit(member, result, attestations)
        settle(member, result)
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
    seen = attestations(member)
    late = member.unsettled
    if late is not None and agreeing(late, seen)[0]:
        member.unsettled = None
        member.report.emit("late", f"round {member.state.round}: enough peers attest its result by now")
        audit(member, late, attesters(late, seen))
        settle(member, late)
        return True
    agreement = what_holds(member, seen)
    if agreement is not None:
        member.report.wait(f"{agreement.reason}; fetching it")
        votes = [signed.message for signed in seen.values()]
        hold(member, syncing.adopt(member.link, member.store, member.manifest, member.like, agreement, votes))
        member.fresh = True
    if member.attested is None or member.attested.message.at(member.state.round) != member.state.digest:
        publish_attestation(member, member.state)
    return False


def attestations(member: Member) -> dict[str, Signed[Attestation]]:
    """What everybody attests now, this peer too if it has said anything since it started."""
    seen = member.records.attestations(member.manifest)
    seen = {peer: signed for peer, signed in seen.items() if peer not in member.state.bans}
    if member.attested is not None:
        seen[member.peer] = member.attested
    return seen


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
    working = {p for p, r in member.in_our_round(member.records.roster()).items() if r.stage != "waiting"}
    if member.unsettled is not None or time.time() < member.closes_at + member.manifest.rounds.grace_seconds:
        working.add(member.peer)
    return working | set(member.records.claims(member.view))


def hold(member: Member, state: State) -> None:
    """Make a state ours, on disk first."""
    member.store.put("state", *state.pieces)
    member.journal.hold(state.round, state.digest)
    member.lineage = member.line_to(state)
    member.state = state
    member.unsettled = None
    member.closes_at = 0.0
    member.shunned.clear()
    kept = sorted(member.journal.held().items())[-member.manifest.retention.state_rounds :]
    member.store.retain("state", {digest for _, digest in kept})


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


def ready_to_train(member: Member) -> bool:
    """Whether there are peers enough and the round is still at its beginning; waits a while for both.

    Raises:
        LocalError: this peer was banned.
    """
    if member.peer in member.state.bans:
        raise LocalError(
            f"this peer was banned from the run in round {member.state.bans[member.peer]}: more than half of the "
            f"round's peers hold a proof that it cheated; see the run's evidence folder of any of them"
        )
    rounds = member.manifest.rounds
    started = time.monotonic()
    waiting = False
    pauses = between_looks()
    while True:
        roster = member.records.roster()
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
    """This peer's shards for the round, fetched."""
    shards = assign(member.manifest, member.state.digest, member.state.covered, member.peer)
    member.step("assign", f"round {member.state.round}: {len(shards)} shards")
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
    trace = Trace(member.store, member.state.run, member.state.round, member.peer)
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
    encoded = write_delta(member, end)
    check_moves(member, encoded.largest, len(losses))
    rounds = member.manifest.rounds
    steps = len(losses) * rounds.steps_per_segment
    hear(member)
    claim = seal(
        member.identity,
        Claim(
            run=member.state.run,
            peer=member.peer,
            round=member.state.round,
            state=member.state.digest,
            shards=shards,
            segments=len(losses),
            steps=steps,
            samples=steps * rounds.samples_per_step,
            trace_root=trace.root,
            delta_root=Tree("delta", member.state.run, member.state.round, member.peer).root(encoded.parts),
            delta_norm=encoded.norm,
            loss_before=losses[0],
            loss_after=losses[-1],
            hardware=member.task.hardware_class[:128],
            against=tuple(sorted(member.proved - member.state.bans.keys())[:MAX_AGAINST]),
        ),
    )
    work = Work(claim, encoded.digest, tuple(trace.checkpoints))
    member.journal.pend(Pending(member.state.round, member.state.digest, claim.pack(), work.delta, work.checkpoints))
    publish_claim(member, work)
    return work


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


def write_delta(member: Member, end: Checkpoint) -> Encoded:
    """Encode what training changed into a blob, part by part."""
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    before, after = Flat(member.state.params), Flat(end.params)
    digests: list[bytes] = []
    squares = largest = 0.0
    member.store.make_room(layout.total_bytes)
    path = member.store.scratch("delta")
    try:
        with PartFile(path, layout) as file:
            for index, cut in enumerate(layout.cuts()):
                vector = after[cut] - before[cut]
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
    member.records.announce_claim(work.claim)
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
        roster = member.records.roster()
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
        credit=dict(member.state.credit),
        bans=dict(member.state.bans),
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


def apply(member: Member, work: Work, merged: Merged, expected: set[str]) -> Result:
    """The next state: the outer optimizer's step on the decoded average, the ledger over its claims.

    Raises:
        Reject: its parameters would not be finite.
    """
    member.step("apply", f"round {member.state.round}: applying the average of {len(merged.members)} peers")
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    delta = Decoded(member.store.get(merged.average), layout, member.like)
    section = member.manifest.averaging
    params, moments = outer.step(member.state.params, member.state.moments, delta, section.outer, member.state.round)
    moments = remember(moments, delta, section.rule)
    if not all(np.isfinite(value).all() for value in (*params.values(), *moments.values())):
        raise Reject("the average moves the parameters beyond what float32 holds")
    claims = [merged.members[position].message for position in in_every_part(merged.receipts)]
    after = advance(member.state, member.manifest, claims, params, moments)
    return Result(after, work, merged, frozenset(expected | {claim.message.peer for claim in merged.members}))


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
        enough, reason = agreeing(result, seen)
        if enough:
            return attesters(result, seen)
        if not compared and differ(result, seen):
            compared = True
            compare_receipts(member, result)
        votes = [signed.message for signed in seen.values()]
        other = result_of(member.state.round, member.state.digest, votes, result.electorate)
        if other is not None:
            raise TransportError(f"the round ended otherwise: {other.reason}")
        if time.monotonic() > deadline:
            raise TransportError(f"no quorum within {QUORUM_SECONDS:.0f} s: {reason}")
        member.report.wait(f"round {member.state.round}: {reason}; waiting for more")
        time.sleep(next(pauses))


def agreeing(result: Result, seen: dict[str, Signed[Attestation]]) -> tuple[bool, str]:
    """Whether more than half of a round's peers attest this result, and the sentence that says so."""
    votes = [signed.message for signed in seen.values()]
    return quorum(result.after.round, result.after.digest, votes, result.electorate)


def differ(result: Result, seen: dict[str, Signed[Attestation]]) -> bool:
    """Whether somebody made something else of the round."""
    before, after = result.after.parent, result.after
    votes = [signed.message for peer, signed in seen.items() if peer in result.electorate]
    return any(vote.at(after.round) not in (None, after.digest) for vote in votes if vote.at(after.round - 1) == before)


def compare_receipts(member: Member, result: Result) -> None:
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
    member.attested = seal(
        member.identity,
        Attestation(state.run, member.peer, state.round, state.digest, member.line_to(state), float(state.work)),
    )
    member.records.announce_attestation(member.attested)


# --- audit --------------------------------------------------------------------------------------


def audit(member: Member, result: Result, seen: tuple[Signed[Attestation], ...]) -> None:
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


def settle(member: Member, result: Result) -> None:
    """The round is committed: hold its state, keep what may be asked for, let the rest go, and say so."""
    finished, after, work = member.state.round, result.after, result.work
    banned = sorted(after.bans.keys() - member.state.bans.keys())
    hold(member, after)
    member.fresh = False
    retention = member.manifest.retention.checkpoint_rounds
    retain_traces(member.journal, member.store, finished, work.claim.pack(), work.delta, work.checkpoints, retention)
    member.store.retain("average", {result.merged.average})
    peers = [claim.message.peer for claim in result.merged.members]
    try:
        offer(member)
        member.journal.remember_peers(tuple(a for r in member.records.roster().values() for a in r.addresses)[:32])
        status = member.link.call("status", STATUS_SECONDS)
        member.traffic = {name: status[name] for name in member.traffic}
    except TransportError as error:  # the round stands all the same
        member.report.warn(f"what was sent in round {finished} is not counted: {error}")
    member.report.emit(
        "round",
        f"round {finished} is done: state {after.digest.hex()[:8]}, {len(peers)} peers, "
        f"{after.work:.0f} s of audio so far, {member.traffic['bytes_sent'] / 1e6:.1f} MB sent"
        + (f"; banned for proved cheating: {', '.join(map(short, banned))}" if banned else ""),
        round=finished,
        state=after.digest,
        peers=peers,
        banned=banned,
        epoch=after.epoch,
        work=after.work,
        **member.traffic,
    )
