"""Who checks what of a round: drawn from the state that came of it, which nobody knew when the claims were signed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Drawing:
    """Who checks what of one round. Whoever holds the round's record draws the same.

    Attributes:
        section: the run's rates.
        after: digest of the state that came of the round.
        claims: those of the round, in any order.
        strikes: as in the state that came of the round.
        lengths: hex digest of a shard → seconds of its longest clip, of those that have clips.
    """

    section: VerifySection
    after: bytes
    claims: Sequence[Signed[Claim]]
    strikes: Mapping[str, Strike] = field(default_factory=dict)
    lengths: Mapping[str, float] = field(default_factory=dict)

    def auditors(self, claim: Signed[Claim]) -> dict[str, Duty]:
        """Who trains which segment of a claim again: auditor → duty.

        A claim is audited by the `auditors` other members with the lowest BLAKE3(after ‖ claim ‖ member), of those who
        by the tier in their own claims train its shards. Each draws by the same digest whether it does, at the
        section's rate for this claim's peer, and one segment.
        """
        peer, statement, shards = claim.message.peer, claim.digest, claim.message.shards
        able = [each.message.peer for each in self.claims if trains_all(each.message.tier, shards, self.lengths)]
        ranks = {other: self._draw("auditor", statement, other) for other in able if other != peer}
        rate = audit_rate(self.section, self.strikes, peer)
        duties = {}
        for auditor in sorted(ranks, key=ranks.__getitem__)[: self.section.auditors]:
            if _fraction(self._draw("audit", statement, auditor)) < rate:
                segment = _number(self._draw("audited-segment", statement, auditor)) % claim.message.segments
                duties[auditor] = Duty(peer, statement, segment)
        return duties

    def segments(self, auditor: str) -> tuple[Duty, ...]:
        """The segments of the round that one of its members trains again; see :meth:`auditors`."""
        drawn = map(self.auditors, self.claims)
        return tuple(duties[auditor] for duties in drawn if auditor in duties)

    def link_checker(self, claim: Signed[Claim]) -> str | None:
        """Who compares a claim's last checkpoint with its delta and its norm, if anybody.

        Each claim has another member of any tier for that, drawn at the section's rate, unless a segment of it is
        trained again: its auditor makes the comparison then, and the last checkpoint may be what it must not see before
        it commits to its own.
        """
        checker = self._one_of_others(claim, self.section.links, "checked-link", "link-checker")
        return None if checker is None or self.auditors(claim) else checker

    def links(self, checker: str) -> tuple[Signed[Claim], ...]:
        """The claims of which one of the round's members checks the last link; see :meth:`link_checker`."""
        return tuple(claim for claim in self.claims if self.link_checker(claim) == checker)

    def part_checker(self, receipt: Signed[Receipt]) -> str | None:
        """Who reduces parts of a reducer's share again, if anybody: another member, drawn at the section's rate."""
        return self._one_of_others(receipt, self.section.reductions, "checked-receipt", "part-checker")

    def parts(self, receipts: Sequence[Signed[Receipt]], auditor: str) -> tuple[Duty, ...]:
        """The parts of the round that one of its members reduces again; see :meth:`part_checker`.

        Args:
            receipts: those of the round's reducers.
        """
        duties = []
        for receipt in receipts:
            if self.part_checker(receipt) != auditor:
                continue
            indices = [part.index for part in receipt.message.parts]
            places = {index: self._draw("audited-part", receipt.digest, str(index)) for index in indices}
            drawn = sorted(indices, key=places.__getitem__)[: self.section.parts]
            duties += [Duty(receipt.message.peer, receipt.digest, index) for index in drawn]
        return tuple(duties)

    def _one_of_others(
        self, statement: Signed[Claim] | Signed[Receipt], rate: float, whether: str, who: str
    ) -> str | None:
        """The one member, other than its author, that checks something of a statement; None if it is not drawn.

        Args:
            whether, who: kinds of the two draws.
        """
        others = [each.message.peer for each in self.claims if each.message.peer != statement.message.peer]
        if not others or _fraction(self._draw(whether, statement.digest, "")) >= rate:
            return None
        return min(others, key=lambda peer: self._draw(who, statement.digest, peer))

    def _draw(self, kind: str, statement: bytes, rest: str) -> bytes:
        return digest(kind, self.after + statement + rest.encode())


def detection_probability(rate: float, segments: int, cheated: int, auditors: int = 1, colluding: float = 0.0) -> float:
    """The probability that a claim with cheated segments is caught in its round, by the draw above.

    Args:
        rate: `verify.rate`.
        segments, cheated: of the claim.
        auditors: `verify.auditors`.
        colluding: share of the members that would hide it.
    """
    return 1.0 - (1.0 - rate * cheated / segments * (1.0 - colluding)) ** auditors


def _number(draw: bytes) -> int:
    return int.from_bytes(draw[:8], "big")


def _fraction(draw: bytes) -> float:
    return _number(draw) / 2.0**64
