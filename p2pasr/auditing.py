"""The audit step: do again what was drawn of the others' last round, keep proofs, believe nobody else's unread.

It comes before a peer trains, so that what it finds is in its next claim; for every segment that it
trains again it trains one less of its own, and so nobody waits for an auditor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final

from p2pasr.accusing import convict, hear
from p2pasr.averaging.codec import Layout
from p2pasr.canonical import settle
from p2pasr.errors import RemoteError, TransportError
from p2pasr.peers.streams import patience
from p2pasr.protocol.audits import Drawing, Duty
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import MAX_FINDINGS, Audit, Claim, Commitment, Finding, Signed, commit_to, seal, unseal
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, parse_state
from p2pasr.rerunning import fetch, judge_of, max_checkpoint_bytes, train_again
from p2pasr.verify.evidence import (
    LinkProof,
    Opening,
    ProbeProof,
    ReductionProof,
    SegmentProof,
    compare_ends,
    delta_of,
    reduce_again,
)
from p2pasr.verify.openings import prove_part
from p2pasr.verify.record import RoundRecord, read_record
from p2pasr.waits import ENDLESS, NotDone, Waits, seconds_of, within

if TYPE_CHECKING:
    from p2pasr.member import Member

OPEN_SECONDS: Final = 60.0
"""How long an opening, or one part of a delta, may take."""

SHARE_OF_HEARING: Final = 0.25
"""So much of the time that a step may wait is spent on proofs of others before it, at most."""

MAX_ERROR: Final = 1e15
"""What stands for an infinite error in a record."""

NOTHING: Final = bytes(32)


def offer(member: Member) -> None:
    """Open what this peer's claims of the last rounds committed to, to those who may see it."""
    offers, records = [], set()
    for number, trace in sorted(kept_traces(member).items()):
        packed = bytes.fromhex(trace["claim"])
        fresh = number == member.state.round - 1
        kept = member.journal.read_record(number)
        if kept is not None:
            records.add(member.store.put("record", kept, durable=False))
        record = _trained(kept)
        claim = unseal(packed, Claim)
        drawing = drawing_of(member.manifest, record, member.state) if fresh and record is not None else None
        offers.append(
            {
                "claim": packed,
                "checkpoints": [bytes.fromhex(digest) for digest in trace["checkpoints"]],
                "delta": bytes.fromhex(trace["delta"]),
                "drawn": _drawn(drawing, claim) if fresh else None,
                "link": None if drawing is None else drawing.link_checker(claim),
                "readers": _readers(member, record),
                "record": None if kept is None else blob_digest(kept),
            }
        )
    member.store.retain("record", records)
    member.link.call("offer", OPEN_SECONDS, offers=offers)
    member.link.call("ban", OPEN_SECONDS, peers=sorted(member.state.bans))


def _readers(member: Member, record: RoundRecord | None) -> list[str] | None:
    """Who may have the delta of a round: those who were in it if it was made of private shards, or else everybody.

    Where this peer has no record of the round, because it was merged without it, these are all of whom work was merged.
    """
    if member.manifest.data.policy != "private":
        return None
    return sorted(member.state.credit) if record is None else [each.message.peer for each in record.members]


def kept_traces(member: Member) -> dict[int, dict[str, Any]]:
    """The journal's traces, with that of a claim that was merged while this peer was away."""
    traces, pending = member.journal.traces(), member.journal.pending()
    if pending is not None and pending.round < member.state.round and pending.round not in traces:
        traces[pending.round] = {
            "claim": pending.claim.hex(),
            "delta": pending.delta.hex(),
            "average": "",
            "checkpoints": [digest.hex() for digest in pending.checkpoints],
        }
        member.journal.keep_traces(traces)
    return traces


def drawing_of(manifest: RunManifest, record: RoundRecord, after: State) -> Drawing:
    """Who checks what of a round.

    Args:
        after: the state that came of it.
    """
    return Drawing(manifest.verify, record.after, record.members, after.strikes, manifest.clip_lengths)


def _drawn(drawing: Drawing | None, claim: Signed[Claim]) -> dict[str, list[int]]:
    """Auditor → the segments of this peer's claim that were drawn for it."""
    if drawing is None:
        return {}
    return {auditor: [duty.item] for auditor, duty in drawing.auditors(claim).items()}


