"""Strikes: who has one, how long it counts, and what it brings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pasr.protocol.audits import Drawing
from p2pasr.protocol.manifest import VerifySection
from p2pasr.protocol.messages import Claim, seal
from p2pasr.protocol.strikes import Strike, audit_rate, is_strike, strike, suspended

from .builders import digest_of, make_claim, make_identity, make_manifest, make_state

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
WHOS = [make_identity(number) for number in range(1, 8)]
PEERS = [who.peer for who in WHOS]
EVE, ANNE = sorted((make_identity(98).peer, make_identity(99).peer))

SECTIONS = st.builds(
    VerifySection,
    rate=st.floats(0, 1),
    strikes=st.integers(1, 5),
    suspend_rounds=st.integers(1, 9),
    strike_rounds=st.integers(9, 40),
)
ROUNDS = st.integers(0, 1 << 31)
LEDGERS = st.dictionaries(st.sampled_from([EVE, ANNE]), st.tuples(st.integers(1, 1 << 31), ROUNDS))
CLAIMS = [seal(who, make_claim(who, MANIFEST, STATE)) for who in WHOS]
VOTES = st.lists(st.sets(st.sampled_from([EVE, ANNE])), min_size=1, max_size=7)


def claims(votes: list[set[str]]) -> list[Claim]:
    named = [tuple(sorted(names)) for names in votes]
    return [make_claim(make_identity(n), MANIFEST, STATE, strikes=names) for n, names in enumerate(named, 1)]


@given(LEDGERS, VOTES, st.integers(0, 1000), SECTIONS)
def test_more_than_half_of_the_claims_make_one_strike_and_nothing_less_does(
    ledger: dict[str, Strike], votes: list[set[str]], number: int, section: VerifySection
) -> None:
    after = strike(ledger, claims(votes), number, section)
    assert after == strike(ledger, claims(votes[::-1]), number, section)
    assert list(after) == sorted(after)
    for peer in (EVE, ANNE):
        count, last = ledger.get(peer, (0, number))
        counts = count if number + 1 - last <= section.strike_rounds else 0
        if 2 * sum(peer in names for names in votes) > len(votes):
            assert after[peer] == (counts + 1, number)
        else:
            assert after.get(peer, (0, 0))[0] == counts


@given(VOTES, st.integers(0, 1000))
def test_with_strikes_switched_off_nobody_has_one(votes: list[set[str]], number: int) -> None:
    assert strike({}, claims(votes), number, VerifySection(strikes=0)) == {}


@given(LEDGERS, ROUNDS, SECTIONS)
def test_a_suspension_begins_with_enough_strikes_and_ends(
    ledger: dict[str, Strike], number: int, section: VerifySection
) -> None:
    out = suspended(ledger, number, section)
    for peer, (count, last) in ledger.items():
        assert (peer in out) == (count >= section.strikes and number <= last + section.suspend_rounds)
        assert out.get(peer, last + section.suspend_rounds) == last + section.suspend_rounds
    assert all(peer in ledger for peer in out)


@given(SECTIONS, st.integers(1, 1 << 31))
def test_every_strike_doubles_the_rate_and_no_number_of_them_is_too_large(section: VerifySection, count: int) -> None:
    rates = [audit_rate(section, {EVE: (number, 0)}, EVE) for number in (count, count + 1)]
    assert audit_rate(section, {EVE: (count, 0)}, ANNE) == section.rate
    assert audit_rate(section, {EVE: (1, 0)}, EVE) == min(1.0, 2 * section.rate)
    assert section.rate <= rates[0] <= rates[1] <= 1.0
    assert rates[1] == min(1.0, 2 * rates[0]) or count >= 64


@given(st.integers(0, 200), st.integers(0, 3))
def test_who_was_drawn_before_a_strike_is_drawn_after_it_and_for_the_same_segment(number: int, count: int) -> None:
    claim = seal(make_identity(1), make_claim(make_identity(1), MANIFEST, STATE, segments=4))
    section, after = VerifySection(rate=0.25, auditors=3), digest_of(f"after {number}")
    before = Drawing(section, after, CLAIMS).auditors(claim)
    struck = Drawing(section, after, CLAIMS, {PEERS[0]: (count + 1, 3)}).auditors(claim)
    assert before.items() <= struck.items()
    assert len(struck) <= 3
    if count:
        assert len(struck) == 3


@given(st.one_of(st.none(), st.integers(), st.text(), st.lists(st.one_of(st.integers(), st.floats(), st.booleans()))))
def test_only_two_whole_numbers_are_a_strike(value: object) -> None:
    sound = isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value)
    assert is_strike(value) == (sound and 1 <= value[0] <= 1 << 31 and 0 <= value[1] <= 1 << 31)
