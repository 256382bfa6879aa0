"""Who checks what of a round: drawn from the state that came of it, which nobody knew when the claims were signed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pasr.protocol.encoding import digest
from p2pasr.protocol.manifest import VerifySection
from p2pasr.protocol.messages import Claim, Receipt, Signed


@dataclass(frozen=True, slots=True)
class Duty:
    """One thing that one peer checks.

    Attributes:
        peer: whose work is checked.
        statement: digest of its claim, or of its receipt.
        item: the segment that is trained again, the one whose end is compared with the delta, or the part that is
            reduced again.
    """

    peer: str
    statement: bytes
    item: int


def segments_to_rerun(
    section: VerifySection, after: bytes, claims: Sequence[Signed[Claim]], auditor: str
) -> tuple[Duty, ...]:
    """The segments of a round that one of its members trains again.

    A claim is audited by the `auditors` other members with the lowest BLAKE3(after ‖ claim ‖ member), each of which
    draws by the same digest whether it does, at the section's rate, and one segment.

    Args:
        after: digest of the state that came of the round.
        claims: those of its members, in any order.
    """
    duties = []
    for claim in claims:
        statement = claim.digest
        others = [each.message.peer for each in claims if each.message.peer != claim.message.peer]
        ranks = {peer: _draw("auditor", after, statement, peer) for peer in others}
        drawn = sorted(others, key=ranks.__getitem__)[: section.auditors]
        if auditor in drawn and _fraction(_draw("audit", after, statement, auditor)) < section.rate:
            segment = _number(_draw("audited-segment", after, statement, auditor)) % claim.message.segments
            duties.append(Duty(claim.message.peer, statement, segment))
    return tuple(duties)


def link_checkers(section: VerifySection, after: bytes, claims: Sequence[Signed[Claim]]) -> dict[bytes, str]:
    """Who compares which claim's last checkpoint with its delta and its norm: digest of a claim → another member.

    Each claim has one, drawn at the section's rate, but for those of which a segment is trained again: its auditor
    makes the comparison then, and the last checkpoint may be what it must not see before it commits to its own.

    Args:
        after: digest of the state that came of the round.
        claims: those of its members, in any order.
    """
    members = [claim.message.peer for claim in claims]
    audited = {duty.statement for each in members for duty in segments_to_rerun(section, after, claims, each)}
    checkers = {}
    for claim in claims:
        statement = claim.digest
        others = [peer for peer in members if peer != claim.message.peer]
        rare = _fraction(_draw("checked-link", after, statement, "")) >= section.links
        if others and statement not in audited and not rare:
            ranks = {peer: _draw("link-checker", after, statement, peer) for peer in others}
            checkers[statement] = min(others, key=ranks.__getitem__)
    return checkers


def parts_to_reduce(
    section: VerifySection, after: bytes, receipts: Sequence[Signed[Receipt]], auditor: str
) -> tuple[Duty, ...]:
    """The parts of a round that one of its members reduces again: some of each other reducer's share.

    Args:
        after: digest of the state that came of the round.
        receipts: those of its reducers.
    """
    duties = []
    for receipt in receipts:
        if receipt.message.peer == auditor:
            continue
        indices = [part.index for part in receipt.message.parts]
        drawn = sorted(indices, key=lambda index: _draw("audited-part", after, receipt.digest, f"{auditor} {index}"))
        duties += [Duty(receipt.message.peer, receipt.digest, index) for index in drawn[: section.parts]]
    return tuple(duties)


def detection_probability(rate: float, segments: int, cheated: int, auditors: int = 1, colluding: float = 0.0) -> float:
    """The probability that a claim with cheated segments is caught in its round, by the draw above.

    Args:
        rate: `verify.rate`.
        segments, cheated: of the claim.
        auditors: `verify.auditors`.
        colluding: share of the members that would hide it.
    """
    return 1.0 - (1.0 - rate * cheated / segments * (1.0 - colluding)) ** auditors


def _draw(kind: str, after: bytes, statement: bytes, rest: str) -> bytes:
    return digest(kind, after + statement + rest.encode())


def _number(draw: bytes) -> int:
    return int.from_bytes(draw[:8], "big")


def _fraction(draw: bytes) -> float:
    return _number(draw) / 2.0**64
