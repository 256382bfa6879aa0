"""Which state holds: a pure function of the attestations that are seen. It says why, every time.

An attestation for a state also speaks for the states it descends from, as far as parent links are
seen. A state *holds* when more than half of the peers that attest anything now speak for it; among
the states that hold, the one of the latest round does. A single peer that claims round 10⁹
convinces nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

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
    candidates = {(a.round, a.state): a for a in latest.values()}
    support = {key: _supporters(key, latest.values()) for key in candidates}
    majority = [key for key in candidates if 2 * len(support[key]) > len(latest)]
    if majority:
        chosen = max(majority, key=lambda key: (key[0], len(support[key])))
        verb = "agree on"
    else:
        work = {key: a.work for key, a in candidates.items()}
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
    spoken_for = {key}
    grown = True
    while grown:
        children = {
            (a.round, a.state)
            for a in attestations
            if (a.round - 1, a.parent) in spoken_for and (a.round, a.state) not in spoken_for
        }
        grown = bool(children)
        spoken_for |= children
    return {a.peer for a in attestations if (a.round, a.state) in spoken_for}
