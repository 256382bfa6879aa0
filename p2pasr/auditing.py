"""The audit step: do again what was drawn of the others' last round, keep proofs, believe nobody else's unread.

It comes before a peer trains, so that what it finds is in its next claim; for every segment that it
trains again it trains one less of its own, and so nobody waits for an auditor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from p2pasr.averaging.codec import Layout
from p2pasr.errors import LocalError, NonFiniteStep, P2pasrError, Reject, RemoteError, TransportError
from p2pasr.having import fetch_shards, shard_path
from p2pasr.peers.blobs import Kind
from p2pasr.private import require_probed
from p2pasr.protocol.audits import Duty, parts_to_reduce, segments_to_rerun
from p2pasr.protocol.encoding import MEBIBYTE, blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import (
    MAX_AGAINST,
    MAX_FINDINGS,
    Accusation,
    Audit,
    Charge,
    Claim,
    Commitment,
    Finding,
    Signed,
    commit_to,
    seal,
    unseal,
)
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, max_state_bytes, parse_state
from p2pasr.protocol.tensors import Tensors, forms
from p2pasr.tasks.base import Checkpoint, OnStep, SegmentPlan, Task
from p2pasr.verify.evidence import (
    MAX_PROOF_BYTES,
    Judge,
    LinkProof,
    Opening,
    ProbeProof,
    Proof,
    ReductionProof,
    SegmentProof,
    compare_ends,
    delta_of,
    pack_proof,
    reduce_again,
    unpack_proof,
)
from p2pasr.verify.openings import prove_part
from p2pasr.verify.record import RoundRecord, read_record

if TYPE_CHECKING:
    from p2pasr.round import Member

OPEN_SECONDS: Final = 60.0
"""How long an opening, or one part of a delta, may take."""

BLOB_SECONDS: Final = 600.0
"""How long a checkpoint or a proof may take."""

MAX_ERROR: Final = 1e15
"""What stands for an infinite error in a record."""

NOTHING: Final = bytes(32)


def offer(member: Member) -> None:
    """Open what this peer's claims of the last rounds committed to, to those who may see it."""
    offers, records = [], set()
    for number, trace in sorted(member.journal.traces().items()):
        packed = bytes.fromhex(trace["claim"])
        record = member.journal.read_record(number)
        if record is not None:
            records.add(member.store.put("record", record, durable=False))
        offers.append(
            {
                "claim": packed,
                "checkpoints": [bytes.fromhex(digest) for digest in trace["checkpoints"]],
                "delta": bytes.fromhex(trace["delta"]),
                "drawn": _drawn(member, number, packed) if number == member.state.round - 1 else None,
                "record": None if record is None else blob_digest(record),
            }
        )
    member.store.retain("record", records)
    member.link.call("offer", OPEN_SECONDS, offers=offers)
    member.link.call("ban", OPEN_SECONDS, peers=sorted(member.state.bans))


def _drawn(member: Member, number: int, claim: bytes) -> dict[str, list[int]]:
    """Auditor → the segments of this peer's claim that were drawn for it."""
    record = _record(member, number)
    if record is None:
        return {}
    ours = unseal(claim, Claim).digest
    section, drawn = member.manifest.verify, {}
    for auditor in (each.message.peer for each in record.members):
        duties = segments_to_rerun(section, record.after, record.members, auditor)
        segments = [duty.item for duty in duties if duty.statement == ours]
        if segments:
            drawn[auditor] = segments
    return drawn


def check_last_round(member: Member) -> int:
    """Do what was drawn for this peer of the round before, once; returns how many segments were trained again."""
    offer(member)
    hear(member)
    record = _record(member, member.state.round - 1)
    if record is None or record.after != member.state.digest or member.checked == record.after:
        return 0
    member.checked = record.after
    section = member.manifest.verify
    findings: list[Finding] = []
    done = 0
    private = member.manifest.data.policy == "private"
    for duty in segments_to_rerun(section, record.after, record.members, member.peer):
        if _is_settled(member, duty.peer):
            continue
        claim = next(each for each in record.members if each.digest == duty.statement)
        began = time.monotonic()
        if private:
            findings.append(_tell(member, check_on_probe(member, claim), "probe", began))
            continue
        findings.append(_tell(member, check_segment(member, claim, duty), "segment", began))
        done += 1
    for duty in parts_to_reduce(section, record.after, record.receipts, member.peer):
        if not _is_settled(member, duty.peer):
            began = time.monotonic()
            findings.append(_tell(member, check_part_of(member, record, duty), "part", began))
    if findings:
        audit = Audit(member.state.run, member.peer, record.round, record.after, tuple(findings[:MAX_FINDINGS]))
        signed = seal(member.identity, audit)
        member.journal.note_audit(record.round, signed.pack())
        member.records.announce_audit(signed, member.cohort)
    return done


