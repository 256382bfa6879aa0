"""Who checks what: nobody knows before the round is over, everybody computes the same afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import sqrt
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging import shares
from p2pasr.averaging.codec import Layout
from p2pasr.protocol.audits import Drawing, Duty, detection_probability
from p2pasr.protocol.manifest import AveragingSection, VerifySection
from p2pasr.protocol.messages import Claim, Signed, seal
from p2pasr.protocol.tiers import EVERY, TIERS

from .builders import digest_of, make_claim, make_identity, make_manifest, make_receipt, make_state

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
PEERS = tuple(map(make_identity, range(1, 6)))
CLAIMS = tuple(seal(who, make_claim(who, MANIFEST, STATE, segments=number % 4 + 1)) for number, who in enumerate(PEERS))
RECEIPTS = tuple(
    seal(who, make_receipt(who, STATE, CLAIMS, {3 * number + i: b"result" for i in range(3)}))
    for number, who in enumerate(PEERS[:3])
)

AFTERS = st.binary(min_size=32, max_size=32)
SECTIONS = st.builds(
    VerifySection,
    rate=st.floats(0, 1),
    auditors=st.integers(1, 16),
    links=st.floats(0, 1),
    parts=st.integers(0, 5),
    reductions=st.floats(0, 1),
)
AUDITORS = st.sampled_from([who.peer for who in PEERS])


@cache
def after(number: int) -> bytes:
    return digest_of(f"state after draw {number}")


def duties(section: VerifySection, state: bytes, claims: tuple[Signed[Claim], ...] = CLAIMS) -> list[tuple[str, Duty]]:
    """Every duty of every member, with the auditor that it falls to."""
    return [(who.peer, duty) for who in PEERS for duty in Drawing(section, state, claims).segments(who.peer)]


def link_checkers(drawing: Drawing) -> dict[bytes, str]:
    """Digest of a claim → who checks its last link, for those that somebody does."""
    drawn = {claim.digest: drawing.link_checker(claim) for claim in drawing.claims}
    return {statement: checker for statement, checker in drawn.items() if checker is not None}


@given(SECTIONS, AFTERS, st.permutations(CLAIMS), AUDITORS)
def test_everybody_draws_the_same_from_the_same_round(
    section: VerifySection, state: bytes, shuffled: list[Signed[Claim]], auditor: str
) -> None:
    drawn = Drawing(section, state, CLAIMS).segments(auditor)
    assert drawn == Drawing(section, state, CLAIMS).segments(auditor)
    assert set(drawn) == set(Drawing(section, state, shuffled).segments(auditor))
    assert link_checkers(Drawing(section, state, CLAIMS)) == link_checkers(Drawing(section, state, shuffled))
    parts = Drawing(section, state, CLAIMS).parts(RECEIPTS, auditor)
    assert set(parts) == set(Drawing(section, state, CLAIMS).parts(RECEIPTS[::-1], auditor))


@given(SECTIONS, AFTERS)
def test_nobody_checks_itself_and_every_duty_is_about_something_that_was_stated(
    section: VerifySection, state: bytes
) -> None:
    claims = {claim.digest: claim.message for claim in CLAIMS}
    for auditor, duty in duties(section, state):
        assert duty.peer != auditor
        assert claims[duty.statement].peer == duty.peer
        assert 0 <= duty.item < claims[duty.statement].segments
    receipts = {receipt.digest: receipt.message for receipt in RECEIPTS}
    for who in PEERS:
        parts = Drawing(section, state, CLAIMS).parts(RECEIPTS, who.peer)
        assert len(set(parts)) == len(parts)
        for duty in parts:
            assert duty.peer != who.peer
            assert receipts[duty.statement].peer == duty.peer
            assert duty.item in {part.index for part in receipts[duty.statement].parts}


@given(AFTERS, st.integers(1, 16))
def test_at_rate_1_every_claim_has_its_number_of_auditors_and_at_rate_0_none(state: bytes, auditors: int) -> None:
    drawn = duties(VerifySection(rate=1.0, auditors=auditors), state)
    for claim in CLAIMS:
        assert sum(duty.statement == claim.digest for _, duty in drawn) == min(auditors, len(PEERS) - 1)
    assert not duties(VerifySection(rate=0.0, auditors=auditors), state)


@given(SECTIONS, AFTERS)
def test_no_claim_has_both_an_auditor_and_somebody_who_sees_its_last_checkpoint_at_once(
    section: VerifySection, state: bytes
) -> None:
    drawing = Drawing(section, state, CLAIMS)
    checkers = link_checkers(drawing)
    assert checkers == {claim.digest: who.peer for who in PEERS for claim in drawing.links(who.peer)}
    authors = {claim.digest: claim.message.peer for claim in CLAIMS}
    assert all(authors[claim] != checker for claim, checker in checkers.items())
    assert not checkers.keys() & {duty.statement for _, duty in duties(section, state)}


@given(AFTERS, st.floats(0, 1), st.integers(1, 16))
def test_at_links_1_every_claim_is_compared_with_its_delta_by_somebody_and_at_0_by_auditors_only(
    state: bytes, rate: float, auditors: int
) -> None:
    section = VerifySection(rate=rate, auditors=auditors, links=1.0)
    audited = {duty.statement for _, duty in duties(section, state)}
    assert link_checkers(Drawing(section, state, CLAIMS)).keys() | audited == {claim.digest for claim in CLAIMS}
    assert not link_checkers(Drawing(VerifySection(rate=rate, auditors=auditors, links=0.0), state, CLAIMS))


LENGTHS = {digest_of("short").hex(): 4.0, digest_of("long").hex(): 12.0}
tiers = st.sampled_from((EVERY, *TIERS))


def in_tiers(stated: Sequence[int], shards: Sequence[bytes]) -> tuple[Signed[Claim], ...]:
    """The claims of five peers, each in its tier; the first is about these shards."""
    changes: list[dict[str, Any]] = [{"shards": tuple(shards)}, *({} for _ in PEERS[1:])]
    made = zip(PEERS, stated, changes, strict=True)
    return tuple(seal(who, make_claim(who, MANIFEST, STATE, tier=tier, **change)) for who, tier, change in made)


@given(AFTERS, st.lists(tiers, min_size=5, max_size=5), st.integers(1, 4), st.randoms())
def test_only_peers_whose_tier_is_high_enough_are_drawn_and_everybody_draws_the_same(
    state: bytes, stated: list[int], auditors: int, chance: Random
) -> None:
    section = VerifySection(rate=1.0, auditors=auditors)
    claims = in_tiers(stated, [digest_of("short"), digest_of("long"), digest_of("no clips")])
    drawn = Drawing(section, state, claims, {}, LENGTHS).auditors(claims[0])
    able = {who.peer for who, tier in zip(PEERS[1:], stated[1:], strict=True) if tier == EVERY or tier >= 12}
    assert drawn.keys() <= able
    assert len(drawn) == min(auditors, len(able))
    shuffled = chance.sample(claims, len(claims))
    assert drawn == Drawing(section, state, shuffled, {}, LENGTHS).auditors(claims[0])


@given(AFTERS, st.lists(tiers, min_size=5, max_size=5))
def test_a_claim_about_short_clips_is_audited_by_every_tier_whatever_it_states_itself(
    state: bytes, stated: list[int]
) -> None:
    section = VerifySection(rate=1.0, auditors=4)
    claims = in_tiers(stated, [digest_of("short"), digest_of("no clips")])
    drawn = Drawing(section, state, claims, {}, LENGTHS).auditors(claims[0])
    assert drawn.keys() == {who.peer for who in PEERS[1:]}


@given(AFTERS, st.lists(st.sampled_from((5, 10)), min_size=4, max_size=4))
def test_where_nobody_else_can_train_a_claims_shards_its_last_checkpoint_is_compared_instead(
    state: bytes, stated: list[int]
) -> None:
    section = VerifySection(rate=1.0, links=1.0)
    claims = in_tiers([EVERY, *stated], [digest_of("long")])
    assert Drawing(section, state, claims, {}, LENGTHS).auditors(claims[0]) == {}
    assert claims[0].digest in link_checkers(Drawing(section, state, claims, {}, LENGTHS))


@given(AFTERS, st.integers(0, 5), st.permutations(CLAIMS))
def test_at_reductions_1_one_other_member_checks_so_many_parts_of_each_reducer_and_at_0_nobody(
    state: bytes, parts: int, shuffled: list[Signed[Claim]]
) -> None:
    drawing = Drawing(VerifySection(parts=parts, reductions=1.0), state, CLAIMS)
    drawn = [(who.peer, duty) for who in PEERS for duty in drawing.parts(RECEIPTS, who.peer)]
    for receipt in RECEIPTS:
        checker = drawing.part_checker(receipt)
        assert checker != receipt.message.peer
        assert checker == Drawing(VerifySection(reductions=1.0), state, shuffled).part_checker(receipt)
        assert [who for who, duty in drawn if duty.statement == receipt.digest] == [checker] * min(parts, 3)
    unchecked = Drawing(VerifySection(parts=parts, reductions=0.0), state, CLAIMS)
    assert not any(unchecked.parts(RECEIPTS, who.peer) for who in PEERS)


DEMO, WHISPER_SMALL = 217_088, 1_769_472
"""Trained values of the demo's LoRA, and of one of rank 16 in Whisper small."""


