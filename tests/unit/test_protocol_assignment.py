"""Assignment: anyone can recompute it, and nobody can choose."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from p2pasr.protocol.assignment import assign, segment_seed
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.tiers import EVERY, TIERS, trains

from .builders import SHARDS, digest_of, make_identity, make_manifest, manifest_content

PEERS = [make_identity(number).peer for number in range(1, 6)]

states = st.binary(min_size=32, max_size=32)
peers = st.sampled_from(PEERS)
coverage = st.dictionaries(
    st.sampled_from([shard["digest"] for shard in manifest_content()["shards"]]), st.integers(0, 3)
)


def run_of(per_peer: int, **changes: object) -> RunManifest:
    return make_manifest(rounds={"shards_per_peer": per_peer}, **changes)


def shards_of(manifest: RunManifest) -> set[bytes]:
    return {bytes.fromhex(shard.digest) for shard in manifest.shards}


@given(states, peers, coverage, st.integers(1, 10))
def test_an_assignment_names_different_shards_of_the_run_as_many_as_there_are(
    state: bytes, peer: str, covered: dict[str, int], per_peer: int
) -> None:
    manifest = run_of(per_peer)
    assigned = assign(manifest, state, covered, peer)
    assert len(assigned) == len(set(assigned)) == min(per_peer, SHARDS)
    assert set(assigned) <= shards_of(manifest)


@given(states, peers, coverage)
def test_a_smaller_assignment_is_the_beginning_of_a_larger_one(
    state: bytes, peer: str, covered: dict[str, int]
) -> None:
    everything = assign(run_of(SHARDS), state, covered, peer)
    for per_peer in range(1, SHARDS):
        assert assign(run_of(per_peer), state, covered, peer) == everything[:per_peer]


@given(states, peers, coverage, st.permutations(manifest_content()["shards"]))
def test_the_order_of_the_manifest_does_not_matter(
    state: bytes, peer: str, covered: dict[str, int], shards: list[dict[str, object]]
) -> None:
    assert assign(run_of(3, shards=tuple(shards)), state, covered, peer) == assign(run_of(3), state, covered, peer)


@given(states, peers, coverage, st.integers(1, 3))
def test_shards_still_to_cover_come_first(state: bytes, peer: str, covered: dict[str, int], wanted: int) -> None:
    manifest = run_of(SHARDS, data={"redundancy": wanted})
    done = [covered.get(shard.hex(), 0) >= wanted for shard in assign(manifest, state, covered, peer)]
    assert done == sorted(done)


@given(states, peers, coverage)
def test_what_is_covered_moves_back_without_changing_the_order_of_the_rest(
    state: bytes, peer: str, covered: dict[str, int]
) -> None:
    manifest = run_of(SHARDS)
    fresh = assign(manifest, state, {}, peer)
    moved = assign(manifest, state, covered, peer)
    for group in (
        [shard for shard in fresh if covered.get(shard.hex(), 0) < 1],
        [shard for shard in fresh if covered.get(shard.hex(), 0) >= 1],
    ):
        assert [shard for shard in moved if shard in group] == group


def test_another_state_or_another_peer_has_another_order() -> None:
    manifest = run_of(SHARDS)
    orders = {assign(manifest, digest_of(f"state {number}"), {}, peer) for number in range(8) for peer in PEERS}
    assert len(orders) > 35, "40 draws from 720 orders"


def test_every_shard_is_as_likely_to_come_first() -> None:
    manifest = run_of(1)
    draws = 1200
    first = Counter(assign(manifest, digest_of(f"state {n}"), {}, PEERS[0])[0] for n in range(draws))
    expected = draws / SHARDS
    chi_squared = sum((first[shard] - expected) ** 2 / expected for shard in shards_of(manifest))
    assert chi_squared < 20.5, "the 99.9th percentile at five degrees of freedom"


@given(states, st.integers(1, 4), st.integers(1, 3))
def test_one_peer_alone_covers_all_shards_in_as_few_rounds_as_possible(
    state: bytes, per_peer: int, wanted: int
) -> None:
    manifest = run_of(per_peer, data={"redundancy": wanted})
    covered: Counter[str] = Counter()
    rounds = 0
    while any(covered[shard.hex()] < wanted for shard in shards_of(manifest)):
        covered.update(shard.hex() for shard in assign(manifest, state, covered, PEERS[0]))
        state = digest_of(state.hex())
        rounds += 1
        assert rounds <= wanted * SHARDS, "an epoch that never ends"
    assert rounds <= wanted * SHARDS
    assert rounds * per_peer >= wanted * SHARDS


def test_one_peer_covers_each_shard_once_before_any_twice() -> None:
    manifest = run_of(2)
    covered: Counter[str] = Counter()
    for number in range(SHARDS // 2):
        covered.update(shard.hex() for shard in assign(manifest, digest_of(str(number)), covered, PEERS[0]))
    assert set(covered.values()) == {1}
    assert len(covered) == SHARDS


CLIPS = (None, 3.0, 5.0, 5.001, 12.5, 30.0)
"""Longest clips of the six shards."""
MIXED = make_manifest(
    rounds={"shards_per_peer": SHARDS},
    shards=tuple(
        {**shard, "longest": longest} for shard, longest in zip(manifest_content()["shards"], CLIPS, strict=True)
    ),
)
tiers = st.sampled_from((EVERY, *TIERS))


@given(states, peers, coverage, tiers)
def test_a_peer_is_assigned_no_shard_beyond_its_tier_and_all_others_in_the_order_that_every_tier_has(
    state: bytes, peer: str, covered: dict[str, int], tier: int
) -> None:
    lengths = {bytes.fromhex(shard.digest): shard.longest for shard in MIXED.shards}
    everything = assign(MIXED, state, covered, peer)
    assigned = assign(MIXED, state, covered, peer, tier=tier)
    assert list(assigned) == [shard for shard in everything if tier == EVERY or (lengths[shard] or 0) <= tier]


@given(states, peers, coverage)
def test_how_long_clips_are_changes_nothing_for_peers_that_train_every_shard(
    state: bytes, peer: str, covered: dict[str, int]
) -> None:
    assert assign(MIXED, state, covered, peer) == assign(run_of(SHARDS), state, covered, peer)
    assert assign(run_of(SHARDS), state, covered, peer, tier=TIERS[0]) == assign(run_of(SHARDS), state, covered, peer)


@given(tiers, st.none() | st.floats(0, 100))
def test_a_higher_tier_trains_whatever_a_lower_one_does(tier: int, longest: float | None) -> None:
    higher = [each for each in TIERS if each > tier and tier != EVERY]
    if trains(tier, longest):
        assert all(trains(each, longest) for each in (*higher, EVERY))


def test_the_seed_of_a_segment_depends_on_state_peer_and_number() -> None:
    seeds = {
        segment_seed(state, peer, segment)
        for state in (digest_of("one"), digest_of("other"))
        for peer in PEERS
        for segment in (0, 1, 255, 256, 1023)
    }
    assert len(seeds) == 2 * len(PEERS) * 5
    assert {len(seed) for seed in seeds} == {32}