def _is_settled(member: Member, peer: str) -> bool:
    return peer in member.proved or peer in member.state.bans or peer == member.peer


def _record(member: Member, number: int) -> RoundRecord | None:
    """What this peer kept of a round that it took part in; None of one that mixed cohorts."""
    packed = member.journal.read_record(number) if number >= 0 else None
    record = None if packed is None else read_record(packed)
    return record if isinstance(record, RoundRecord) else None


def _tell(member: Member, finding: Finding, what: str, began: float) -> Finding:
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


def check_segment(member: Member, claim: Signed[Claim], duty: Duty) -> Finding:
    """Train one segment of a claim again, and see that its last checkpoint gives its delta.

    The order is blind: we commit to our result before the claimed one is opened to us.
    """
    member.step("audit", f"round {claim.message.round}: training segment {duty.item + 1} of {short(duty.peer)} again")
    state = parse_state(member.store.get(claim.message.state), member.manifest, member.like)
    salt, result = os.urandom(32), NOTHING
    try:
        start = open_checkpoint(member, claim, duty.item - 1, None) if duty.item > 0 else None
        rerun = train_again(member, claim.message, duty.item, state, None if start is None else start.data)
        result = blob_digest(rerun)
        commitment = Commitment(member.state.run, member.peer, claim.digest, duty.item, commit_to(result, salt))
        sealed = seal(member.identity, commitment).pack()
        end = open_checkpoint(member, claim, duty.item, sealed)
        last_index = claim.message.segments - 1
        last = end if duty.item == last_index else open_checkpoint(member, claim, last_index, sealed)
    except (TransportError, RemoteError) as error:
        return unavailable(member, duty, error, result, salt)
    return conclude_segment(member, claim, duty, Opened(start, end, last), rerun, salt)


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
    member: Member, claim: Signed[Claim], duty: Duty, opened: Opened, rerun: bytes, salt: bytes
) -> Finding:
    """What a re-run segment says about its claim; keeps the proof if it is one.

    Args:
        rerun: the packed checkpoint at its end, trained here.
        salt: of the commitment to it.
    """
    judge, before = judge_of(member), member.store.get(claim.message.state)
    state = parse_state(before, member.manifest, member.like)
    start = None if opened.start is None else opened.start.data
    found = compare_ends(state, start, opened.end.data, rerun, member.manifest)
    kind = found.finding
    if kind == "different":
        ends = f"ends elsewhere (relative error {found.error:.2e})"
        proof = SegmentProof(claim, duty.item, before, opened.start, opened.end)
        convict(member, proof, f"segment {duty.item + 1} of {short(duty.peer)}, trained again, {ends}")
    elif delta_of(claim.message, state, opened.last.data, member.manifest) != (claim.message.delta_root, True):
        kind = "different"
        link = LinkProof(claim, before, opened.last)
        convict(member, link, link.check(judge))
    error = min(found.error, MAX_ERROR)
    return Finding(duty.peer, duty.statement, duty.item, kind, error, blob_digest(rerun), salt)


def unavailable(
    member: Member, duty: Duty, error: Exception, result: bytes = NOTHING, salt: bytes = NOTHING
) -> Finding:
    """The finding where a segment cannot be checked, for a reason that is reported."""
    member.report.warn(f"segment {duty.item + 1} of {short(duty.peer)} could not be checked: {error}")
    return Finding(duty.peer, duty.statement, duty.item, "unavailable", 0.0, result, salt)


def open_checkpoint(member: Member, claim: Signed[Claim], index: int, commitment: bytes | None) -> Opening:
    """Have a checkpoint of a claim opened, and fetch it.

    Raises:
        TransportError: its author does not open it or nobody gives it.
        Reject: it does not lie under the claim's root.
    """
    answer = member.link.call("open", OPEN_SECONDS, claim=claim.pack(), checkpoint=index, commitment=commitment)
    data = fetch(member, "checkpoint", answer["digest"], max_checkpoint_bytes(member.manifest), claim.message.peer)
    return Opening(data, tuple(answer["proof"]))


