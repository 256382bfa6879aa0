"""Which state holds: a pure function of the attestations that are seen. It says why, every time.

An attestation for a state says: I computed it. It also speaks for the states it descends from, as
far as parent links are seen. A state *holds* when more than half of the peers that attest anything
now speak for it; among the states that hold, the one of the latest round does. A single peer that
claims round 10⁹ convinces nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
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
    candidates = {(a.round, a.state) for a in latest.values()}
    support = {key: _supporters(key, latest.values()) for key in candidates}
    majority = [key for key in candidates if 2 * len(support[key]) > len(latest)]
    if majority:
        chosen = max(majority, key=lambda key: (key[0], len(support[key])))
        verb = "agree on"
    else:
        work = {key: _stated_work(key, latest.values()) for key in candidates}
        chosen = min(candidates, key=lambda key: (-len(support[key]), -work[key], -key[0], key[1]))
        verb = "are the most for"
    round_number, state = chosen
    supporters = support[chosen]
    reason = f"{len(supporters)} of {len(latest)} peers {verb} state {state.hex()[:8]} before round {round_number}"
    return Agreement(round_number, state, tuple(sorted(supporters)), reason)


def quorum(state: bytes, attestations: Iterable[Attestation], electorate: Collection[str]) -> tuple[bool, str]:
    """Do more than half of the peers that claimed in a round attest this result?

    Args:
        state: digest of the result.
        attestations: the current ones, one a peer.
        electorate: the peers with a valid claim in the round.

    Returns:
        Whether they do, and the sentence that says so.
    """
    votes = {a.peer: a for a in attestations if a.peer in electorate}
    agreeing = [peer for peer, a in votes.items() if state in (a.state, a.parent)]
    enough = 2 * len(agreeing) > len(electorate)
    differing = {a.state.hex()[:8] for a in votes.values() if state not in (a.state, a.parent)}
    others = f"; others attest {', '.join(sorted(differing))}" if differing else ""
    return enough, f"{len(agreeing)} of {len(electorate)} peers attest state {state.hex()[:8]}{others}"


def _supporters(key: tuple[int, bytes], attestations: Iterable[Attestation]) -> set[str]:
    """Peers that attest this state or a descendant of it, following the parents that are seen."""
    attestations = list(attestations)
    parents = _parents(attestations)
    spoken_for = {key}
    grown = True
    while grown:
        children = {child for child, parent in parents.items() if parent in spoken_for} - spoken_for
        grown = bool(children)
        spoken_for |= children
    return {a.peer for a in attestations if (a.round, a.state) in spoken_for}


def _parents(attestations: Sequence[Attestation]) -> dict[tuple[int, bytes], tuple[int, bytes]]:
    """State → its parent, as most of those who attest it say; a state's bytes leave honest peers no choice."""
    stated: dict[tuple[int, bytes], Counter[bytes]] = {}
    for a in attestations:
        stated.setdefault((a.round, a.state), Counter())[a.parent] += 1
    return {
        key: (key[0] - 1, min(counts, key=lambda parent: (-counts[parent], parent))) for key, counts in stated.items()
    }


def _stated_work(key: tuple[int, bytes], attestations: Iterable[Attestation]) -> float:
    """The work in a state: the median of what those who attest it say."""
    return median_low([a.work for a in attestations if (a.round, a.state) == key])
