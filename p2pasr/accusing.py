"""Proofs: keeping those that were checked here, and hearing those of others, of which none is believed unread."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from p2pasr.errors import LinkDown, LocalError, P2pasrError, Reject, RemoteError, TransportError
from p2pasr.protocol.messages import MAX_AGAINST, Accusation, Charge, seal
from p2pasr.protocol.signing import short
from p2pasr.rerunning import fetch, judge_of, max_proof_bytes
from p2pasr.verify.evidence import Proof, Undecided, WorkProof, pack_proof, unpack_proof

if TYPE_CHECKING:
    from p2pasr.member import Member

CHANCE: Final = random.SystemRandom()

MOST_ROUNDS_PUT_OFF: Final = 16
"""Who does not give its proof in time is heard again after one round, then two, four, and so on up to so many."""


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


def hear(member: Member, seconds: float) -> None:
    """Read the proofs that others say they have, and check them before anything follows from one.

    To check one can take as long as to train a segment. So only peers are heard of which work was merged, for keys are
    free; and whoever was heard once with a proof that proves nothing is not heard again. The accusation is signed and
    names the proof's digest, so that a proof that no honest peer makes is a reason for a strike, of which there are
    enough only if the accused checks it too. Who does not give its proof in time is not distrusted, for its link may be
    slow and the next time goes on from what came; but it is heard again in a later round only.

    Args:
        seconds: how long all of them are waited for; each in turn has an equal share of what is left.
    """
    try:
        accusations = member.records.accusations(member.cohort)
    except TransportError as error:  # what was trained meanwhile is not lost for it
        member.report.warn(f"whether anybody holds a proof is not known: {error}")
        return
    deadline = time.monotonic() + seconds
    accusers = [peer for peer, signed in accusations.items() if any(_news(member, peer, signed.message.charges))]
    CHANCE.shuffle(accusers)  # so that no one is always the last
    for done, accuser in enumerate(accusers):
        now = time.monotonic()
        if now >= deadline:
            member.report.warn(f"the proofs of {len(accusers) - done} peers are read later: the others took too long")
            return
        until = now + (deadline - now) / (len(accusers) - done)
        for charge in _news(member, accuser, accusations[accuser].message.charges):
            _hear_charge(member, accuser, charge, until)


def _news(member: Member, accuser: str, charges: Sequence[Charge]) -> Iterator[Charge]:
    """The charges of a peer that are still to be read, as long as it is worth to be heard."""
    for charge in charges:
        if accuser in member.distrusted or accuser in member.state.bans or accuser not in member.state.credit:
            return
        if accuser == member.peer or member.put_off.get(accuser, (0, 0))[1] > member.state.round:
            return
        known = charge.accused in member.proved or was_banned_long_ago(member, charge.accused)
        if not known and charge.proof not in member.heard:
            yield charge


def _hear_charge(member: Member, accuser: str, charge: Charge, until: float) -> None:
    """Fetch one proof and check it.

    Args:
        until: when waiting for it ends at the latest, as `time.monotonic` counts.
    """
    member.heard.add(charge.proof)
    try:
        packed = fetch(member, "proof", charge.proof, max_proof_bytes(member.manifest), accuser, until)
    except RemoteError as error:  # other bytes than the accusation names, perhaps another's
        member.distrusted.add(accuser)
        member.report.warn(f"{short(accuser)} accuses {short(charge.accused)} and gives no proof: {error}")
        return
    except (TransportError, LocalError) as error:
        _put_off(member, accuser, charge, error)
        return
    try:
        proof = unpack_proof(packed)
        if proof.accused != charge.accused:
            raise Reject("it is about another peer")
        sentence = proof.check(judge_of(member, until))
    except (TransportError, LocalError) as error:
        _put_off(member, accuser, charge, error)
    except P2pasrError as error:  # so that nobody costs us more than one check in vain
        member.distrusted.add(accuser)
        member.report.warn(
            f"{short(accuser)} accuses {short(charge.accused)} without proof and is not heard again: {error}"
        )
        if isinstance(error, Reject) and not isinstance(error, Undecided):
            note_strike(member, accuser)
    else:
        member.put_off.pop(accuser, None)
        if proof.accused == member.peer:
            member.report.warn(f"{short(accuser)} holds a proof against this peer: {sentence}")
        else:
            convict(member, proof, sentence)


def _put_off(member: Member, accuser: str, charge: Charge, error: Exception) -> None:
    """Read a proof that is not to be had, or cannot be checked, in a later round."""
    member.heard.discard(charge.proof)
    if isinstance(error, TransportError) and not isinstance(error, LinkDown):
        times, _ = member.put_off.get(accuser, (0, 0))
        pause = min(2**times, MOST_ROUNDS_PUT_OFF)
        member.put_off[accuser] = times + 1, member.state.round + pause
    member.report.warn(f"a proof against {short(charge.accused)} cannot be had or checked yet: {error}")


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