def check_on_probe(member: Member, claim: Signed[Claim]) -> Finding:
    """See what the delta of a claim of private work does on the probe; keeps the proof if it is one."""
    who, judge = claim.message.peer, judge_of(member)
    member.step("audit", f"round {claim.message.round}: measuring the delta of {short(who)} on the probe")
    try:
        proof = ProbeProof(claim, member.store.get(claim.message.state), open_delta(member, claim))
        measured = proof.measure(judge)
    except (TransportError, RemoteError) as error:
        member.report.warn(f"the delta of {short(who)} could not be measured on the probe: {error}")
        return Finding(who, claim.digest, 0, "unavailable", 0.0, NOTHING, NOTHING)
    if measured.finding == "different":
        convict(member, proof, proof.sentence(measured))
    rise = min(max(measured.rise, 0.0), MAX_ERROR)
    return Finding(who, claim.digest, 0, measured.finding, rise, NOTHING, NOTHING)


def open_delta(member: Member, claim: Signed[Claim]) -> bytes:
    """The whole encoded delta of a claim, part by part.

    Raises:
        TransportError: its author does not give it.
        Reject: a part does not lie under the claim's root.
    """
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    packed = claim.pack()
    parts = (member.link.call("part", OPEN_SECONDS, claim=packed, index=index) for index in range(layout.parts))
    return b"".join(part["data"] for part in parts)