@pytest.mark.parametrize("values", [DEMO, WHISPER_SMALL])
@pytest.mark.parametrize("peers", [2, 8, 64])
def test_however_many_peers_there_are_parts_cost_at_most_a_hundredth_of_what_averaging_lora_does(
    values: int, peers: int
) -> None:
    members = tuple(map(make_identity, range(1, peers + 1)))
    claims = tuple(seal(who, make_claim(who, MANIFEST, STATE)) for who in members)
    layout = Layout.of(values, AveragingSection())
    split = {who: share for who, share in zip(members, shares.split(layout.parts, [1.0] * peers), strict=True) if share}
    receipts = [seal(who, make_receipt(who, STATE, claims, dict.fromkeys(share, b""))) for who, share in split.items()]
    drawing = Drawing(VerifySection(reductions=1.0), after(0), claims)
    duties = [duty for receipt in receipts for duty in drawing.parts([receipt], drawing.part_checker(receipt) or "")]
    fetched = sum((peers - 1) * layout.part_bytes(duty.item) for duty in duties)
    averaged = 2 * (peers - 1) * layout.total_bytes
    assert 0 < VerifySection().reductions * fetched <= 0.01 * averaged


def test_a_peer_alone_in_its_round_is_checked_by_nobody() -> None:
    assert Drawing(VerifySection(rate=1.0), after(0), CLAIMS[:1]).segments(PEERS[0].peer) == ()
    assert link_checkers(Drawing(VerifySection(rate=1.0), after(0), CLAIMS[:1])) == {}
    alone = Drawing(VerifySection(parts=4, reductions=1.0), after(0), CLAIMS[:1])
    assert alone.parts(RECEIPTS[:1], PEERS[0].peer) == ()


