"""Proofs: keeping those that were checked here, and hearing those of others, of which none is believed unread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pasr.errors import LocalError, P2pasrError, Reject, RemoteError, TransportError
from p2pasr.protocol.messages import MAX_AGAINST, Accusation, Charge, seal
from p2pasr.protocol.signing import short
from p2pasr.rerunning import fetch, judge_of, max_proof_bytes
from p2pasr.verify.evidence import Proof, Undecided, WorkProof, pack_proof, unpack_proof

if TYPE_CHECKING:
    from p2pasr.member import Member


def convict(member: Member, proof: Proof, sentence: str) -> None:
    """Keep a proof that was checked, offer it to others and speak against its accused from the next claim on.

    Args:
        sentence: what it proves.
    """
    packed = pack_proof(proof)
    digest = member.store.put("proof", packed)
    path = member.journal.prove(f"{proof.round:08d}-{proof.kind}-{proof.accused}", packed)
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
    free; and whoever was heard once with a proof that proves nothing is not heard again. The accusation is signed and
    names the proof's digest, so that a proof that no honest peer makes is a reason for a strike, of which there are
    enough only if the accused checks it too.
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
            known = charge.accused in member.proved or was_banned_long_ago(member, charge.accused)
            if known or accuser == member.peer or charge.proof in member.heard:
                continue
            member.heard.add(charge.proof)
            try:
                packed = fetch(member, "proof", charge.proof, max_proof_bytes(member.manifest), accuser)
            except RemoteError as error:  # other bytes than the accusation names, perhaps another's
                member.distrusted.add(accuser)
                member.report.warn(f"{short(accuser)} accuses {short(charge.accused)} and gives no proof: {error}")
                continue
            except (TransportError, LocalError) as error:
                member.heard.discard(charge.proof)
                member.report.warn(f"a proof against {short(charge.accused)} cannot be had yet: {error}")
                continue
            try:
                proof = unpack_proof(packed)
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
                if isinstance(error, Reject) and not isinstance(error, Undecided):
                    note_strike(member, accuser)
            else:
                if proof.accused == member.peer:
                    member.report.warn(f"{short(accuser)} holds a proof against this peer: {sentence}")
                else:
                    convict(member, proof, sentence)


def expose(member: Member) -> None:
    """Keep proofs against those who claim other work in this round than they were given; nobody averages with them."""
    for peer, claim in member.records.broken(member.view).items():
        if peer not in member.proved:
            proof = WorkProof(claim, member.store.get(member.state.digest))
            convict(member, proof, proof.check(judge_of(member)))


def was_banned_long_ago(member: Member, peer: str) -> bool:
    """Whether a peer was banned so long ago that nobody need hold a proof of it who joins now.

    Of a fresh ban everybody keeps a proof, also who was not in the round that banned.
    """
    banned = member.state.bans.get(peer)
    return banned is not None and banned < member.state.round - member.manifest.retention.checkpoint_rounds


def note_strike(member: Member, peer: str) -> None:
    """Name a peer for a strike in the claims of this round and the next: not all see what it did in the same."""
    member.strikes[peer] = member.state.round