def train_again(member: Member, claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
    """One segment of a claim, trained here.

    Args:
        before: the state that the claim starts from.
        start: the packed checkpoint before it; None for the first.

    Returns:
        The packed checkpoint at its end.
    """
    fetch_shards(member, claim.shards)
    paths = [shard_path(member, shard) for shard in claim.shards]
    return train_segment(member.task, member.manifest, claim, segment, before, start, paths, None)


def train_segment(
    task: Task,
    manifest: RunManifest,
    claim: Claim,
    segment: int,
    before: State,
    start: bytes | None,
    shards: Sequence[Any],
    on_step: OnStep | None,
) -> bytes:
    """The packed checkpoint at the end of one segment of a claim, by the task itself.

    Raises:
        Reject: the task cannot go on from the checkpoint that the claim's author committed to, or a step was not
            finite, after which nobody claims anything.
    """
    begin = Checkpoint(before.params) if start is None else Checkpoint.unpack(start)
    if forms(begin.params) != forms(before.params):
        raise Reject(f"the checkpoint before segment {segment + 1} holds other parameters than this run trains")
    plan = SegmentPlan.of(manifest.rounds, claim.round, claim.state, claim.peer, segment)
    try:
        end, _ = task.segment(begin, shards, plan, on_step)
    except NonFiniteStep as error:
        raise Reject(f"segment {segment + 1}, trained again, comes to no end: {error}") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if start is None:
            raise
        raise Reject(
            f"segment {segment + 1} cannot be trained from the checkpoint before it ({type(error).__name__})"
        ) from error  # its moments are a stranger's
    return end.pack()


def check_part_of(member: Member, record: RoundRecord, duty: Duty) -> Finding:
    """Reduce one part of a reducer's share again, bit for bit, from what its senders committed to."""
    receipt = next(each for each in record.receipts if each.digest == duty.statement)
    stated = next(part for part in receipt.message.parts if part.index == duty.item)
    before = member.store.get(record.before)
    parts: dict[int, tuple[bytes, tuple[bytes, ...]]] = {}
    for position in stated.senders:
        claim = record.members[position]
        try:
            if claim.message.peer == member.peer:
                parts[position] = _own_part(member, record.round, claim.message, duty.item)
            else:
                answer = member.link.call("part", OPEN_SECONDS, claim=claim.pack(), index=duty.item)
                parts[position] = answer["data"], tuple(answer["proof"])
        except (TransportError, RemoteError) as error:
            member.report.warn(f"part {duty.item} of {short(claim.message.peer)} could not be had: {error}")
            return Finding(claim.message.peer, claim.digest, duty.item, "unavailable", 0.0, NOTHING, NOTHING)
    state = parse_state(before, member.manifest, member.like)
    claims = [each.message for each in record.members]
    result = reduce_again(claims, state, member.manifest, duty.item, {at: data for at, (data, _) in parts.items()})
    if result is not None and blob_digest(result) == stated.result:
        return Finding(duty.peer, duty.statement, duty.item, "same", 0.0, NOTHING, NOTHING)
    proof = ReductionProof(receipt, record.members, before, duty.item, parts)
    convict(member, proof, proof.check(judge_of(member)))
    return Finding(duty.peer, duty.statement, duty.item, "different", MAX_ERROR, NOTHING, NOTHING)


def _own_part(member: Member, number: int, claim: Claim, index: int) -> tuple[bytes, tuple[bytes, ...]]:
    delta = bytes.fromhex(member.journal.traces()[number]["delta"])
    path = member.store.find(delta)
    if path is None:
        raise TransportError("this peer's own delta is kept no longer")
    return prove_part(path, Layout.of(member.manifest.parameters, member.manifest.averaging), claim, index)


# --- proofs -----------------------------------------------------------------------------------------


def convict(member: Member, proof: Proof, sentence: str) -> None:
    """Keep a proof that was checked, offer it to others and speak against its accused from the next claim on.

    Args:
        sentence: what it proves.
    """
    packed = pack_proof(proof)
    digest = member.store.put("proof", packed)
    path = member.journal.prove(f"{member.state.round:08d}-{proof.kind}-{proof.accused}", packed)
    member.proved.add(proof.accused)
    member.charges[proof.accused] = Charge(proof.accused, digest, len(packed))
    charges = tuple(list(member.charges.values())[-MAX_AGAINST:])
    accusation = seal(member.identity, Accusation(member.state.run, member.peer, charges))
    member.records.announce_accusation(accusation, member.cohort)
    member.report.emit(
        "evidence", f"{sentence}; the proof is {path}", peer=proof.accused, kind=proof.kind, path=str(path)
    )


def hear(member: Member) -> None:
    """Read the proofs that others say they have, and check them before anything follows from one.

    To check one can take as long as to train a segment. So only peers are heard of which work was merged, for keys are
    free; and whoever was heard once with a proof that proves nothing is not heard again.
    """
    try:
        accusations = member.records.accusations(member.cohort)
    except TransportError as error:  # what was trained meanwhile is not lost for it
        member.report.warn(f"whether anybody holds a proof is not known: {error}")
        return
    for accuser, accusation in accusations.items():
        for charge in accusation.message.charges:
            if accuser in member.distrusted or accuser in member.state.bans or accuser not in member.state.credit:
                break
            if _is_settled(member, charge.accused) or charge.proof in member.heard:
                continue
            member.heard.add(charge.proof)
            try:
                proof = unpack_proof(fetch(member, "proof", charge.proof, max_proof_bytes(member.manifest), accuser))
                if proof.accused != charge.accused:
                    raise Reject("it is about another peer")
                sentence = proof.check(judge_of(member))
            except (TransportError, LocalError) as error:
                member.heard.discard(charge.proof)
                member.report.warn(f"a proof against {short(charge.accused)} cannot be checked yet: {error}")
            except P2pasrError as error:  # so that nobody costs us more than one check in vain
                member.distrusted.add(accuser)
                member.report.warn(
                    f"{short(accuser)} accuses {short(charge.accused)} without proof and is not heard again: {error}"
                )
            else:
                convict(member, proof, sentence)


def judge_of(member: Member) -> Judge:
    """What this peer checks proofs with."""

    def rerun(claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
        return train_again(member, claim, segment, before, start)

    return Judge(member.manifest, member.like, rerun, lambda params: probe_loss(member, params))


def probe_loss(member: Member, params: Tensors) -> float:
    """The task's loss of parameters on the run's probe.

    Raises:
        LocalError: the task has none.
    """
    shards = [bytes.fromhex(shard.digest) for shard in member.manifest.shards]
    fetch_shards(member, shards)
    return require_probed(member.task).probe_loss(params, [shard_path(member, shard) for shard in shards])


def fetch(member: Member, kind: Kind, digest: bytes, most: int, peer: str) -> bytes:
    """A blob, from a peer that is said to have it."""
    member.link.call("fetch", BLOB_SECONDS, digest=digest, kind=kind, max_bytes=most, peers=[peer])
    return member.store.get(digest)


def max_checkpoint_bytes(manifest: RunManifest) -> int:
    """The longest blob that can be a checkpoint: parameters, at most three moments of four bytes, and a header."""
    return 4 * 4 * manifest.parameters + 16 * MEBIBYTE


def max_proof_bytes(manifest: RunManifest) -> int:
    """The longest blob that can be a proof: a state, two checkpoints or a part of each member, and statements."""
    layout = Layout.of(manifest.parameters, manifest.averaging)
    parts = manifest.averaging.max_group * layout.part_bytes(0)
    rest = max(2 * max_checkpoint_bytes(manifest), parts) + 4 * MEBIBYTE
    return min(MAX_PROOF_BYTES, max_state_bytes(manifest) + rest)
