"""One round, told from top to bottom: sync → assign → train → commit → average → apply → attest → audit.

A swarm that is too large for one group goes through its rounds in cohorts, and every so often a round
is a mix of them instead, which `cohort_mix` tells.

Every step is a function of this file that calls into its room; how peers agree on a state is in `agreeing`,
what a delta is made of in `deltas`. Whatever fails before a round is committed leaves the state untouched, and
says why.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from p2pasr.accusing import expose, hear
from p2pasr.agreeing import (
    ATTEMPTS,
    EXCHANGE_PATIENCE,
    GROUP_SECONDS,
    POLL_SECONDS,
    agreeing,
    attest,
    attestations_around,
    attesters,
    between_looks,
    claims_shown,
    compare_claims,
    hold,
    overtaken,
    publish_attestation,
    tell_what_is_left,
    what_holds,
)
from p2pasr.auditing import check_last_round, offer
from p2pasr.averaging import outer
from p2pasr.averaging.codec import Decoded, Flat, Layout
from p2pasr.averaging.merkle import Tree
from p2pasr.cohort_mix import mix_cohorts, settle_mix
from p2pasr.deltas import check_moves, largest_values, write_delta, write_private_delta
from p2pasr.errors import LocalError, NonFiniteStep, P2pasrError, Reject, RemoteError, RoundFailed, TransportError
from p2pasr.excision import agreed_undos, taken_out, undos_of
from p2pasr.having import fetch_shards, shard_path
from p2pasr.member import Averaged, Member, Merged, Mixed, Result, Work
from p2pasr.peers import sync as syncing
from p2pasr.peers.journal import Pending
from p2pasr.peers.streams import patience
from p2pasr.private import require_shards
from p2pasr.protocol import admission
from p2pasr.protocol.messages import (
    MAX_AGAINST,
    MAX_RECEIPT_BYTES,
    Attestation,
    Claim,
    Receipt,
    Signed,
    seal,
    unseal,
)
from p2pasr.protocol.private import conceal, counted_seconds, draw
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import advance, mix_due, remember, undone
from p2pasr.protocol.tiers import EVERY
from p2pasr.tasks.base import Checkpoint, OnStep, SegmentPlan
from p2pasr.verify.record import RoundRecord, check_record, in_every_part
from p2pasr.verify.trace import Trace, retain_traces
from p2pasr.withholding import ask_again

QUIET_SECONDS: Final = 3.0
"""Peers finish a round within moments of each other; only a longer wait is worth a sentence."""

AHEAD_SECONDS: Final = 10.0
"""How long a peer that is alone in its round gives others, who say that they are further, to show it."""

PATIENCE_SECONDS: Final = 30.0
"""How long one wait lasts before the round is looked at afresh from its first step."""

GROUP_WINDOW_SECONDS: Final = 8.0
"""How long a leader waits for peers that were expected but do not come."""


VOTE_ROUNDS: Final = 2
"""In how many rounds a peer names another for a strike: not all see in the same one what it did."""

STATUS_SECONDS: Final = 20.0

SHARE_OF_GRACE: Final = 0.5
"""So much of `grace_seconds` is spent on proofs of others before a claim, which must be there when they are over."""

LEAST_HEARING_SECONDS: Final = 5.0
"""What that may take in runs with a short grace."""


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
            expose(member)
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
    check_not_banned(member)


def check_not_banned(member: Member) -> None:
    """Has this peer been caught?

    Raises:
        LocalError: it has.
    """
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
        resuming = member.journal.claimed(member.state.round, member.state.digest) is not None
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
        shards = member.view.assigned(member.peer, member.tier)
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
    hear(member, hearing_seconds(member))
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
            tier=member.tier if member.private is None else EVERY,
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


def hearing_seconds(member: Member) -> float:
    """How long proofs of others are waited for before a claim."""
    return max(LEAST_HEARING_SECONDS, SHARE_OF_GRACE * member.manifest.rounds.grace_seconds)


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


def resume(member: Member) -> Work | None:
    """The claim that this peer made from this state before it was killed, or failed, or followed others for a while."""
    pending = member.journal.claimed(member.state.round, member.state.digest)
    if pending is None:
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
        claims = set(claims_shown(member)) - member.shunned
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
    member.grouped = False
    answer = member.link.call(
        "average",
        GROUP_SECONDS + EXCHANGE_PATIENCE * patience(2 * delta_bytes),
        needless=lambda: not member.grouped and overtaken(member),
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
    compare_claims(member, merged.members)
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    delta = Decoded(member.store.get(merged.average), layout, member.like)
    section = member.manifest.averaging
    params, moments = outer.step(member.state.params, member.state.moments, delta, section.outer, member.state.round)
    moments = remember(moments, delta, section.rule)
    everybody = [claim.message for claim in merged.members]
    counted = admission.counting(everybody, member.manifest, member.state.standing, member.state.guests)
    if member.peer not in counted:
        member.report.warn(f"round {member.state.round} has no room for this newcomer; its work is not in the average")
    voters = [claim for claim in everybody if claim.peer in counted]
    undos = agreed_undos(member, voters)
    for undo in undos:
        params = undo.taken_from(params)
    if not all(np.isfinite(value).all() for value in (*params.values(), *moments.values())):
        raise Reject("the average moves the parameters beyond what float32 holds")
    whole = [everybody[at] for at in in_every_part(merged.receipts) if everybody[at].peer in counted]
    after = advance(member.state, member.manifest, whole, params, moments, voters)
    electorate = frozenset(expected | {claim.peer for claim in everybody})
    return Averaged(after, electorate, work, merged, excised={undo.peer: undo.rounds for undo in undos})


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
        bytes_opened_parts=member.opened_parts,
        **member.traffic,
    )


def check_the_end(member: Member) -> None:
    """Check the last round that this peer was in: whoever cheated in it is proved to, although no round bans it."""
    try:
        check_last_round(member)
        hear(member, hearing_seconds(member))
    except P2pasrError as error:  # what was merged stands all the same
        member.report.warn(f"not all of the last round is checked: {error}")
