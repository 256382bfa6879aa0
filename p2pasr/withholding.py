"""Who keeps from others what it committed to: asked again in the second round after, and named for a strike.

An auditor's word that something was not to be had is nothing to go by. By now all of it is open to everybody, so each
peer tries for itself, and what can be had after all is trained again by the auditor and by a few that nobody knows
beforehand: to open to all but one's auditor helps nobody.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from p2pasr.accusing import note_strike
from p2pasr.auditing import (
    OPEN_SECONDS,
    check_on_probe,
    check_opened,
    check_part_of,
    drawing_of,
    excused,
    open_part,
    open_segment,
    opening_seconds,
    record_of,
    tell,
)
from p2pasr.errors import RemoteError, TransportError
from p2pasr.protocol.audits import Duty
from p2pasr.protocol.messages import Claim, Signed
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, parse_state
from p2pasr.verify.record import RoundRecord
from p2pasr.waits import Waits, seconds_of

if TYPE_CHECKING:
    from p2pasr.member import Member

RETRY_SECONDS: Final = 20.0
"""How long those are asked again that have not finished the round before: they open everything when they have."""

PAUSE_SECONDS: Final = 1.0

SECOND_AUDITORS: Final = 2
"""How many peers, on average, train again what was opened late."""

CHANCE: Final = random.SystemRandom()
"""Whether a peer audits what was opened late must be known to nobody before."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something of a claim that its auditor could not have.

    Attributes:
        claim: whose author is said to withhold it.
        duty: what the auditor was drawn to do.
        auditor: who says so.
        index: the part of the delta; None where a segment's checkpoints are missing.
    """

    claim: Signed[Claim]
    duty: Duty
    auditor: str
    index: int | None


def ask_again(member: Member) -> int:
    """Try for ourselves what auditors of the round before last could not have; returns how many segments were trained.

    Each claim is tried once; whose author keeps from us what it committed to is named in our next claims.
    """
    record = record_of(member, member.state.round - 2)
    if record is None or member.asked == record.after or member.manifest.verify.strikes == 0:
        return 0
    member.asked = record.after
    waits = Waits(seconds_of(member.manifest.rounds))
    retries_end = time.monotonic() + RETRY_SECONDS
    withheld: set[str] = set()
    done = 0
    for doubt in find_doubts(member, record):
        who = doubt.claim.message.peer
        if who == member.peer:
            member.report.warn(_own_warning(member, doubt))
        elif who not in withheld | member.proved | member.out:
            with excused(member, "claim", who):
                trained = _try(member, record, doubt, retries_end, waits)
                if trained is None:
                    withheld.add(who)
                else:
                    done += trained
    for peer in sorted(withheld):
        member.report.warn(f"{short(peer)} keeps from this peer what it claimed in round {record.round}")
        note_strike(member, peer)
    return done


def find_doubts(member: Member, record: RoundRecord) -> Iterator[Doubt]:
    """What members of a round could not have of claims in it, where they were drawn to check it; each thing once."""
    try:
        audits = member.records.audits(member.cohort, record.round)
    except TransportError as error:
        member.report.warn(f"whether anybody withholds what it claimed in round {record.round} is not known: {error}")
        return
    missing = {
        (auditor, found.statement, found.item)
        for auditor, signed in audits.items()
        if (signed.message.round, signed.message.state) == (record.round, record.after)
        for found in signed.message.findings
        if found.finding == "unavailable"
    }
    if not missing or member.store.find(record.after) is None:
        return
    after = parse_state(member.store.get(record.after), member.manifest, member.like)
    seen: set[tuple[bytes, int, bool]] = set()
    for auditor, statement, item in sorted(missing, key=lambda each: (each[0] != member.peer, each)):
        for doubt in _drawn(member, record, after, auditor, statement, item):
            thing = statement, item, doubt.index is None
            if thing not in seen:
                seen.add(thing)
                yield doubt


def _drawn(
    member: Member, record: RoundRecord, after: State, auditor: str, statement: bytes, item: int
) -> Iterator[Doubt]:
    """The duties of an auditor for which it needed this segment or this part of a claim."""
    position = next((at for at, claim in enumerate(record.members) if claim.digest == statement), None)
    if position is None or auditor not in [claim.message.peer for claim in record.members]:
        return
    claim = record.members[position]
    drawing = drawing_of(member.manifest, record, after)
    duty = drawing.auditors(claim).get(auditor)
    private = member.manifest.data.policy == "private"
    if duty is None and not private and drawing.link_checker(claim) == auditor:
        duty = Duty(claim.message.peer, statement, claim.message.segments - 1)
    if duty is not None and (item == 0 if private else duty.item == item):
        yield Doubt(claim, duty, auditor, None)
    senders = {(r.digest, part.index): part.senders for r in record.receipts for part in r.message.parts}
    for duty in drawing.parts(record.receipts, auditor):
        if duty.item == item and position in senders[duty.statement, item]:
            yield Doubt(claim, duty, auditor, item)


def _try(member: Member, record: RoundRecord, doubt: Doubt, retries_end: float, waits: Waits) -> int | None:
    """Have what is missing, and check it if it falls to us.

    Returns:
        The segments trained; None if it is withheld.

    Raises:
        NotDone: there was no time.
    """
    claim, duty, began = doubt.claim, doubt.duty, time.monotonic()
    member.step("audit", f"round {record.round}: asking {short(claim.message.peer)} for what was not to be had before")
    if doubt.index is None and member.manifest.data.policy == "private":
        found = tell(member, check_on_probe(member, claim, waits), "probe", began)
        return None if found.finding == "unavailable" else 0
    while True:
        try:
            if doubt.index is None:
                with waits.turn(duty.peer, opening_seconds(member, 3)) as turn:
                    opened = open_segment(member, claim, duty.item, turn.until)
            else:
                with waits.turn(claim.message.peer, OPEN_SECONDS) as turn:
                    open_part(member, claim, doubt.index, turn.until)
            break
        except (TransportError, RemoteError):
            if time.monotonic() + PAUSE_SECONDS > retries_end or not _is_behind(member, claim.message.peer):
                return None
            time.sleep(PAUSE_SECONDS)
    if doubt.auditor != member.peer and CHANCE.random() >= SECOND_AUDITORS / len(record.members):
        return 0
    if doubt.index is None and not member.can_train(claim.message):
        return 0
    if member.store.find(claim.message.state) is None:
        return 0
    before = parse_state(member.store.get(claim.message.state), member.manifest, member.like)
    if doubt.index is not None:
        tell(member, check_part_of(member, before, record, duty, waits), "part", began)
        return 0
    tell(member, check_opened(member, before, claim, duty, opened), "segment", began)
    return 1


def _is_behind(member: Member, peer: str) -> bool:
    """Whether a peer says that it is still in a round before ours."""
    entry = member.records.roster(member.cohort).get(peer)
    return entry is not None and entry.round < member.state.round


def _own_warning(member: Member, doubt: Doubt) -> str:
    who = f"{short(doubt.auditor)} could not have what this peer claimed in round {doubt.claim.message.round}"
    if member.client_mode:
        return f"{who}; in client mode only peers that this one is connected to can, so leave it out if you can"
    return f"{who}; while the others can, nothing follows from that"
