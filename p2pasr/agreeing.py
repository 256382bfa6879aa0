"""Agreeing on states: who attests what, what holds, and waiting until enough attest a result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final, TypeVar

from p2pasr.accusing import convict
from p2pasr.errors import Reject, TransportError
from p2pasr.member import Averaged, Member, Result
from p2pasr.peers import sync as syncing
from p2pasr.protocol.agreement import Agreement, quorum, result_of
from p2pasr.protocol.cohorts import MAX_BITS, Cohort, cohort_of
from p2pasr.protocol.messages import MAX_RECEIPT_BYTES, Attestation, Claim, Mix, Receipt, Signed, seal, unseal
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, mix_due
from p2pasr.verify.conflict import Conflict, contradict
from p2pasr.verify.evidence import ConflictProof

T = TypeVar("T")
FIRST_POLL_SECONDS: Final = 0.05
POLL_SECONDS: Final = 0.5
"""How often the directory is read while waiting for others, at first and in the end."""

GROUP_SECONDS: Final = 30.0
"""How long finding a group may take."""

EXCHANGE_PATIENCE: Final = 4
"""An exchange has so many times as long as its bytes take on the slowest link that is put up with."""

ATTEMPTS: Final = 3
"""How often averaging is tried before the round starts over."""

QUORUM_SECONDS: Final = 20.0
RECEIPTS_SECONDS: Final = 30.0
LOOKS_AT_ONCE: Final = 8
"""How many places of the directory are read at a time."""


def between_looks() -> Iterator[float]:
    """Seconds from one look at the directory to the next, in proportion to the wait: most waits are short."""
    pause = FIRST_POLL_SECONDS
    while True:
        yield pause
        pause = min(1.25 * pause, POLL_SECONDS)


def tell_what_is_left(member: Member, agreement: Agreement, votes: Sequence[Attestation]) -> None:
    """Say which rounds of this peer are not in the state that it is about to hold."""
    lines = [vote for vote in votes if vote.peer in agreement.supporters]
    apart = [
        number
        for number, digest in member.journal.held().items()
        if 0 < number <= member.state.round and {vote.at(number) for vote in lines} - {None, digest}
    ]
    if apart:
        member.report.warn(
            f"what this peer trained apart from the others since round {min(apart) - 1} is not in the state that "
            f"holds; the shards of these rounds are still to cover there and will be trained again"
        )


def attestations(member: Member) -> dict[str, Signed[Attestation]]:
    """What everybody in our cohort attests now, this peer too if it has said anything since it started."""
    return _with_ours(member, attested_in(member, member.cohort))


def attested_in(member: Member, cohort: Cohort) -> dict[str, Signed[Attestation]]:
    """What others attest in a cohort, but for those that are banned or suspended."""
    seen, out = member.records.attestations(member.believed, cohort), member.out
    return {peer: signed for peer, signed in seen.items() if peer not in out}


def attestations_around(member: Member) -> dict[str, Signed[Attestation]]:
    """What everybody attests in the cohorts that this peer may belong to.

    Others may have split or joined cohorts meanwhile: into how many is looked for near what this peer knows, and
    everywhere by one that was away or sees nobody.
    """
    bits = member.state.bits
    near = range(max(0, bits - 1), min(bits + 1, MAX_BITS) + 1)
    seen = _with_ours(member, attestations_in(member, near))
    if member.fresh or seen.keys() <= {member.peer}:
        seen = _with_ours(member, attestations_in(member, range(MAX_BITS + 1)))
    return seen


def attestations_in(member: Member, bits: Iterable[int]) -> dict[str, Signed[Attestation]]:
    """What others attest in our cohorts of so many bits; of one that moved from one to the other, what is later."""
    cohorts = [cohort_of(member.state.run, member.peer, number) for number in bits]
    seen: dict[str, Signed[Attestation]] = {}
    for found in at_once(lambda cohort: attested_in(member, cohort), cohorts):
        for peer, signed in found.items():
            if peer not in seen or seen[peer].message.round < signed.message.round:
                seen[peer] = signed
    return seen


def at_once(read: Callable[[Cohort], T], cohorts: Sequence[Cohort]) -> list[T]:
    """What is read of several cohorts, a few at a time: most of a look at the directory is waiting."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return list(pool.map(read, cohorts))


