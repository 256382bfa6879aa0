"""How claims are weighed and parts are averaged: by what anyone can compute, with the same bits everywhere."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging import rules
from p2pasr.averaging.codec import CEILING, Codec, CodecName, Vector
from p2pasr.averaging.rules import (
    Center,
    aggregate,
    centered_clip,
    clip,
    drawn_order,
    krum,
    norm,
    trimmed_mean,
    trust,
    weighted_mean,
)
from p2pasr.protocol.manifest import RuleSection, RunManifest
from p2pasr.protocol.messages import NO_UNDO, Claim, message_digest
from p2pasr.protocol.state import shard_seconds

from .builders import make_claim, make_identity, make_manifest, make_state, random_delta

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
SECONDS = shard_seconds(MANIFEST)
FIRST = make_manifest(data={"duplicates": "first"})
weights = partial(rules.weights, guests={})
EARNED = {make_identity(number).peer: 1e6 for number in range(1, 10)}
"""The credit of peers that weigh in full."""


def claim_of(number: int, *shards: int, manifest: RunManifest = MANIFEST, **changes: Any) -> Claim:
    """A claim that names shards by their place in the manifest."""
    named = tuple(bytes.fromhex(manifest.shards[shard].digest) for shard in shards)
    return make_claim(make_identity(number), manifest, STATE, **({"shards": named} if shards else {}), **changes)


def test_a_claim_weighs_the_seconds_of_its_shards_scaled_by_its_segments() -> None:
    claims = [claim_of(1, 0, 1, segments=4), claim_of(2, 2, 3, segments=2), claim_of(3, 5, segments=1)]
    assert weights(claims, MANIFEST, EARNED) == pytest.approx((60 + 61, (62 + 63) / 2, 65 / 4))


def test_who_is_banned_with_a_round_weighs_nothing_in_it_and_the_others_what_they_would() -> None:
    eve = make_identity(3).peer
    claims = [claim_of(number) for number in (1, 2, 3)]
    straight = weights(claims, MANIFEST, EARNED)
    accusing = [dataclasses.replace(claim, against=(eve,), undo=(NO_UNDO,)) for claim in claims[:2]]
    assert weights([accusing[0], *claims[1:]], MANIFEST, EARNED) == straight
    assert weights([*accusing, claims[2]], MANIFEST, EARNED) == (*straight[:2], 0.0)


def test_what_a_peer_says_about_itself_does_not_enter_its_weight() -> None:
    honest = claim_of(1, 0, 1)
    boasting = claim_of(1, 0, 1, steps=1 << 24, samples=1 << 40, delta_norm=1e15, loss_after=-1e9, hardware="best")
    other = claim_of(2, 2, 3)
    for credit in ({}, EARNED, {honest.peer: 200.0}):
        assert weights([honest, other], MANIFEST, credit) == weights([boasting, other], MANIFEST, credit)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.floats(1, 8))
def test_no_weight_exceeds_the_cap_and_smaller_ones_are_untouched(segments: list[int], cap: float) -> None:
    manifest = make_manifest(averaging={"weight_cap": cap})
    claims = [claim_of(n + 1, n % 6, segments=count) for n, count in enumerate(segments)]
    raw = [SECONDS[claim.shards[0].hex()] * claim.segments / 4 for claim in claims]
    limit = cap * median(raw)
    assert weights(claims, manifest, EARNED) == pytest.approx([min(weight, limit) for weight in raw])
    assert max(weights(claims, manifest, EARNED)) <= limit


def test_the_cap_binds() -> None:
    manifest = make_manifest(averaging={"weight_cap": 1.5})
    claims = [claim_of(1, 0, segments=1), claim_of(2, 0, segments=1), claim_of(3, 0, 1, 2, 3, 4, 5, segments=4)]
    assert weights(claims, manifest, EARNED) == pytest.approx((15, 15, 22.5))


@given(st.permutations(range(5)))
def test_a_weight_belongs_to_the_claim_and_not_to_its_place(order: list[int]) -> None:
    claims = [claim_of(number + 1, segments=1 + number % 4) for number in range(5)]
    for manifest in (MANIFEST, FIRST):
        straight = weights(claims, manifest, EARNED)
        assert weights([claims[n] for n in order], manifest, EARNED) == tuple(straight[n] for n in order)


def test_duplicates_count_for_everybody_under_average() -> None:
    claims = [claim_of(1, 0, 1, segments=4), claim_of(2, 0, 1, segments=4)]
    assert weights(claims, MANIFEST, EARNED) == (121.0, 121.0)


def test_duplicates_count_for_the_claim_of_the_lowest_digest_under_first() -> None:
    claims = [claim_of(number, 0, 1, segments=4) for number in range(1, 5)]
    lowest = min(range(4), key=lambda n: message_digest(claims[n]))
    manifest = make_manifest(data={"duplicates": "first"}, averaging={"weight_cap": 1e9})
    assert weights(claims, manifest, EARNED) == tuple(121.0 if n == lowest else 0.0 for n in range(4))


def test_a_claim_that_shares_some_shards_keeps_the_others_under_first() -> None:
    one, two = claim_of(1, 0, 1, segments=4), claim_of(2, 1, 2, segments=4)
    first, second = weights([one, two], FIRST, EARNED)
    shared_goes_to_one = message_digest(one) < message_digest(two)
    assert (first, second) == ((121.0, 62.0) if shared_goes_to_one else (60.0, 123.0))


def test_the_weights_under_first_add_up_to_the_audio_without_duplicates() -> None:
    claims = [claim_of(number, segments=4) for number in range(1, 9)]
    distinct = {shard.hex() for claim in claims for shard in claim.shards}
    manifest = make_manifest(data={"duplicates": "first"}, averaging={"weight_cap": 1e9})
    assert sum(weights(claims, manifest, EARNED)) == pytest.approx(sum(SECONDS[shard] for shard in distinct))


@pytest.mark.parametrize(("rounds_worth", "expected"), [(0, 0.25), (1, 0.4375), (2, 0.625), (4, 1.0), (40, 1.0)])
def test_a_newcomer_weighs_a_quarter_and_grows_to_all_of_it(rounds_worth: int, expected: float) -> None:
    seconds = np.mean(list(SECONDS.values())) * 2  # two shards a round
    assert trust(rounds_worth * float(seconds), MANIFEST) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=9), st.integers(0, 1000), st.integers(1, 8))
def test_trust_grows_with_credit_and_never_beyond_one(earned: list[float], rounds: int, shards: int) -> None:
    manifest = make_manifest(averaging={"probation_rounds": rounds}, rounds={"shards_per_peer": shards})
    trusted = [trust(credit, manifest) for credit in sorted(earned)]
    assert trusted == sorted(trusted)
    assert all(0.25 <= share <= 1 for share in trusted)


def test_without_probation_a_newcomer_weighs_in_full() -> None:
    claims = [claim_of(1, 0, 1), claim_of(2, 2, 3)]
    manifest = make_manifest(averaging={"probation_rounds": 0})
    assert weights(claims, manifest, {}) == weights(claims, manifest, EARNED) == weights(claims, MANIFEST, EARNED)


def test_a_newcomer_weighs_less_than_a_peer_that_did_the_same_and_has_earned_credit() -> None:
    claims = [claim_of(1, 0, 1, segments=4), claim_of(2, 0, 1, segments=4)]
    assert weights(claims, MANIFEST, {claims[1].peer: 1e6}) == (121 / 4, 121.0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=7))
def test_among_newcomers_only_nobody_is_worse_off(segments: list[int]) -> None:
    claims = [claim_of(n + 1, n % 6, segments=count) for n, count in enumerate(segments)]
    parts = {position: random_delta(position, 20) for position in range(len(claims))}
    fresh, earned = (weighted_mean(parts, weights(claims, MANIFEST, credit)) for credit in ({}, EARNED))
    assert fresh.tobytes() == earned.tobytes()


def test_the_cap_binds_trusted_weights() -> None:
    manifest = make_manifest(averaging={"weight_cap": 1.5}, admission={"newcomer_share": None})
    claims = [claim_of(number, 0, 1, segments=4) for number in (1, 2, 3)]
    assert weights(claims, manifest, {claims[2].peer: 1e6}) == (121 / 4, 121 / 4, 1.5 * 121 / 4)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_mean_is_that_of_numpy(count: int) -> None:
    parts = {position: random_delta(position, 1000) for position in range(count)}
    weighing = tuple(1.0 + position for position in range(count))
    expected = np.average([parts[n].astype(np.float64) for n in range(count)], axis=0, weights=weighing)
    mean = weighted_mean(parts, weighing)
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


@given(st.permutations(range(5)))
def test_the_order_of_arrival_does_not_change_a_bit(order: list[int]) -> None:
    parts = {position: random_delta(position, 50) for position in range(5)}
    weighing = (60.0, 61.5, 0.0, 1e-3, 200.0)
    arrived = {position: parts[position] for position in order}
    assert weighted_mean(arrived, weighing).tobytes() == weighted_mean(parts, weighing).tobytes()


def test_only_the_included_senders_share_the_weight() -> None:
    parts = {1: np.ones(4, np.float32), 3: np.full(4, 5, np.float32)}
    np.testing.assert_allclose(weighted_mean(parts, (1e9, 1.0, 1e9, 3.0)), 4.0, rtol=1e-6)


def test_senders_without_weight_count_alike_when_nobody_has_any() -> None:
    parts = {0: np.ones(4, np.float32), 1: np.full(4, 5, np.float32)}
    np.testing.assert_allclose(weighted_mean(parts, (0.0, 0.0, 7.0)), 3.0, rtol=1e-6)
    np.testing.assert_allclose(weighted_mean({0: parts[0], 1: parts[1]}, (0.0, 2.0)), 5.0, rtol=1e-6)


def test_one_sender_is_its_own_mean_bit_for_bit() -> None:
    part = random_delta(1, 100)
    assert weighted_mean({4: part}, (0.0, 0.0, 0.0, 0.0, 17.3)).tobytes() == part.tobytes()


def test_each_share_is_rounded_once_and_each_sum_once() -> None:
    parts = {position: random_delta(position, 200) for position in range(3)}
    weighing = (60.0, 61.5, 200.0)
    expected = np.zeros(200, np.float32)
    for position in range(3):
        share = np.float32(weighing[position] / math.fsum(weighing))
        expected = (expected + (parts[position] * share).astype(np.float32)).astype(np.float32)
    assert weighted_mean(parts, weighing).tobytes() == expected.tobytes()


def test_the_parts_are_not_touched() -> None:
    parts = {0: random_delta(0, 10), 1: random_delta(1, 10)}
    copies = {position: part.copy() for position, part in parts.items()}
    weighted_mean(parts, (1.0, 2.0))
    for position, part in parts.items():
        np.testing.assert_array_equal(part, copies[position])


KINDS = ("mean", "trimmed-mean", "median", "krum", "centered-clip")
START = Center(None, range(12))
honest_parts = st.integers(3, 9).map(lambda count: [random_delta(number, 40) for number in range(count)])


def hostile(count: int, size: float) -> list[Vector]:
    return [np.full(40, size, np.float32)] * count


@pytest.mark.parametrize("kind", KINDS)
@given(parts=honest_parts, random=st.randoms(use_true_random=False))
def test_who_came_first_does_not_matter(kind: Any, parts: list[Vector], random: Any) -> None:
    rule = RuleSection(kind=kind)
    order = list(range(len(parts)))
    random.shuffle(order)
    weighing = [60.0 + n for n in order]
    arrived = {position: parts[position] for position in order}
    expected = aggregate(dict(enumerate(parts)), weighing, rule, START)
    assert aggregate(arrived, weighing, rule, START).tobytes() == expected.tobytes()


CODECS: list[CodecName] = ["float32", "float16", "int8", "int4"]
extreme = st.sampled_from([CEILING, -CEILING, 1.0, 0.0])


@pytest.mark.parametrize("kind", KINDS)
@given(
    signs=st.lists(st.lists(extreme, min_size=4, max_size=4), min_size=1, max_size=12),
    name=st.sampled_from(CODECS),
    weighing=st.lists(st.floats(0.1, 4), min_size=12, max_size=12),
)
def test_of_whatever_parts_can_be_decoded_there_is_a_result_and_it_can_be_decoded(
    kind: Any, signs: list[list[float]], name: CodecName, weighing: list[float]
) -> None:
    parts = {position: np.array(values, np.float32) for position, values in enumerate(signs)}
    reference = np.array([CEILING, -CEILING, CEILING, 0], np.float32)
    rule = RuleSection(kind=kind, radius=1e6, iterations=100, bucket=1)
    codec = Codec(name, 16)
    with np.errstate(all="raise", under="ignore"):
        result = aggregate(parts, weighing, rule, Center(reference, range(12)))
        assert codec.decode(codec.encode(result), 4).shape == (4,)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_parts_and_a_single_one_stay_as_they_are(kind: Any) -> None:
    part = random_delta(1, 40)
    rule = RuleSection(kind=kind)
    assert aggregate({3: part}, (1.0,) * 4, rule, START).tobytes() == part.tobytes()
    np.testing.assert_allclose(aggregate(dict.fromkeys(range(5), part), (1.0,) * 5, rule, START), part, rtol=1e-6)


@given(honest_parts, st.floats(1, 8))
def test_no_part_is_longer_than_the_multiple_of_the_median_and_shorter_ones_are_untouched(
    parts: list[Vector], multiple: float
) -> None:
    parts = [part * np.float32(4**number) for number, part in enumerate(parts)]
    limit = multiple * median(map(norm, parts))
    for position, clipped in clip(dict(enumerate(parts)), multiple).items():
        if norm(parts[position]) <= limit:
            assert clipped.tobytes() == parts[position].tobytes()
        else:
            assert norm(clipped) == pytest.approx(limit, rel=1e-5)
            np.testing.assert_allclose(clipped / norm(clipped), parts[position] / norm(parts[position]), atol=1e-5)


@given(honest_parts, st.floats(0, 0.49))
def test_trimming_leaves_the_same_share_out_at_both_ends(parts: list[Vector], trim: float) -> None:
    cut = int(trim * len(parts))
    expected = np.sort(np.stack(parts).astype(np.float64), axis=0)[cut : len(parts) - cut].mean(axis=0)
    np.testing.assert_allclose(trimmed_mean(parts, trim), expected, rtol=1e-4, atol=1e-6)


@given(honest_parts)
def test_the_median_is_numpys(parts: list[Vector]) -> None:
    expected = np.median(np.stack(parts).astype(np.float64), axis=0)
    np.testing.assert_allclose(trimmed_mean(parts, 0.5), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [3e38, -3e38, 50.0, -0.5])
@given(parts=honest_parts, data=st.data())
def test_a_minority_keeps_the_median_among_the_honest_values(
    size: float, parts: list[Vector], data: st.DataObject
) -> None:
    bad = hostile(data.draw(st.integers(0, len(parts) - 1)), size)
    result = trimmed_mean([*parts, *bad], 0.5)
    slack = 1e-5
    assert (result >= np.min(parts, axis=0) - slack).all()
    assert (result <= np.max(parts, axis=0) + slack).all()


@pytest.mark.parametrize("size", [3e38, -3e38, 50.0])
@given(parts=honest_parts)
def test_as_many_as_are_trimmed_do_no_more(size: float, parts: list[Vector]) -> None:
    bad = hostile(len(parts) // 4, size)
    everybody = [*parts, *bad]
    result = trimmed_mean(everybody, 0.21)
    if int(0.21 * len(everybody)) >= len(bad):
        assert (result >= np.min(parts, axis=0) - 1e-5).all()
        assert (result <= np.max(parts, axis=0) + 1e-5).all()


@pytest.mark.parametrize("size", [1e30, -5.0])
def test_krum_chooses_an_honest_part(size: float) -> None:
    base = random_delta(0, 40)
    parts = [base + np.float32(0.01) * random_delta(number, 40) for number in range(1, 8)]
    for count in (1, 2):
        chosen = krum([*hostile(count, size), *parts], 0.25)
        assert any(chosen is part for part in parts)


def test_one_member_bends_the_clipped_mean_by_no_more_than_its_limit() -> None:
    parts = dict(enumerate([random_delta(number, 40) for number in range(9)]))
    honest = weighted_mean(parts, (1.0,) * 9)
    parts[9] = np.full(40, 1e6, np.float32)
    bent = aggregate(parts, (1.0,) * 10, RuleSection(), START)
    limit = 2 * median(map(norm, parts.values()))
    assert norm(bent - np.float32(0.9) * honest) <= 1.001 * limit / 10
    unbounded = aggregate(parts, (1.0,) * 10, RuleSection(clip_norm=None), START)
    assert norm(unbounded) > 1e5


PEERS = [make_identity(number).peer for number in range(1, 13)]


@given(st.permutations(PEERS), st.binary(min_size=32, max_size=32))
def test_who_shares_a_bucket_does_not_depend_on_the_order_of_the_group(peers: list[str], state: bytes) -> None:
    drawn = [PEERS[position] for position in drawn_order(state, PEERS)]
    assert [peers[position] for position in drawn_order(state, peers)] == drawn
    assert set(drawn) == set(PEERS)
    some = [peer for peer in peers if peer != drawn[3]]
    assert [some[position] for position in drawn_order(state, some)] == drawn[:3] + drawn[4:]


def test_buckets_are_drawn_anew_from_every_state() -> None:
    assert len({drawn_order(bytes([number]) * 32, PEERS) for number in range(20)}) == 20


@given(st.permutations(range(9)), st.integers(1, 4), st.booleans())
def test_the_same_peers_in_another_order_of_the_group_give_the_same_bits(
    order: list[int], bucket: int, first: bool
) -> None:
    rule = RuleSection(kind="centered-clip", bucket=bucket)
    reference = None if first else random_delta(99, 40)

    def aggregated(members: list[int]) -> bytes:
        center = Center(reference, drawn_order(bytes(32), [PEERS[member] for member in members]))
        parts = {position: random_delta(member, 40) for position, member in enumerate(members)}
        return aggregate(parts, (1.0,) * 9, rule, center).tobytes()

    assert aggregated(order) == aggregated(list(range(9)))


def test_who_shares_a_bucket_matters() -> None:
    parts = dict(enumerate([random_delta(number, 40) * np.float32(1 + number) for number in range(6)]))
    rule = RuleSection(kind="centered-clip")
    orders = (range(6), (0, 2, 4, 1, 3, 5), (5, 0, 4, 1, 3, 2))
    assert len({aggregate(parts, (1.0,) * 6, rule, Center(None, order)).tobytes() for order in orders}) == 3


def test_a_member_that_sent_nothing_leaves_its_place_in_the_order_to_the_next() -> None:
    parts = {position: random_delta(position, 40) for position in (0, 1, 3)}
    rule = RuleSection(kind="centered-clip", radius=1e9, iterations=1)
    expected = (parts[1].astype(np.float64) + (parts[3] + parts[0].astype(np.float64)) / 2) / 2
    result = aggregate(parts, (1.0,) * 4, rule, Center(None, (3, 2, 0, 1)))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


rules_of_centered_clip = st.builds(
    RuleSection,
    kind=st.just("centered-clip"),
    bucket=st.integers(1, 3),
    iterations=st.integers(1, 5),
    radius=st.floats(0.1, 3),
)


@given(honest_parts, rules_of_centered_clip, st.booleans())
def test_centered_clip_is_what_the_paper_says(parts: list[Vector], rule: RuleSection, first: bool) -> None:
    reference = None if first else random_delta(99, 40)
    exact = [part.astype(np.float64) * (1 + number) for number, part in enumerate(parts)]
    cuts = range(0, len(parts), rule.bucket)
    buckets = [np.mean(exact[cut : cut + rule.bucket], axis=0) for cut in cuts]
    center = np.zeros(40) if reference is None else reference.astype(np.float64)
    limit = rule.radius * np.median([np.linalg.norm(bucket - center) for bucket in buckets])
    for _ in range(rule.iterations):
        pulls = [bucket - center for bucket in buckets]
        center = center + np.mean([pull * min(1.0, limit / max(np.linalg.norm(pull), 1e-9)) for pull in pulls], axis=0)
    result = centered_clip([part.astype(np.float32) for part in exact], reference, rule)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, center, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 9), rules_of_centered_clip, st.integers(0, 99))
def test_parts_that_are_all_equal_are_their_own_center_wherever_it_starts(
    count: int, rule: RuleSection, seed: int
) -> None:
    part, rule = random_delta(seed, 40), rule.model_copy(update={"radius": 1.0})
    result = centered_clip([part] * count, random_delta(seed + 1, 40), rule)
    np.testing.assert_allclose(result, part, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e30, -1e30, 50.0, -0.5])
@given(parts=honest_parts, rule=rules_of_centered_clip, data=st.data())
def test_a_minority_moves_the_center_no_further_than_the_honest_are(
    size: float, parts: list[Vector], rule: RuleSection, data: st.DataObject
) -> None:
    reference = random_delta(99, 40) * np.float32(0.1)
    count = data.draw(st.integers(0, len(parts)).filter(lambda n: 2 * rule.bucket * n < n + len(parts)))
    everybody = data.draw(st.permutations([*parts, *hostile(count, size)]))
    result = centered_clip(everybody, reference, rule)
    farthest = max(norm(part - reference) for part in parts)
    assert norm(result - reference) <= rule.iterations * rule.radius * farthest * 1.001


@pytest.mark.parametrize(("bucket", "count"), [(1, 9), (2, 4), (3, 3)])
@pytest.mark.parametrize("size", [1e30, -1e30, -5.0])
def test_centered_clip_stays_with_the_honest_below_its_limit_and_the_mean_does_not(
    bucket: int, count: int, size: float
) -> None:
    base = random_delta(0, 40)
    honest = [base + np.float32(0.1) * random_delta(number, 40) for number in range(1, 21 - count)]
    parts = dict(enumerate([*hostile(count, size), *honest]))
    order = drawn_order(bytes(32), [f"peer {number}" for number in range(20)])
    center = Center(base * np.float32(0.9), order)
    kept = aggregate(parts, (1.0,) * 20, RuleSection(kind="centered-clip", bucket=bucket, clip_norm=None), center)
    bent = aggregate(parts, (1.0,) * 20, RuleSection(clip_norm=None), center)
    assert norm(kept - base) < 0.5 * norm(base)
    assert norm(bent - base) > 0.5 * norm(base)


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=300))
def test_the_norm_is_numpys(values: list[float]) -> None:
    vector = np.array(values, dtype=np.float32)
    before = vector.copy()
    assert norm(vector) == pytest.approx(float(np.linalg.norm(vector.astype(np.float64))), rel=1e-12)
    assert vector.tobytes() == before.tobytes()
