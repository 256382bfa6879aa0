"""Excision: what was merged of a peer in its last rounds is taken out of the state by the round that bans it.

Whoever speaks against a peer computes what takes its work out again, from the record and the deltas of
these rounds, and names the digest beside the accusation. What more than half of a round's claims
name alike is subtracted by everybody; a state is a function of its rounds, as before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Layout
from p2pasr.averaging.partfile import PartFile
from p2pasr.errors import P2pasrError, Reject, TransportError
from p2pasr.peers.blobs import Kind
from p2pasr.peers.streams import patience
from p2pasr.protocol.admission import newcomers
from p2pasr.protocol.messages import NO_UNDO, Claim
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import parse_state, undone
from p2pasr.rerunning import BLOB_SECONDS
from p2pasr.verify.record import RoundRecord, read_record
from p2pasr.verify.undo import MergedRound, Undo, is_merged, max_undo_bytes, read_undo, undo_of

if TYPE_CHECKING:
    from p2pasr.member import Member

TRIES: Final = 3
"""In how many rounds an undo is computed for a peer that is not banned: where no majority comes together, in vain."""

ANSWER_SECONDS: Final = 5.0
"""How much longer than it was given the network process may take to say what came of a wait."""


# --- naming an undo -------------------------------------------------------------------------------


def undos_of(member: Member, against: Sequence[str]) -> tuple[bytes, ...]:
    """For each of these peers the digest of what takes its last work out of the state; zeros where there is none."""
    return tuple(_undo_named(member, peer) for peer in against)


def _undo_named(member: Member, peer: str) -> bytes:
    member.undos[peer] += 1
    if member.undos[peer] > TRIES:
        return NO_UNDO
    section = member.manifest.averaging
    try:
        if not section.excises:
            raise Reject(
                f"with averaging.rule {section.rule.kind} and averaging.outer {section.outer.kind} it is no term of a "
                f"sum, as with mean and fedavg"
            )
        undo = compute_undo(member, peer)
    except P2pasrError as error:  # the ban stands without it
        member.report.warn(f"this peer cannot help to take out again what was merged of {short(peer)}: {error}")
        return NO_UNDO
    return NO_UNDO if undo is None else member.store.put("undo", *undo.pieces)


def compute_undo(member: Member, peer: str) -> Undo | None:
    """What takes a peer out of the last rounds that this one has the record of; None if nothing of it is in them.

    It goes back `retention.checkpoint_rounds` rounds at most, never across a mix, and to no round in which somebody
    counted who is banned already: that may have been taken out before.

    Raises:
        P2pasrError: it cannot be computed here.
    """
    member.step("commit", f"round {member.state.round}: computing what takes the work of {short(peer)} out again")
    grace = member.manifest.rounds.grace_seconds
    deadline = max(time.time(), member.closes_at) + grace / 2  # so long others wait for our claim at least
    rounds: list[MergedRound] = []
    with contextlib.ExitStack() as files:
        for record in last_records(member):
            weights, new = weights_in(member, record)
            counted = {claim.message.peer for claim, weight in zip(record.members, weights, strict=True) if weight > 0}
            if counted & member.state.bans.keys():
                break
            if peer in counted and is_merged(record, peer):
                rounds.append(_open_round(member, record, weights, new, peer, deadline, files))
        return undo_of(peer, rounds[::-1], member.manifest, member.like) if rounds else None


def last_records(member: Member) -> list[RoundRecord]:
    """The records of the rounds that led to this peer's state, the newest first, as far as it was in them."""
    records: list[RoundRecord] = []
    digest, newest = member.state.digest, member.state.round - 1
    for number in range(newest, max(-1, newest - member.manifest.retention.checkpoint_rounds), -1):
        packed = member.journal.read_record(number)
        record = None if packed is None else read_record(packed)
        if not isinstance(record, RoundRecord) or record.after != digest or member.store.find(record.before) is None:
            break
        records.append(record)
        digest = record.before
    return records


def weights_in(member: Member, record: RoundRecord) -> tuple[tuple[float, ...], frozenset[int]]:
    """What each member of a round weighed, and the positions of those that were new to it."""
    before = parse_state(member.store.get(record.before), member.manifest, member.like)
    claims = [claim.message for claim in record.members]
    weights = rules.weights(claims, member.manifest, before.standing, before.guests)
    return weights, newcomers(claims, member.manifest, before.standing)


def _open_round(
    member: Member,
    record: RoundRecord,
    weights: Sequence[float],
    new: frozenset[int],
    peer: str,
    deadline: float,
    files: contextlib.ExitStack,
) -> MergedRound:
    """A round's average and the deltas of all but one of its members, as many as can be had.

    Raises:
        TransportError: the average cannot be had, or no more than half of the deltas.
    """
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    counted = [at for at, claim in enumerate(record.members) if weights[at] > 0 and claim.message.peer != peer]
    names = [claim.message.peer for claim in record.members if claim.message.peer != peer]
    _have(member, "average", record.average, layout.total_bytes, names)
    ours = [at for at in counted if record.members[at].message.peer == member.peer]
    deltas = {at: bytes.fromhex(member.journal.traces()[record.round]["delta"]) for at in ours}
    asked = [at for at in counted if at not in ours]
    seconds = max(0.0, deadline - time.time())
    packed = [record.members[at].pack() for at in asked]
    answer = member.link.call("deltas", seconds + ANSWER_SECONDS, claims=packed, holders=names, seconds=seconds)
    deltas |= {at: delta for at, delta in zip(asked, answer["deltas"], strict=True) if delta is not None}
    if 2 * len(deltas) <= len(counted):
        raise TransportError(f"of {len(counted)} others in round {record.round}, only {len(deltas)} give their delta")

    def opened(digest: bytes) -> PartFile:
        path = member.store.find(digest)
        if path is None:
            raise TransportError(f"what was averaged in round {record.round} is kept no longer")
        return files.enter_context(PartFile(path, layout))

    return MergedRound(
        record, weights, opened(record.average), {at: opened(delta) for at, delta in deltas.items()}, new
    )


# --- taking out what is agreed on -----------------------------------------------------------------


def agreed_undos(member: Member, voters: Sequence[Claim]) -> list[Undo]:
    """What a round takes out of the state: the undos that more than half of its claims name.

    Where two of them take out the same delta of somebody, who gave it to nobody any more, only the first counts.

    Raises:
        TransportError: nobody gives one of them.
        Reject: one is none.
    """
    undos: list[Undo] = []
    for peer, digest in undone(voters).items():
        names = [claim.peer for claim in voters if digest in claim.undo]
        _have(member, "undo", digest, max_undo_bytes(member.manifest), names)
        undo = read_undo(member.store.get(digest), member.like)
        if undo.peer != peer:
            raise Reject(f"the undo of {short(peer)} that the claims agree on is one of {short(undo.peer)}")
        if not any(set(undo.removed) & set(other.removed) for other in undos):
            undos.append(undo)
    return undos


def taken_out(peer: str, rounds: Sequence[int]) -> str:
    """Half a sentence on what was undone."""
    which = f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]}-{rounds[-1]}"
    return f"what was merged of {short(peer)} in {which} is taken out again"


def _have(member: Member, kind: Kind, digest: bytes, most: int, peers: Sequence[str]) -> None:
    """Fetch a blob that is not here.

    Raises:
        TransportError: nobody gives it.
    """
    if member.store.find(digest) is None:
        seconds = min(BLOB_SECONDS, patience(most))
        member.link.call("fetch", seconds, digest=digest, kind=kind, max_bytes=most, peers=list(peers))