def _with_ours(member: Member, seen: dict[str, Signed[Attestation]]) -> dict[str, Signed[Attestation]]:
    return seen if member.attested is None else seen | {member.peer: member.attested}


def what_holds(member: Member, seen: dict[str, Signed[Attestation]]) -> Agreement | None:
    """The state that holds, if it is another than ours."""
    votes = [signed.message for signed in seen.values()]
    return syncing.newest_state(member.state, votes, electorate(member, votes), member.journal)


def electorate(member: Member, votes: Sequence[Attestation]) -> set[str]:
    """Who has a say in what comes of the round under way: the peers that claimed in it or still train.

    This peer is one of them while its own part can still be averaged, or when it has a result of its own; otherwise
    it follows the rest.
    """
    number, state = member.state.round, member.state.digest
    if not any(vote.at(number) == state and vote.at(number + 1) for vote in votes):
        return set()  # nobody says that the round is over
    roster = member.records.roster(member.cohort)
    working = {peer for peer, entry in member.in_our_round(roster).items() if entry.stage != "waiting"}
    if member.unsettled is not None or time.time() < member.closes_at + member.manifest.rounds.grace_seconds:
        working.add(member.peer)
    return working | takers(member)


def takers(member: Member) -> set[str]:
    """Who takes part in the round for all to see: those that claimed in it, or stated their part in its mix."""
    if not mix_due(member.state, member.manifest):
        return set(claims_shown(member))
    mixes = mixes_in(member, member.cohort)
    return {mix.peer for mix in mixes if mix.state == member.state.digest}


def hold(member: Member, state: State) -> None:
    """Make a state ours, on disk first."""
    member.store.put("state", *state.pieces)
    member.journal.hold(state.round, state.digest)
    if state.strikes.get(member.peer) not in (None, member.state.strikes.get(member.peer)):
        member.report.warn(strike_warning(member, state))
    member.lineage = member.line_to(state)
    member.state = state
    member.unsettled = None
    member.closes_at = 0.0
    member.shunned.clear()
    member.shown = {}
    kept = sorted(member.journal.held().items())[-member.manifest.retention.state_rounds :]
    member.store.retain("state", {digest for _, digest in kept} | {state.common})


def strike_warning(member: Member, state: State) -> str:
    """What a peer is told that has a new strike in a state."""
    (count, last), section = state.strikes[member.peer], member.manifest.verify
    reach = "; in client mode only peers that it is connected to reach it, so leave that out if you can"
    return (
        f"this peer was struck in round {last}: more than half of the round's peers could not have what it claimed, or "
        f"were shown a false proof by it. Until round {last + section.strike_rounds} it weighs what a newcomer does, "
        f"is audited more often, and after {section.strikes} strikes it is suspended; these are {count}"
        + (reach if member.client_mode else "")
    )


def overtaken(member: Member) -> bool:
    """Whether the others have agreed on a result of this round without waiting for us."""
    seen = attestations(member)
    if member.unsettled is not None and agreeing(member.unsettled, seen)[0]:
        return True
    agreement = what_holds(member, seen)
    if agreement is not None:
        member.report.wait(f"{agreement.reason}; joining it")
    return agreement is not None


def mixes_in(member: Member, cohort: Cohort) -> list[Mix]:
    """What those who take part state about the mix under way in a cohort."""
    mixes = member.records.mixes(cohort, member.state.round)
    return list(member.admitted({peer: signed.message for peer, signed in mixes.items()}).values())