def within(count: int, draws: int, probability: float) -> bool:
    """Whether a count lies within four standard deviations of a binomial's mean: 1 in 16,000 would not."""
    spread = sqrt(draws * probability * (1 - probability))
    return abs(count - draws * probability) <= 4 * spread


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.7])
@pytest.mark.parametrize("auditors", [1, 3])
def test_over_many_rounds_claims_are_audited_at_the_rate_of_the_manifest(rate: float, auditors: int) -> None:
    section = VerifySection(rate=rate, auditors=auditors)
    rounds = 250
    count = sum(len(duties(section, after(number))) for number in range(rounds))
    assert within(count, rounds * len(CLAIMS) * auditors, rate)


@pytest.mark.parametrize("links", [0.1, 0.6])
def test_over_many_rounds_links_are_checked_at_the_rate_of_the_manifest_by_every_member_alike(links: float) -> None:
    section, rounds = VerifySection(rate=0.0, links=links), 600
    drawn = [link_checkers(Drawing(section, after(number), CLAIMS)) for number in range(rounds)]
    assert within(sum(map(len, drawn)), rounds * len(CLAIMS), links)
    for who in PEERS[1:]:
        count = sum(checkers.get(CLAIMS[0].digest) == who.peer for checkers in drawn)
        assert within(count, rounds, links / 4)


