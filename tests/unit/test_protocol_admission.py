"""Who takes part and whose work counts: by founders, invites, work and credit, the same for everybody."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pasr.averaging import rules
from p2pasr.errors import Ignore, Reject, RemoteError
from p2pasr.protocol.admission import (
    TooEarly,
    admitted,
    check_admitted,
    counting,
    has_worked,
    invites_left,
    limited,
    newcomers,
    surplus,
    work,
)
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import MAX_INVITE_BYTES, NO_TICKET, Claim, Invite, Ticket, seal
from p2pasr.protocol.rules import RoundView, check_attestation, check_claim
from p2pasr.protocol.state import State, advance, parse_state

from .builders import (
    digest_of,
    initial_params,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_mix,
    make_state,
    view_of,
)

FOUNDER, MEMBER, GUEST, OTHER = map(make_identity, (1, 2, 3, 4))
INVITING = {"kind": "invite", "peers": (FOUNDER.peer,), "invites_per_peer": 2}
RUN = make_manifest(admission=INVITING)
WORTH = 4 * RUN.seconds_per_assignment
"""The credit from which on a member may invite."""


def view(credit: float = WORTH, manifest: RunManifest = RUN, **changes: Any) -> RoundView:
    """Round 2 of a run of which the founder and one guest of it are members."""
    fields = {"round": 2, "guests": {MEMBER.peer: FOUNDER.peer}, "credit": {MEMBER.peer: credit}, **changes}
    return dataclasses.replace(view_of(manifest, make_state(manifest)), **fields)


def ticket(by: Any, guest: Any = GUEST, run: bytes = RUN.run_id, expires: int = 5) -> Ticket:
    return Ticket(seal(by, Invite(run, by.peer, guest.peer, expires)).pack(), 0)


# --- invites ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [FOUNDER, MEMBER])
def test_founders_and_members_need_no_invite(who: Any) -> None:
    check_admitted(who.peer, NO_TICKET, RUN, view(0.0))
    check_admitted(who.peer, ticket(OTHER, OTHER), RUN, view(0.0))


@pytest.mark.parametrize("inviter", [FOUNDER, MEMBER])
def test_a_guest_of_a_founder_or_of_a_member_with_enough_merged_work_is_admitted(inviter: Any) -> None:
    check_admitted(GUEST.peer, ticket(inviter), RUN, view())


def test_an_invite_fits_its_limit_and_every_record_that_carries_it() -> None:
    shown = ticket(MEMBER, expires=1 << 31)
    assert len(shown.invite) <= MAX_INVITE_BYTES
    shards, against = (bytes(32),) * 128, tuple(make_identity(n).peer for n in range(16))
    longest = make_claim(GUEST, RUN, make_state(RUN), shards=shards, against=against, hardware="h" * 128, ticket=shown)
    assert len(seal(GUEST, longest).pack()) <= 8192


@pytest.mark.parametrize(
    ("shown", "changes", "error", "sentence"),
    [
        (NO_TICKET, {}, Ignore, "has no invite to this run"),
        (ticket(FOUNDER, run=digest_of("other")), {}, Reject, "is for another run"),
        (ticket(FOUNDER, OTHER), {}, Reject, r"is for \S+, not for \S+$"),
        (ticket(FOUNDER, expires=1), {}, Ignore, "expired after round 1, this is round 2"),
        (ticket(OTHER), {}, TooEarly, r"has 0 s of merged audio before round 2, and who is no founder may invite"),
        (ticket(MEMBER), {"credit": WORTH - 1}, TooEarly, "may invite others from 500 s on"),
        (ticket(OTHER), {"credit": 0.0, "guests": {}}, TooEarly, "has 0 s of merged audio"),
        (ticket(MEMBER), {"bans": {MEMBER.peer: 1}}, Ignore, "was banned in round 1, and its unused invites are void"),
        (
            ticket(FOUNDER),
            {"guests": {MEMBER.peer: FOUNDER.peer, OTHER.peer: FOUNDER.peer}},
            Ignore,
            "is void: .* has brought 2 guests",
        ),
        (Ticket(b"\xc1", 0), {}, Reject, "is not canonical msgpack"),
        (Ticket(seal(FOUNDER, make_attestation(FOUNDER, make_state(RUN))).pack(), 0), {}, Reject, "where a 'invite'"),
    ],
)
def test_a_guest_without_a_good_invite_is_refused(
    shown: Ticket, changes: dict[str, Any], error: type[RemoteError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        check_admitted(GUEST.peer, shown, RUN, view(**changes))


def test_who_lets_anybody_invite_still_lets_members_only() -> None:
    manifest = make_manifest(admission={**INVITING, "invite_credit_rounds": 0})
    shown = ticket(OTHER, run=manifest.run_id)
    with pytest.raises(TooEarly):
        check_admitted(GUEST.peer, shown, manifest, view(manifest=manifest))


@given(st.integers(0, 1 << 16), st.integers(0, 255))
def test_an_invite_of_which_any_byte_was_changed_admits_nobody(place: int, change: int) -> None:
    packed = bytearray(ticket(FOUNDER).invite)
    packed[place % len(packed)] ^= change
    shown = Ticket(bytes(packed), 0)
    if change == 0:
        check_admitted(GUEST.peer, shown, RUN, view())
        return
    with pytest.raises(Reject):
        check_admitted(GUEST.peer, shown, RUN, view())


def test_a_banned_inviters_guests_stay() -> None:
    check_admitted(MEMBER.peer, NO_TICKET, RUN, view(bans={FOUNDER.peer: 1}))
    with pytest.raises(Ignore, match="unused invites are void"):
        check_admitted(GUEST.peer, ticket(FOUNDER), RUN, view(bans={FOUNDER.peer: 1}))


def test_c8_and_a5_claims_and_attestations_of_guests_are_judged_by_their_invites() -> None:
    state = make_state(RUN)
    now = view_of(RUN, state)
    for guest, shown, error in ((GUEST, ticket(FOUNDER), None), (GUEST, NO_TICKET, Ignore), (OTHER, NO_TICKET, Ignore)):
        claim = make_claim(guest, RUN, state, ticket=shown)
        attestation = make_attestation(guest, state, ticket=shown)
        for check in (lambda claim=claim: check_claim(claim, now), lambda a=attestation: check_attestation(a, now)):
            if error is None:
                check()
            else:
                with pytest.raises(error, match="has no invite"):
                    check()


def test_of_the_records_of_one_kind_those_count_whose_authors_take_part() -> None:
    held = view(bans={FOUNDER.peer: 1})
    mixes = {who.peer: make_mix(who, make_state(RUN)) for who in (FOUNDER, MEMBER, GUEST)}
    mixes[OTHER.peer] = make_mix(OTHER, make_state(RUN), ticket=ticket(MEMBER, OTHER))
    assert admitted(mixes, RUN, held).keys() == {MEMBER.peer, OTHER.peer}


# --- many guests at once ------------------------------------------------------------------------------------


def claims_of(numbers: Any, manifest: RunManifest, state: State, inviter: Any = FOUNDER) -> list[Claim]:
    """Claims of guests of one inviter."""
    who = [make_identity(number) for number in numbers]
    return [
        make_claim(each, manifest, state, ticket=ticket(inviter, each, manifest.run_id, manifest.rounds.rounds))
        for each in who
    ]


@given(st.sets(st.integers(10, 60), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 6), st.randoms())
@settings(deadline=None)
def test_an_inviter_brings_no_more_guests_than_it_can_however_they_come(
    numbers: set[int], most: int, before: int, random: Any
) -> None:
    manifest = make_manifest(admission={**INVITING, "invites_per_peer": most})
    state = make_state(manifest)
    guests = {make_identity(100 + number).peer: FOUNDER.peer for number in range(min(before, most))}
    claims = claims_of(sorted(numbers), manifest, state)
    left_out = surplus(claims, manifest, guests)
    assert len(claims) - len(left_out) == min(len(claims), most - len(guests))
    random.shuffle(claims)
    assert surplus(claims, manifest, guests) == left_out
    counted = counting(claims, manifest, {}, guests)
    assert counted == {claim.peer for claim in claims} - left_out
    weighed = rules.weights(claims, manifest, {}, guests)
    assert {claim.peer for claim, weight in zip(claims, weighed, strict=True) if weight > 0} == counted


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
@settings(deadline=None)
def test_every_chain_of_invites_in_the_ledger_ends_in_a_founder(invites: list[tuple[int, int]]) -> None:
    manifest = make_manifest(
        admission={**INVITING, "invite_credit_rounds": 1}, rounds={"rounds": 100, "segments": 1, "shards_per_peer": 6}
    )
    state = make_state(manifest)
    for inviter, guest in invites:
        claims = claims_of([1 + guest], manifest, state, make_identity(1 + inviter))
        claims = [dataclasses.replace(claim, segments=1, steps=3, samples=6) for claim in claims]
        try:
            check_claim(claims[0], view_of(manifest, state))
        except RemoteError:
            continue
        state = advance(state, manifest, claims, state.params, {})
    assert max(Counter(state.guests.values()).values(), default=0) <= 2
    for guest in state.guests:
        chain = [guest]
        while chain[-1] != FOUNDER.peer:
            chain.append(state.guests[chain[-1]])
            assert len(chain) <= 1 + len(state.guests)
    assert state.credit.keys() <= state.guests.keys() | {FOUNDER.peer}
    assert parse_state(state.blob, manifest, initial_params()).guests == state.guests


def test_in_an_open_run_nobody_is_a_guest() -> None:
    manifest = make_manifest()
    state = make_state(manifest)
    claim = make_claim(GUEST, manifest, state, ticket=ticket(FOUNDER, run=manifest.run_id))
    assert advance(state, manifest, [claim], state.params, {}).guests == {}


def test_an_inviter_is_told_how_many_guests_it_can_still_bring() -> None:
    assert invites_left(FOUNDER.peer, RUN, view()) == 1
    assert invites_left(MEMBER.peer, RUN, view()) == 2


# --- proof of work --------------------------------------------------------------------------------------------


@given(st.integers(0, 8), st.integers(0, 1 << 62), st.integers(0, 255))
@settings(deadline=None)
def test_work_that_was_found_is_good_for_its_key_and_run(bits: int, start: int, number: int) -> None:
    peer = make_identity(number).peer
    nonce = work(RUN.run_id, peer, bits, start, lambda _: None)
    assert start <= nonce < start + (1 << 63)
    assert all(has_worked(RUN.run_id, peer, nonce, fewer) for fewer in range(bits + 1))


def test_work_costs_twice_as_much_with_every_bit_and_belongs_to_one_key_and_one_run() -> None:
    nonces = range(4096)
    for bits in (1, 4, 6):
        done = [nonce for nonce in nonces if has_worked(RUN.run_id, GUEST.peer, nonce, bits)]
        expected = len(nonces) / 2**bits
        assert abs(len(done) - expected) < 5 * expected**0.5
        for run, peer in ((digest_of("other"), GUEST.peer), (RUN.run_id, OTHER.peer)):
            assert not all(has_worked(run, peer, nonce, bits) for nonce in done)


@pytest.mark.parametrize("kind", ["open", "allowlist", "invite"])
def test_a_key_without_work_is_refused_whatever_the_kind_of_the_run(kind: str) -> None:
    listed = {} if kind == "open" else {"peers": (FOUNDER.peer,)}
    manifest = make_manifest(admission={"kind": kind, "work_bits": 10, **listed})
    held = view_of(manifest, make_state(manifest))
    nonce = work(held.run, FOUNDER.peer, 10, 0, lambda _: None)
    check_admitted(FOUNDER.peer, Ticket(b"", nonce), manifest, held)
    with pytest.raises(Ignore, match="shows no proof of work of 10 bits"):
        check_admitted(FOUNDER.peer, Ticket(b"", nonce + 1), manifest, held)


def test_a_search_can_be_stopped() -> None:
    def stop(_tries: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(RUN.run_id, GUEST.peer, 32, 0, stop)


# --- newcomers ------------------------------------------------------------------------------------------------


OPEN = make_manifest()
START = make_state(OPEN)
CLAIMS = [make_claim(make_identity(number), OPEN, START, segments=4) for number in range(1, 33)]
credits_of = st.lists(st.sampled_from([0.0, 60.0, 250.0, 400.0, 1e6]), min_size=1, max_size=len(CLAIMS))


@given(credits_of, st.floats(0.01, 0.99))
def test_newcomers_together_weigh_no_more_than_their_share(earned: list[float], share: float) -> None:
    manifest = make_manifest(admission={"newcomer_share": share})
    claims = CLAIMS[: len(earned)]
    credit = {claim.peer: seconds for claim, seconds in zip(claims, earned, strict=True) if seconds}
    new = newcomers(claims, manifest, credit)
    weighed = rules.weights(claims, manifest, credit, {})
    assert len(new) < len(claims)
    assert sum(weighed[position] for position in new) <= share * sum(weighed) * (1 + 1e-9)
    free = rules.weights(claims, make_manifest(admission={"newcomer_share": None}), credit, {})
    assert all(weighed[position] == free[position] for position in range(len(claims)) if position not in new)
    if sum(free[position] for position in new) <= share * sum(free) * (1 - 1e-9):
        assert weighed == free, "who is below the share weighs what it would without"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.floats(0.01, 0.99), st.data())
def test_the_limit_leaves_the_order_among_newcomers_as_it_is(weights: list[float], share: float, data: Any) -> None:
    new = frozenset(data.draw(st.sets(st.integers(0, len(weights) - 1))))
    result = limited(weights, new, share)
    for one in new:
        assert result[one] <= weights[one]
        for other in new:
            assert (weights[one] <= weights[other]) <= (result[one] <= result[other])
    assert all(result[position] == weights[position] for position in range(len(weights)) if position not in new)


def test_where_all_came_together_nobody_is_a_newcomer() -> None:
    for seconds in (0.0, 100.0, 1e6):
        assert newcomers(CLAIMS, OPEN, {claim.peer: seconds for claim in CLAIMS}) == frozenset()


def test_a_newcomer_is_one_until_it_has_half_of_the_most_or_is_through_its_probation() -> None:
    first, second = CLAIMS[:2]
    probation = 4 * OPEN.seconds_per_assignment
    for most, seconds, new in (
        (100.0, 49.0, True),
        (100.0, 50.0, False),
        (1e6, probation - 1, True),
        (1e6, probation, False),
    ):
        found = newcomers([first, second], OPEN, {first.peer: most, second.peer: seconds})
        assert found == (frozenset({1}) if new else frozenset())


@given(st.integers(0, 20), st.integers(0, 12), st.integers(1, 5), st.randoms())
def test_of_peers_without_credit_only_so_many_count_where_there_are_others(
    fresh: int, known: int, most: int, random: Any
) -> None:
    manifest = make_manifest(admission={"newcomers": most})
    claims = CLAIMS[: fresh + known]
    if not claims:
        return
    credit = {claim.peer: 60.0 for claim in claims[:known]}
    counted = counting(claims, manifest, credit, {})
    assert credit.keys() <= counted
    assert len(counted) == known + (min(fresh, most) if known else fresh)
    random.shuffle(claims)
    assert counting(claims, manifest, credit, {}) == counted


@pytest.mark.parametrize("kind", ["mean", "median", "trimmed-mean", "krum", "centered-clip"])
def test_a_claim_that_does_not_count_moves_no_value_under_any_rule(kind: str) -> None:
    manifest = make_manifest(admission={"newcomers": 1}, averaging={"rule": {"kind": kind}})
    claims, credit = CLAIMS[:9], {claim.peer: 1e6 for claim in CLAIMS[:4]}
    counted = counting(claims, manifest, credit, {})
    order = rules.drawn_order(START.digest, [claim.peer for claim in claims])
    center = rules.Center(None, order, newcomers(claims, manifest, credit))
    weighed = rules.weights(claims, manifest, credit, {})

    def averaged(theirs: float) -> bytes:
        honest = [np.random.default_rng(n).normal(size=50).astype(np.float32) for n in range(9)]
        parts = {
            n: part if claims[n].peer in counted else np.full(50, theirs, np.float32) for n, part in enumerate(honest)
        }
        return rules.aggregate(parts, weighed, manifest.averaging.rule, center).tobytes()

    assert len(counted) == 5
    assert averaged(0.0) == averaged(1e6)


@given(st.floats(-1e6, 1e6), st.integers(1, 20))
def test_a_flood_of_new_keys_moves_the_mean_by_no_more_than_its_share_of_twice_an_honest_length(
    value: float, flood: int
) -> None:
    honest, count = 4, 4 + flood
    claims, credit = CLAIMS[:count], {claim.peer: 1e6 for claim in CLAIMS[:honest]}
    parts = {n: np.random.default_rng(n).normal(size=50).astype(np.float32) for n in range(honest)}
    longest = max(rules.norm(part) for part in parts.values())
    sybils = {n: np.full(50, value, np.float32) for n in range(honest, count)}
    center = rules.Center(None, range(count), newcomers(claims, OPEN, credit))
    weighed = rules.weights(claims, OPEN, credit, {})
    alone = rules.weighted_mean(parts, weighed)
    flooded = rules.aggregate({**parts, **sybils}, weighed, OPEN.averaging.rule, center)
    share = sum(weighed[honest:]) / sum(weighed)
    assert share <= 0.5 * (1 + 1e-9)
    assert rules.norm(flooded - np.float32(1 - share) * alone) <= 1.001 * share * 2 * longest
