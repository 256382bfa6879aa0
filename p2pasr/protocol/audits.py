"""Who checks what of a round: drawn from the state that came of it, which nobody knew when the claims were signed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from p2pasr.protocol.encoding import digest
from p2pasr.protocol.manifest import VerifySection
from p2pasr.protocol.messages import Claim, Receipt, Signed
from p2pasr.protocol.strikes import Strike, audit_rate
from p2pasr.protocol.tiers import trains_all


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


def draw_auditors(
    section: VerifySection,
    after: bytes,
    claim: Signed[Claim],
    members: Iterable[Signed[Claim]],
    strikes: Mapping[str, Strike],
    lengths: Mapping[str, float],
) -> dict[str, Duty]:
    """Who trains which segment of a claim again: auditor → duty.

    A claim is audited by the `auditors` other members with the lowest BLAKE3(after ‖ claim ‖ member), of those who by
    the tier in their own claims train its shards. Each draws by the same digest whether it does, at the section's rate
    for this claim's peer, and one segment.

    Args:
        after: digest of the state that came of the round.
        members: the claims of the round, in any order.
        strikes: as in the state that came of the round.
        lengths: hex digest of a shard → seconds of its longest clip, of those that have clips.
    """
    peer, statement = claim.message.peer, claim.digest
    able = [each.message.peer for each in members if trains_all(each.message.tier, claim.message.shards, lengths)]
    ranks = {other: _draw("auditor", after, statement, other) for other in able if other != peer}
    rate = audit_rate(section, strikes, peer)
    duties = {}
    for auditor in sorted(ranks, key=ranks.__getitem__)[: section.auditors]:
        if _fraction(_draw("audit", after, statement, auditor)) < rate:
            segment = _number(_draw("audited-segment", after, statement, auditor)) % claim.message.segments
            duties[auditor] = Duty(peer, statement, segment)
    return duties


def segments_to_rerun(
    section: VerifySection,
    after: bytes,
    claims: Sequence[Signed[Claim]],
    auditor: str,
    strikes: Mapping[str, Strike],
    lengths: Mapping[str, float],
) -> tuple[Duty, ...]:
    """The segments of a round that one of its members trains again; see :func:`draw_auditors`."""
    drawn = (draw_auditors(section, after, claim, claims, strikes, lengths) for claim in claims)
    return tuple(duties[auditor] for duties in drawn if auditor in duties)


def link_checker(
    section: VerifySection,
    after: bytes,
    claim: Signed[Claim],
    members: Sequence[Signed[Claim]],
    strikes: Mapping[str, Strike],
    lengths: Mapping[str, float],
) -> str | None:
    """Who compares a claim's last checkpoint with its delta and its norm, if anybody.

    Each claim has another member of any tier for that, drawn at the section's rate, unless a segment of it is trained
    again: its auditor makes the comparison then, and the last checkpoint may be what it must not see before it commits
    to its own.

    Args:
        after, members, strikes, lengths: as for :func:`draw_auditors`.
    """
    others = [each.message.peer for each in members if each.message.peer != claim.message.peer]
    if not others or _fraction(_draw("checked-link", after, claim.digest, "")) >= section.links:
        return None
    if draw_auditors(section, after, claim, members, strikes, lengths):
        return None
    return min(others, key=lambda peer: _draw("link-checker", after, claim.digest, peer))


def link_checkers(
    section: VerifySection,
    after: bytes,
    claims: Sequence[Signed[Claim]],
    strikes: Mapping[str, Strike],
    lengths: Mapping[str, float],
) -> dict[bytes, str]:
    """Digest of a claim → who checks its last link, for those that somebody does; see :func:`link_checker`."""
    drawn = {claim.digest: link_checker(section, after, claim, claims, strikes, lengths) for claim in claims}
    return {statement: checker for statement, checker in drawn.items() if checker is not None}


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
