"""Cohorts: who belongs where, into how many a swarm splits, and what each works on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.protocol.assignment import assign
from p2pasr.protocol.cohorts import EVERYBODY, MAX_BITS, Cohort, bits_for, cohort_of, is_boundary

from .builders import digest_of, make_manifest

RUN = digest_of("a run")
MANIFEST = make_manifest()
BITS = st.integers(0, MAX_BITS)
PEERS = st.integers(0, 40_000)
MOST = st.integers(2, 64)
LEAST = st.integers(1, 4)


@given(peer=st.text(max_size=60), bits=st.integers(0, MAX_BITS - 1))
def test_a_split_halves_every_cohort(peer: str, bits: int) -> None:
    before, after = cohort_of(RUN, peer, bits), cohort_of(RUN, peer, bits + 1)
    assert after.index >> 1 == before.index
    assert before.has(RUN, peer)
    assert after.has(RUN, peer)
    assert not Cohort(bits + 1, after.index ^ 1).has(RUN, peer)


def test_everybody_is_in_the_cohort_of_a_swarm_that_is_whole() -> None:
    assert cohort_of(RUN, "anybody", 0) == EVERYBODY
    assert EVERYBODY.name == "all"
    assert Cohort(3, 5).name == "3-5"


def test_cohorts_are_about_equal_and_another_run_draws_anew() -> None:
    peers = [f"peer {number}" for number in range(1024)]
    counts = Counter(cohort_of(RUN, peer, 4) for peer in peers)
    assert len(counts) == 16
    assert all(32 <= count <= 96 for count in counts.values())
    other = digest_of("another run")
    assert sum(cohort_of(RUN, peer, 4) == cohort_of(other, peer, 4) for peer in peers) < 200


@given(peers=PEERS, most=MOST, least=LEAST, bits=BITS)
def test_the_number_of_cohorts_is_settled_at_once(peers: int, most: int, least: int, bits: int) -> None:
    settled = bits_for(peers, most, least, bits)
    assert 0 <= settled <= MAX_BITS
    assert bits_for(peers, most, least, settled) == settled


@given(peers=PEERS, most=MOST, least=LEAST, data=st.data())
def test_a_swarm_that_shrinks_to_more_than_half_stays_as_it_is(
    peers: int, most: int, least: int, data: st.DataObject
) -> None:
    bits = bits_for(peers, most, least, 0)
    fewer = data.draw(st.integers(peers // 2 + 1, max(peers, peers // 2 + 1)))
    assert bits_for(min(fewer, peers), most, least, bits) == bits or peers == 0


@given(peers=PEERS, most=MOST, bits=BITS)
def test_peers_that_fit_into_one_group_with_room_are_one_and_others_have_room_in_theirs(
    peers: int, most: int, bits: int
) -> None:
    settled = bits_for(peers, most, 1, bits)
    if 2 * peers < most:
        assert settled == 0
    if peers >= most and peers >= 4 and settled < MAX_BITS:
        assert settled > 0
        assert peers <= most << settled >> 1 or peers < 4 << settled, "a mean cohort fills half of a group at most"


@given(peers=PEERS, most=MOST, least=LEAST, bits=BITS)
def test_a_mean_cohort_is_never_too_small_for_a_round(peers: int, most: int, least: int, bits: int) -> None:
    settled = bits_for(peers, most, least, bits)
    assert settled == 0 or peers >= least << settled


def test_a_thousand_peers_are_thirty_two_cohorts() -> None:
    assert [bits_for(peers, 64, 1, 0) for peers in (63, 64, 65, 128, 129, 1000, 1024)] == [0, 1, 2, 2, 3, 5, 5]


@given(rounds=st.integers(1, 200), mix_rounds=st.integers(2, 20))
def test_the_last_round_is_a_boundary_and_every_so_many_before_it(rounds: int, mix_rounds: int) -> None:
    boundaries = [number for number in range(rounds) if is_boundary(number, rounds, mix_rounds)]
    assert boundaries == sorted(range(rounds - 1, -1, -mix_rounds))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_every_shard_is_preferred_by_one_cohort_which_takes_it_before_others(bits: int) -> None:
    state = digest_of("a state")
    shards = [bytes.fromhex(shard.digest) for shard in MANIFEST.shards]
    cohorts = [Cohort(bits, index) for index in range(1 << bits)]
    assert all(sum(cohort.prefers(shard) for cohort in cohorts) == 1 for shard in shards)
    for cohort in cohorts:
        chosen = assign(MANIFEST, state, {}, "a peer", cohort)
        preferred = [shard for shard in shards if cohort.prefers(shard)]
        assert sum(shard in preferred for shard in chosen) == min(len(chosen), len(preferred))
        covered = {shard.hex(): 1 for shard in preferred}
        later = assign(MANIFEST, state, covered, "a peer", cohort)
        assert not set(later) & set(preferred) or len(shards) - len(preferred) < len(later)