def attest(member: Member, result: Result) -> tuple[Signed[Attestation], ...]:
    """Sign the new state and wait until more than half of the round's peers have signed the same.

    Returns:
        The attestations that make the quorum.

    Raises:
        TransportError: no quorum in time, or one for another result. Our attestation stands, and should the quorum
            come later, the result counts then: to take a vote back could split those who have counted it already.
    """
    after = result.after
    member.step("attest", f"round {member.state.round}: attesting state {after.digest.hex()[:8]}")
    member.store.put("state", *after.pieces)
    publish_attestation(member, after)
    member.unsettled = result
    deadline = time.monotonic() + QUORUM_SECONDS
    compared = False
    pauses = between_looks()
    while True:
        seen = attestations(member)
        others = rivals(member, result, seen)
        if not others <= result.electorate:
            result = member.unsettled = replace(result, electorate=result.electorate | others)
        enough, reason = agreeing(result, seen)
        if enough:
            return attesters(result, seen)
        if isinstance(result, Averaged) and others and not compared:
            compared = True
            compare_receipts(member, result)
        votes = [signed.message for signed in seen.values()]
        other = result_of(member.state.round, member.state.digest, votes, result.electorate)
        if other is not None and other.state != after.parent:  # a mix can lead on by two rounds
            raise TransportError(f"the round ended otherwise: {other.reason}")
        if time.monotonic() > deadline:
            raise TransportError(f"no quorum within {QUORUM_SECONDS:.0f} s: {reason}")
        member.report.wait(f"round {member.state.round}: {reason}; waiting for more")
        time.sleep(next(pauses))


def agreeing(result: Result, seen: dict[str, Signed[Attestation]]) -> tuple[bool, str]:
    """Whether more than half of a round's peers attest this result, and the sentence that says so."""
    votes = [signed.message for signed in seen.values()]
    return quorum(result.after.round, result.after.digest, votes, result.electorate)


def rivals(member: Member, result: Result, seen: dict[str, Signed[Attestation]]) -> set[str]:
    """The peers of the round that made something else of it, also those that this one did not expect to average.

    These have a say too: groups that know nothing of each other could else each reach a quorum of their own.
    """
    before, after = member.state, result.after
    votes = [v for v in (signed.message for signed in seen.values()) if v.at(before.round) == before.digest]
    others = {v.peer for v in votes if v.at(after.round) not in (None, after.digest)}
    if others <= result.electorate:
        return others
    return others & (result.electorate | takers(member))


def claims_shown(member: Member) -> dict[str, Signed[Claim]]:
    """The claims of the round that others show in the directory now, compared with those that they showed before."""
    claims = member.records.claims(member.view)
    compare_claims(member, claims.values())
    member.shown = claims
    return claims


def compare_claims(member: Member, claims: Iterable[Signed[Claim]]) -> None:
    """See whether the authors of these claims showed others in the directory, and keep the proofs.

    The round goes on with them: not all members have seen both claims, and they are banned with the next.
    """
    for claim in claims:
        shown = member.shown.get(claim.message.peer)
        if shown is not None and shown.message.peer not in member.proved and contradict(shown, claim):
            conflict = Conflict(shown, claim)
            convict(member, ConflictProof(conflict), str(conflict))


def compare_receipts(member: Member, result: Averaged) -> None:
    """See whether a reducer told others something else than us, and keep the proof.

    Raises:
        Reject: one did; the round is averaged again without it.
    """
    packed = member.link.call("receipts", RECEIPTS_SECONDS, group=result.merged.group)["receipts"]
    theirs = [unseal(data, Receipt, MAX_RECEIPT_BYTES) for data in packed]
    found = {
        ours.message.peer: Conflict(ours, other)
        for ours in result.merged.receipts
        for other in theirs
        if contradict(ours, other)
    }
    for conflict in found.values():
        convict(member, ConflictProof(conflict), str(conflict))
    if found:
        member.shunned.update(found)
        raise Reject(f"{', '.join(map(short, sorted(found)))} gave members different results")


def attesters(result: Result, seen: dict[str, Signed[Attestation]]) -> tuple[Signed[Attestation], ...]:
    """The attestations that speak for a result."""
    return tuple(s for s in seen.values() if s.message.at(result.after.round) == result.after.digest)


def publish_attestation(member: Member, state: State) -> None:
    """Attest a state in the directory; the state must be in the store, for others will ask for it."""
    line, work = member.line_to(state), float(state.work)
    member.attested = seal(
        member.identity, Attestation(state.run, member.peer, member.ticket, state.round, state.digest, line, work)
    )
    member.attested_in = member.cohort
    member.records.announce_attestation(member.attested, member.cohort)