def check_last_round(member: Member) -> int:
    """Do what was drawn for this peer of the round before, once; returns how many segments were trained again."""
    offer(member)
    seconds = seconds_of(member.manifest.rounds)
    hear(member, SHARE_OF_HEARING * seconds)
    record = record_of(member, member.state.round - 1)
    if record is None or record.after != member.state.digest or member.checked == record.after:
        return 0
    member.checked = record.after
    drawing = drawing_of(member.manifest, record, member.state)
    private = member.manifest.data.policy == "private"
    segments = drawing.segments(member.peer)
    links = () if private else drawing.links(member.peer)
    parts = drawing.parts(record.receipts, member.peer)
    if not (segments or links or parts):
        return 0
    findings: list[Finding] = []
    done = 0
    waits = Waits(seconds)
    before = parse_state(member.store.get(record.before), member.manifest, member.like)
    for duty in segments:
        if _is_settled(member, duty.peer):
            continue
        claim = next(each for each in record.members if each.digest == duty.statement)
        began = time.monotonic()
        if private:
            with excused(member, "delta", duty.peer):
                findings.append(tell(member, check_on_probe(member, claim, waits), "probe", began))
            continue
        if not member.can_train(claim.message):  # it claimed in another tier than it was started with since
            continue
        done += 1
        with excused(member, "segment", duty.peer):
            findings.append(tell(member, check_segment(member, before, claim, duty, waits), "segment", began))
    for claim in links:
        if not _is_settled(member, claim.message.peer):
            began = time.monotonic()
            with excused(member, "link", claim.message.peer):
                findings.append(tell(member, check_link(member, before, claim, waits), "link", began))
    for duty in parts:
        if not _is_settled(member, duty.peer):
            began = time.monotonic()
            with excused(member, "part", duty.peer):
                findings.append(tell(member, check_part_of(member, before, record, duty, waits), "part", began))
    if findings:
        audit = Audit(member.state.run, member.peer, record.round, record.after, tuple(findings[:MAX_FINDINGS]))
        signed = seal(member.identity, audit)
        member.journal.note_audit(record.round, signed.pack())
        member.records.announce_audit(signed, member.cohort)
    return done


@contextmanager
def excused(member: Member, what: str, peer: str) -> Iterator[None]:
    """The block of one check, which finds nothing where it is not done for a reason that is not its author's."""
    try:
        yield
    except NotDone as error:
        member.report.warn(f"a {what} of {short(peer)} is not checked: {error}")


def _is_settled(member: Member, peer: str) -> bool:
    return peer in member.proved or peer in member.state.bans or peer == member.peer


def record_of(member: Member, number: int) -> RoundRecord | None:
    """What this peer kept of a round that it took part in; None of one that mixed cohorts."""
    return _trained(member.journal.read_record(number) if number >= 0 else None)


def _trained(packed: bytes | None) -> RoundRecord | None:
    """A packed record, if it is of a round that was trained."""
    record = None if packed is None else read_record(packed)
    return record if isinstance(record, RoundRecord) else None


def tell(member: Member, finding: Finding, what: str, began: float) -> Finding:
    """Report a finding as an event, with the seconds since it was begun."""
    of = short(finding.peer)
    again = f"{what} {finding.item + 1} of {of}, done again" if what != "probe" else f"the delta of {of} on the probe"
    member.report.emit(
        "audit",
        f"{again}: {finding.finding}",
        peer=finding.peer,
        what=what,
        item=finding.item,
        finding=finding.finding,
        error=finding.error,
        seconds=round(time.monotonic() - began, 2),
    )
    return finding


# --- one check ------------------------------------------------------------------------------------


def check_segment(member: Member, before: State, claim: Signed[Claim], duty: Duty, waits: Waits) -> Finding:
    """Train one segment of a claim again, and see that its last checkpoint gives its delta.

    The order is blind: we commit to our result before the claimed one is opened to us.

    Args:
        before: the state that the claim starts from.

    Raises:
        NotDone: there was no time, or its shards are not to be had.
    """
    member.step("audit", f"round {claim.message.round}: training segment {duty.item + 1} of {short(duty.peer)} again")
    salt, result = os.urandom(32), NOTHING
    try:
        with waits.turn(duty.peer, opening_seconds(member, 3)) as turn:
            start = open_checkpoint(member, claim, duty.item - 1, None, turn.until) if duty.item > 0 else None
            data = None if start is None else start.data
            with turn.paused():
                rerun = train_again(member, claim.message, duty.item, before, data, waits.deadline)
            result = blob_digest(rerun)
            commitment = Commitment(member.state.run, member.peer, claim.digest, duty.item, commit_to(result, salt))
            sealed = seal(member.identity, commitment).pack()
            end = last = open_checkpoint(member, claim, duty.item, sealed, turn.until)
            if duty.item < claim.message.segments - 1:
                last = open_checkpoint(member, claim, claim.message.segments - 1, sealed, turn.until)
    except (TransportError, RemoteError) as error:
        return unavailable(member, duty, error, result, salt)
    return conclude_segment(member, before, claim, duty, Opened(start, end, last), rerun, salt)


@dataclass(frozen=True, slots=True)
class Opened:
    """What is compared with a segment's re-run.

    Attributes:
        start: the checkpoint before it; None for the first.
        end: the one that its author says it ends with.
        last: the last one of the claim.
    """

    start: Opening | None
    end: Opening
    last: Opening