def test_over_many_rounds_every_segment_auditor_and_part_is_drawn_alike() -> None:
    rounds = 600
    claim = CLAIMS[3]  # of four segments
    section = VerifySection(rate=1.0, parts=1, reductions=1.0)
    drawn = [
        next((a, d) for a, d in duties(section, after(n), CLAIMS) if d.statement == claim.digest) for n in range(rounds)
    ]
    for segment in range(4):
        assert within(sum(duty.item == segment for _, duty in drawn), rounds, 1 / 4)
    for who in PEERS:
        if who.peer != claim.message.peer:
            assert within(sum(auditor == who.peer for auditor, _ in drawn), rounds, 1 / 4)
    checks = [
        [
            (who.peer, duty.item)
            for who in PEERS
            for duty in Drawing(section, after(n), CLAIMS).parts(RECEIPTS[:1], who.peer)
        ]
        for n in range(rounds)
    ]
    for index in range(3):
        assert within(sum(item == index for ((_, item),) in checks), rounds, 1 / 3)
    for who in PEERS[1:]:
        assert within(sum(checker == who.peer for ((checker, _),) in checks), rounds, 1 / 4)


@pytest.mark.parametrize("reductions", [1 / 64, 0.4])
def test_over_many_rounds_reducers_are_checked_at_the_rate_of_the_manifest(reductions: float) -> None:
    section, rounds = VerifySection(reductions=reductions), 600
    drawings = [Drawing(section, after(number), CLAIMS) for number in range(rounds)]
    count = sum(drawing.part_checker(receipt) is not None for drawing in drawings for receipt in RECEIPTS)
    assert within(count, rounds * len(RECEIPTS), reductions)


@pytest.mark.parametrize(("rate", "cheated", "auditors"), [(0.25, 1, 1), (0.25, 4, 1), (0.5, 2, 3), (1.0, 4, 1)])
def test_cheats_are_caught_as_often_as_the_formula_says(rate: float, cheated: int, auditors: int) -> None:
    section = VerifySection(rate=rate, auditors=auditors)
    claim, rounds = CLAIMS[3], 400
    caught = 0
    for number in range(rounds):
        found = {duty.item for _, duty in duties(section, after(number)) if duty.statement == claim.digest}
        caught += bool(found & set(range(cheated)))
    assert within(caught, rounds, detection_probability(rate, 4, cheated, auditors))


def test_colluding_members_hide_their_share_of_it() -> None:
    draw = np.random.default_rng(0)
    rate, segments, cheated, auditors, colluding, trials = 0.4, 5, 2, 2, 0.3, 20_000
    hit = draw.random((trials, auditors)) < rate
    hit &= draw.integers(segments, size=(trials, auditors)) < cheated
    hit &= draw.random((trials, auditors)) >= colluding
    expected = detection_probability(rate, segments, cheated, auditors, colluding)
    assert within(int(hit.any(axis=1).sum()), trials, expected)


@given(
    st.floats(0, 1), st.integers(1, 64), st.integers(0, 64), st.integers(1, 16), st.floats(0, 1)
)  # fmt: skip
def test_a_probability_is_one_and_grows_with_what_is_checked(
    rate: float, segments: int, cheated: int, auditors: int, colluding: float
) -> None:
    cheated = min(cheated, segments)
    found = detection_probability(rate, segments, cheated, auditors, colluding)
    assert 0 <= found <= 1
    assert found <= detection_probability(rate, segments, segments, auditors, colluding) + 1e-12
    assert found <= detection_probability(rate, segments, cheated, auditors + 1, colluding) + 1e-12
    assert detection_probability(rate, segments, cheated, auditors, 1.0) == 0


def test_a_claims_author_cannot_know_its_auditors_before_the_round_is_over() -> None:
    section = VerifySection(rate=1.0)
    seen = {
        next(a for a, d in duties(section, after(number)) if d.statement == CLAIMS[0].digest) for number in range(40)
    }
    assert seen == {who.peer for who in PEERS[1:]}
