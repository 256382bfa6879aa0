"""What a peer pays that keeps from others what it committed to, or accuses them falsely. Pure.

Offline and unwilling look alike, so a strike proves nothing and never bans: it costs weight, brings more audits and,
where it is not the only one, rounds without a part in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from p2pasr.protocol.manifest import VerifySection
from p2pasr.protocol.messages import Claim

MOST_DOUBLINGS: Final = 64
"""No rate above 2⁻⁶⁴ is still below 1 after so many."""

Strike = tuple[int, int]
"""How many strikes of a peer count, and the round of the last."""


def is_strike(value: Any) -> bool:
    """Whether this is an entry of a ledger's strikes, as it was read."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(number) is int and 0 <= number <= 1 << 31 for number in value)
        and value[0] > 0
    )


def strike(
    strikes: Mapping[str, Strike], voters: Iterable[Claim], number: int, section: VerifySection
) -> dict[str, Strike]:
    """Whose strikes count after round `number`: those before, but for the forgotten, and one for each peer that more
    than half of the round's claims name.

    Args:
        voters: all claims of the round's group that count, merged or not.
    """
    claims = list(voters)
    votes = Counter(peer for claim in claims for peer in claim.strikes)
    named = {peer for peer, count in votes.items() if 2 * count > len(claims)} if section.strikes else set()
    remembered = remember_strikes(strikes, number + 1, section)
    fresh = {peer: (remembered.get(peer, (0, number))[0] + 1, number) for peer in named}
    return dict(sorted({**remembered, **fresh}.items()))


def remember_strikes(strikes: Mapping[str, Strike], number: int, section: VerifySection) -> dict[str, Strike]:
    """Those that still count in round `number`, by peer."""
    return {peer: each for peer, each in sorted(strikes.items()) if number - each[1] <= section.strike_rounds}


def suspended(strikes: Mapping[str, Strike], number: int, section: VerifySection) -> dict[str, int]:
    """Who takes no part in round `number` for its strikes: peer → the last round in which it takes none."""
    ends = {peer: last + section.suspend_rounds for peer, (count, last) in strikes.items() if count >= section.strikes}
    return {peer: end for peer, end in ends.items() if number <= end}


def audit_rate(section: VerifySection, strikes: Mapping[str, Strike], peer: str) -> float:
    """The probability with which each auditor of a peer's claim checks it: `verify.rate`, doubled by every strike."""
    count, _ = strikes.get(peer, (0, 0))
    return min(1.0, section.rate * 2.0 ** min(count, MOST_DOUBLINGS))