def conclude_segment(
    member: Member, before: State, claim: Signed[Claim], duty: Duty, opened: Opened, rerun: bytes, salt: bytes
) -> Finding:
    """What a re-run segment says about its claim; keeps the proof if it is one.

    Args:
        before: the state that the claim starts from.
        rerun: the packed checkpoint at its end, trained here.
        salt: of the commitment to it.
    """
    start = None if opened.start is None else opened.start.data
    found = compare_ends(before, start, opened.end.data, rerun, member.manifest)
    if found.finding == "unclear":
        found = settle(member, before, claim.message, duty.item, start, opened.end.data, rerun, found)
    kind = found.finding
    if kind == "different":
        ends = f"ends elsewhere (relative error {found.error:.2e})"
        proof = SegmentProof(claim, duty.item, before.blob, opened.start, opened.end)
        convict(member, proof, f"segment {duty.item + 1} of {short(duty.peer)}, trained again, {ends}")
    elif breaks_link(member, before, claim, opened.last):
        kind = "different"
    error = min(found.error, MAX_ERROR)
    return Finding(duty.peer, duty.statement, duty.item, kind, error, blob_digest(rerun), salt)


def open_segment(member: Member, claim: Signed[Claim], segment: int, until: float = inf) -> Opened:
    """What a segment's author committed to around it, once it is open to everybody.

    Args:
        until: when waiting for it ends at the latest, as `time.monotonic` counts.

    Raises:
        TransportError: it does not open it.
        Reject: what it opens does not lie under the claim's root.
    """
    indices = {index for index in (segment - 1, segment, claim.message.segments - 1) if index >= 0}
    opened = {index: open_checkpoint(member, claim, index, None, until) for index in indices}
    return Opened(opened.get(segment - 1), opened[segment], opened[claim.message.segments - 1])


def check_opened(member: Member, before: State, claim: Signed[Claim], duty: Duty, opened: Opened) -> Finding:
    """Train a segment again whose ends were opened before.

    Args:
        before: the state that the claim starts from.
    """
    member.report.progress(f"round {claim.message.round}: segment {duty.item + 1} of {short(duty.peer)}", 0, 1)
    try:
        start = None if opened.start is None else opened.start.data
        rerun = train_again(member, claim.message, duty.item, before, start)
    except (TransportError, RemoteError) as error:
        return unavailable(member, duty, error)
    return conclude_segment(member, before, claim, duty, opened, rerun, NOTHING)


def check_link(member: Member, before: State, claim: Signed[Claim], waits: Waits) -> Finding:
    """See that the last checkpoint of a claim, of which nothing is trained again, gives its delta.

    Args:
        before: the state that the claim starts from.

    Raises:
        NotDone: there was no time.
    """
    author, index = claim.message.peer, claim.message.segments - 1
    try:
        with waits.turn(author, opening_seconds(member, 1)) as turn:
            last = open_checkpoint(member, claim, index, None, turn.until)
    except (TransportError, RemoteError) as error:
        member.report.warn(f"the last checkpoint of {short(author)} could not be had: {error}")
        return Finding(author, claim.digest, index, "unavailable", 0.0, NOTHING, NOTHING)
    if breaks_link(member, before, claim, last):
        return Finding(author, claim.digest, index, "different", MAX_ERROR, NOTHING, NOTHING)
    return Finding(author, claim.digest, index, "same", 0.0, NOTHING, NOTHING)


def breaks_link(member: Member, before: State, claim: Signed[Claim], last: Opening) -> bool:
    """Whether a claim's last checkpoint gives another delta or norm than it states; keeps the proof if so.

    Args:
        before: the state that the claim starts from.
    """
    if delta_of(claim.message, before, last.data, member.manifest) == (claim.message.delta_root, True):
        return False
    link = LinkProof(claim, before.blob, last)
    convict(member, link, link.check(judge_of(member)))
    return True


def unavailable(
    member: Member, duty: Duty, error: Exception, result: bytes = NOTHING, salt: bytes = NOTHING
) -> Finding:
    """The finding where a segment cannot be checked, for a reason that is reported."""
    member.report.warn(f"segment {duty.item + 1} of {short(duty.peer)} could not be checked: {error}")
    return Finding(duty.peer, duty.statement, duty.item, "unavailable", 0.0, result, salt)


def opening_seconds(member: Member, checkpoints: int) -> float:
    """How long so many checkpoints of one claim may take over a slow link."""
    return OPEN_SECONDS + patience(checkpoints * max_checkpoint_bytes(member.manifest))


