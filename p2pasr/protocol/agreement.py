"""Which state holds: a pure function of the attestations that are seen. It says why, every time.

An attestation for a state says: I hold it. It names the states that it grew from and so speaks for
them too, but for nobody else's. A state *holds* when more than half of the peers that attest
anything now speak for it; among the states that hold, the one of the latest round does. A single
peer that claims round 10⁹ convinces nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from statistics import median_low

from p2pasr.protocol.messages import Attestation


@dataclass(frozen=True, slots=True)
class Agreement:
    """The outcome of counting.

    Attributes:
        round, state: what holds; None where nothing does.
        supporters: the peers that speak for it, sorted.
        reason: one sentence for the person at the machine.
    """

    round: int | None
    state: bytes | None
    supporters: tuple[str, ...]
    reason: str


def agree(attestations: Iterable[Attestation]) -> Agreement:
    """Count the current attestations, one a peer.

    Where no state has a majority – two peers that trained apart, three that differ – the state with
    more supporters holds, then the one with more work, then the later round, then the lower digest,
    so that everyone who sees the same attestations makes the same choice.
    """
    latest = {attestation.peer: attestation for attestation in attestations}
    if not latest:
        return Agreement(None, None, (), "nobody attests a state yet")
    votes = latest.values()
    candidates = {(a.round, a.state) for a in votes}
    support = {(number, state): {a.peer for a in votes if a.at(number) == state} for number, state in candidates}
    majority = [key for key in candidates if 2 * len(support[key]) > len(latest)]
    if majority:
        chosen = max(majority, key=lambda key: (key[0], len(support[key])))
        verb = "agree on"
    else:
        work = {key: median_low([a.work for a in votes if (a.round, a.state) == key]) for key in candidates}
        chosen = min(candidates, key=lambda key: (-len(support[key]), -work[key], -key[0], key[1]))
        verb = "are the most for"
    number, state = chosen
    supporters = tuple(sorted(support[chosen]))
    reason = f"{len(supporters)} of {len(latest)} peers {verb} state {state.hex()[:8]} before round {number}"
    return Agreement(number, state, supporters, reason)


def result_of(
    number: int, state: bytes, attestations: Iterable[Attestation], electorate: Collection[str]
) -> Agreement | None:
    """What the peers of a round made of it, if more than half of them attest the same.

    Others who still stand where the round began, such as those who came too late for it, have no say.

    Args:
        number, state: the round, and the digest of the state that it started from.
        attestations: the current ones, one a peer.
        electorate: the peers that claimed, or still train, in the round.
    """
    votes = [a for a in attestations if a.peer in electorate and a.at(number) == state]
    for result in {a.at(number + 1) for a in votes}:
        if result is None:
            continue
        enough, reason = quorum(number + 1, result, votes, electorate)
        if enough:
            supporters = tuple(sorted(a.peer for a in votes if a.at(number + 1) == result))
            return Agreement(number + 1, result, supporters, reason)
    return None


def quorum(
    number: int, state: bytes, attestations: Iterable[Attestation], electorate: Collection[str]
) -> tuple[bool, str]:
    """Do more than half of the peers that claimed in a round attest this result?

    Args:
        number, state: the round after it, and the digest of the result.
        attestations: the current ones, one a peer.
        electorate: the peers with a valid claim in the round.

    Returns:
        Whether they do, and the sentence that says so.
    """
    votes = {a.peer: a for a in attestations if a.peer in electorate}
    agreeing = [peer for peer, a in votes.items() if a.at(number) == state]
    enough = 2 * len(agreeing) > len(electorate)
    differing = {a.state.hex()[:8] for a in votes.values() if a.at(number) != state}
    others = f"; others attest {', '.join(sorted(differing))}" if differing else ""
    return enough, f"{len(agreeing)} of {len(electorate)} peers attest state {state.hex()[:8]}{others}"
