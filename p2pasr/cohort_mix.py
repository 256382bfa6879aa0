"""A round that mixes the cohorts into one state: contribute → agree on a mix → exchange → attest."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from p2pasr.agreeing import (
    ATTEMPTS,
    EXCHANGE_PATIENCE,
    GROUP_SECONDS,
    POLL_SECONDS,
    _with_ours,
    at_once,
    attest,
    attested_in,
    between_looks,
    hold,
    mixes_in,
    overtaken,
)
from p2pasr.auditing import check_last_round, offer
from p2pasr.averaging.codec import Decoded, Layout
from p2pasr.deltas import write_delta
from p2pasr.errors import Reject, RemoteError, RoundFailed, TransportError
from p2pasr.member import Member, Mixed
from p2pasr.peers import sync as syncing
from p2pasr.peers.streams import patience
from p2pasr.protocol import mixing
from p2pasr.protocol.cohorts import Cohort
from p2pasr.protocol.messages import MAX_RECEIPT_BYTES, Attestation, Mix, Receipt, Signed, seal, unseal
from p2pasr.protocol.mixing import NO_CHOICE, Ledger, Part, Tally
from p2pasr.protocol.state import State, parse_state
from p2pasr.verify.record import MixRecord

CONTRIBUTE_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Contribution:
    """What our cohort brings to a mix; all of its members compute the same.

    Attributes:
        common: the state that all cohorts grew from.
        root: Merkle root over the parts of the encoded delta from there, and the ledger.
    """

    common: State
    root: bytes


def mix_cohorts(member: Member) -> bool:
    """Take part in a round that mixes the cohorts into one state.

    Returns:
        Whether a state was committed; otherwise the next call starts over from the state that holds by then.

    Raises:
        LocalError, TransportError: as :func:`p2pasr.round.run_round`.
    """
    reasons: list[str] = []
    check_last_round(member)
    member.closes_at = time.time() + member.manifest.rounds.max_seconds
    for attempt in range(ATTEMPTS):
        try:
            ours = contribute(member)
            tally = Tally(member.state.round, ours.common.digest, ours.common.round)
            parts = agree_on_mix(member, ours, tally)
            if parts is None:
                return False
            receipts: tuple[Signed[Receipt], ...] = ()
            if member.cohort.index in {part.index for part in parts}:
                after, receipts = exchange(member, ours, tally, parts, alone=attempt > 0)
            else:
                after = catch_up(member, ours, tally)
            mates = tally.stated[member.cohort.index]
            voters = {peer for peer, mix in mates.items() if mix.state == member.state.digest}
            result = Mixed(after, frozenset(voters | {member.peer}), receipts)
            seen = attest(member, result)
        except (TransportError, RemoteError) as error:
            reasons.append(str(error))
            member.report.warn(f"round {member.state.round}: the cohorts are not mixed yet: {error}")
            if overtaken(member):
                return False
            continue
        settle_mix(member, result, seen)
        return True
    raise RoundFailed(f"round {member.state.round} was not mixed in {ATTEMPTS} attempts: {reasons[-1]}")


def contribute(member: Member) -> Contribution:
    """Encode what our cohort has learned since the last mix, and give it to others from now on."""
    state, name = member.state, member.cohort.name
    member.step("commit", f"round {state.round}: offering what cohort {name} has learned since the last mix")
    member.say("mixing")
    common = common_state(member)
    encoded = write_delta(member, common.params, state.params)
    root = member.link.call(
        "contribute",
        CONTRIBUTE_SECONDS,
        round=state.round,
        cohort=(state.bits, member.cohort.index),
        delta=encoded.digest,
        ledger=mixing.ledger_since(state, common).pack(member.manifest),
    )["root"]
    return Contribution(common, root)


def common_state(member: Member) -> State:
    """The state that all cohorts grew from; fetched by a peer that came later."""
    digest = member.state.common
    if member.store.find(digest) is None:
        peers = member.records.roster(member.cohort)
        return syncing.fetch_state(member.link, member.store, member.manifest, member.like, digest, peers)
    return parse_state(member.store.get(digest), member.manifest, member.like)


def agree_on_mix(member: Member, ours: Contribution, tally: Tally) -> tuple[Part, ...] | None:
    """Wait until more than half of all peers want to mix the same cohorts.

    A cohort that is late is waited for as long as a round may take.

    Returns:
        What these cohorts contribute; nothing if others have mixed without ours; None when our cohort has a result.
    """
    number, rounds = member.state.round, member.manifest.rounds
    member.step("mix", f"round {number}: agreeing with the other cohorts on what is mixed")
    mix = state_mix(member, stated_before(member, ours))
    deadline = time.time() + rounds.max_seconds + rounds.grace_seconds
    pauses = between_looks()
    while True:
        look_at_cohorts(member, tally)
        decided, better = mixing.decide(tally.votes)
        parts = None if decided is None else tally.named(decided)
        if parts is not None:
            return parts
        if tally.result() is not None:
            return ()
        if mix.chosen == NO_CHOICE and (not tally.missing or time.time() > deadline):
            mix = state_mix(member, _vote(mix, tally.parts, ours.common))
        elif better is not None and (named := tally.named(better)) is not None and better != mix.chosen:
            mix = state_mix(member, _vote(mix, named, ours.common))
        if overtaken(member):
            return None
        late = f", {len(tally.missing)} cohorts are late" if tally.missing else ""
        member.report.wait(
            f"round {number}: {sum(map(any, tally.votes.values()))} of {len(tally.votes)} peers voted{late}"
        )
        time.sleep(next(pauses) * (1 << member.state.bits))


def stated_before(member: Member, ours: Contribution) -> Mix:
    """What this peer stated about this mix before it was killed or failed, for votes are final; at first, no vote."""
    packed, state = member.journal.stated(), member.state
    mix = Mix(
        run=state.run,
        peer=member.peer,
        ticket=member.ticket,
        round=state.round,
        state=state.digest,
        common=ours.common.digest,
        root=ours.root,
        serves=not member.client_mode,
        cohorts=(),
        chosen=NO_CHOICE,
    )
    if packed is None:
        return mix
    before = unseal(packed, Mix).message
    return before if replace(before, cohorts=(), chosen=NO_CHOICE) == mix else mix


def _vote(mix: Mix, parts: tuple[Part, ...], common: State) -> Mix:
    indices = tuple(part.index for part in parts)
    return replace(mix, cohorts=indices, chosen=mixing.choice(common.digest, parts))


def state_mix(member: Member, mix: Mix) -> Mix:
    """Publish what this peer states about the mix, on disk first."""
    signed = seal(member.identity, mix)
    member.journal.state_mix(signed.pack())
    member.records.announce_mix(signed, member.cohort)
    return mix


def look_at_cohorts(member: Member, tally: Tally) -> None:
    """Read what cohorts state about the mix, and who is in those of which no part is agreed yet."""
    bits = member.state.bits
    missing = {*tally.missing, *(set(range(1 << bits)) - tally.attesters.keys())}

    def read(cohort: Cohort) -> None:
        if cohort.index in missing:
            seen = attested_in(member, cohort)
            seen = _with_ours(member, seen) if cohort == member.cohort else seen
            tally.see_attestations(cohort.index, (signed.message for signed in seen.values()))
        tally.see_mixes(cohort.index, mixes_in(member, cohort))

    at_once(read, [Cohort(bits, index) for index in range(1 << bits)])


def exchange(
    member: Member, ours: Contribution, tally: Tally, parts: tuple[Part, ...], *, alone: bool
) -> tuple[State, tuple[Signed[Receipt], ...]]:
    """Mix the cohorts' deltas together with our mates, and apply the mean to the common state.

    Args:
        alone: whether this peer computes all of it by itself, because together it did not come to the same.

    Returns:
        The mixed state, and what mates stated of the shares that they reduced.
    """
    number, common = member.state.round, ours.common
    member.step("average", f"round {number}: mixing {len(parts)} cohorts")
    givers = {part.index: sorted(givers_of(tally, part)) for part in parts}
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    answer = member.link.call(
        "mix",
        EXCHANGE_PATIENCE * patience((2 + len(parts)) * layout.total_bytes if alone else 4 * layout.total_bytes),
        name=mixing.choice(common.digest, parts),
        round=number,
        since=common.round,
        state=member.state.digest,
        cohort=(member.state.bits, member.cohort.index),
        sources=[(part.index, part.state, part.root, givers[part.index]) for part in parts],
        mates=[member.peer] if alone else givers[member.cohort.index],
    )
    ledgers = [
        Ledger.unpack(data, member.manifest, Cohort(member.state.bits, part.index), number - common.round)
        for data, part in zip(answer["ledgers"], parts, strict=True)
    ]
    delta = Decoded(member.store.get(answer["average"]), layout, member.like)
    after = mixing.mixed(common, member.manifest, number, [part.state for part in parts], ledgers, delta)
    receipts = tuple(unseal(data, Receipt, MAX_RECEIPT_BYTES) for data in answer["receipts"])
    return _finite(after), receipts


def givers_of(tally: Tally, part: Part) -> set[str]:
    """The members of a cohort that others can get its part from."""
    stated = tally.stated[part.index].items()
    return {peer for peer, mix in stated if mix.serves and (mix.state, mix.root) == (part.state, part.root)}


def catch_up(member: Member, ours: Contribution, tally: Tally) -> State:
    """What our cohort makes of a mix that others made without it.

    Raises:
        TransportError: they are not done yet.
        Reject: what they attest is no mixed state.
    """
    number = member.state.round
    deadline = time.monotonic() + GROUP_SECONDS
    while (result := tally.result()) is None:
        if time.monotonic() > deadline:
            raise TransportError("others mix without this cohort, and have not attested a result yet")
        time.sleep(POLL_SECONDS)
        tally.attesters.clear()
        look_at_cohorts(member, tally)
    holders = [peer for peer, state in tally.results.items() if state == result]
    member.report.wait(f"others have mixed without cohort {member.cohort.name}; fetching their state")
    mixed = syncing.fetch_state(member.link, member.store, member.manifest, member.like, result, holders)
    if mixed.round != number + 1 or not mixed.is_common:
        raise Reject(f"state {result.hex()[:8]}, which others attest, is no mixed state")
    return _finite(mixing.caught_up(member.state, ours.common, mixed, member.manifest))


def _finite(state: State) -> State:
    """The state, if all of its values are finite.

    Raises:
        Reject: they are not.
    """
    if not all(np.isfinite(value).all() for value in state.params.values()):
        raise Reject("the mix moves the parameters beyond what float32 holds")
    return state


def settle_mix(member: Member, result: Mixed, seen: tuple[Signed[Attestation], ...]) -> None:
    """A mix is committed: keep its record, hold its state, and say so."""
    finished, cohort, after = member.state.round, member.cohort, result.after
    record = MixRecord(
        run=after.run,
        round=finished,
        before=member.state.digest,
        after=after.digest,
        next_round=after.round,
        covered=after.covered,
        credit=after.credit,
        bans=after.bans,
        strikes=after.strikes,
        bits=after.bits,
        guests=dict(after.guests),
        receipts=result.receipts,
        attestations=seen,
    )
    member.journal.record(finished, record.pack())
    hold(member, after)
    member.fresh = False
    try:
        offer(member)
    except TransportError as error:  # the mix stands all the same; it is offered again before the next round
        member.report.warn(f"what was claimed in the last rounds is not open to others: {error}")
    member.report.emit(
        "mix",
        f"round {finished} is done: cohort {cohort.name} mixed with the others, state {after.digest.hex()[:8]}, "
        f"{1 << after.bits} cohorts from now on",
        round=finished,
        state=after.digest,
        cohort=cohort.name,
        bits=after.bits,
        work=after.work,
    )