def open_checkpoint(
    member: Member, claim: Signed[Claim], index: int, commitment: bytes | None, until: float = inf
) -> Opening:
    """Have a checkpoint of a claim opened, and fetch it.

    Raises:
        TransportError: its author does not open it or nobody gives it.
        Reject: it does not lie under the claim's root.
    """
    seconds = within(OPEN_SECONDS, until)
    answer = member.link.call("open", seconds, claim=claim.pack(), checkpoint=index, commitment=commitment)
    most = max_checkpoint_bytes(member.manifest)
    data = fetch(member, "checkpoint", answer["digest"], most, claim.message.peer, until)
    member.opened += len(data)
    return Opening(data, tuple(answer["proof"]))


def check_on_probe(member: Member, claim: Signed[Claim], waits: Waits = ENDLESS) -> Finding:
    """See what the delta of a claim of private work does on the probe; keeps the proof if it is one.

    Raises:
        NotDone: there was no time.
    """
    who, judge = claim.message.peer, judge_of(member, waits.deadline)
    member.step("audit", f"round {claim.message.round}: measuring the delta of {short(who)} on the probe")
    try:
        layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
        with waits.turn(who, OPEN_SECONDS + patience(layout.total_bytes)) as turn:
            delta = open_delta(member, claim, turn.until)
            proof = ProbeProof(claim, member.store.get(claim.message.state), delta)
            with turn.paused():
                measured = proof.measure(judge)
    except (TransportError, RemoteError) as error:
        member.report.warn(f"the delta of {short(who)} could not be measured on the probe: {error}")
        return Finding(who, claim.digest, 0, "unavailable", 0.0, NOTHING, NOTHING)
    if measured.finding == "different":
        convict(member, proof, proof.sentence(measured))
    rise = min(max(measured.rise, 0.0), MAX_ERROR)
    return Finding(who, claim.digest, 0, measured.finding, rise, NOTHING, NOTHING)


def open_delta(member: Member, claim: Signed[Claim], until: float = inf) -> bytes:
    """The whole encoded delta of a claim, part by part.

    Args:
        until: when waiting for it ends at the latest, as `time.monotonic` counts.

    Raises:
        TransportError: its author does not give it.
        Reject: a part does not lie under the claim's root.
    """
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    return b"".join(open_part(member, claim, index, until)[0] for index in range(layout.parts))


def open_part(member: Member, claim: Signed[Claim], index: int, until: float = inf) -> tuple[bytes, tuple[bytes, ...]]:
    """One encoded part of a claim's delta, with its way to the claim's root.

    Raises:
        TransportError: its author does not give it.
        Reject: it does not lie under the claim's root.
    """
    answer = member.link.call("part", within(OPEN_SECONDS, until), claim=claim.pack(), index=index)
    member.opened_parts += len(answer["data"])
    return answer["data"], tuple(answer["proof"])


def check_part_of(member: Member, before: State, record: RoundRecord, duty: Duty, waits: Waits = ENDLESS) -> Finding:
    """Reduce one part of a reducer's share again, bit for bit, from what its senders committed to.

    Args:
        before: the state that the round starts from.

    Raises:
        NotDone: there was no time.
    """
    receipt = next(each for each in record.receipts if each.digest == duty.statement)
    stated = next(part for part in receipt.message.parts if part.index == duty.item)
    parts: dict[int, tuple[bytes, tuple[bytes, ...]]] = {}
    for position in stated.senders:
        claim = record.members[position]
        try:
            if claim.message.peer == member.peer:
                parts[position] = _own_part(member, record.round, claim.message, duty.item)
            else:
                with waits.turn(claim.message.peer, OPEN_SECONDS) as turn:
                    parts[position] = open_part(member, claim, duty.item, turn.until)
        except (TransportError, RemoteError) as error:
            member.report.warn(f"part {duty.item} of {short(claim.message.peer)} could not be had: {error}")
            return Finding(claim.message.peer, claim.digest, duty.item, "unavailable", 0.0, NOTHING, NOTHING)
    claims = [each.message for each in record.members]
    result = reduce_again(claims, before, member.manifest, duty.item, {at: data for at, (data, _) in parts.items()})
    if result is not None and blob_digest(result) == stated.result:
        return Finding(duty.peer, duty.statement, duty.item, "same", 0.0, NOTHING, NOTHING)
    proof = ReductionProof(receipt, record.members, before.blob, duty.item, parts)
    convict(member, proof, proof.check(judge_of(member)))
    return Finding(duty.peer, duty.statement, duty.item, "different", MAX_ERROR, NOTHING, NOTHING)


def _own_part(member: Member, number: int, claim: Claim, index: int) -> tuple[bytes, tuple[bytes, ...]]:
    delta = bytes.fromhex(member.journal.traces()[number]["delta"])
    path = member.store.find(delta)
    if path is None:
        raise TransportError("this peer's own delta is kept no longer")
    return prove_part(path, Layout.of(member.manifest.parameters, member.manifest.averaging), claim, index)
