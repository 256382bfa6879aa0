"""Who reduces how much: all parts once, as measured by others, within a cap."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging.shares import MAX_SHARE, RATE_SPREAD, agreed_rates, split

PEERS = tuple("abcdefgh")
RATES = st.lists(st.one_of(st.just(0.0), st.floats(1.0, 1e9)), min_size=1, max_size=64).filter(any)


@given(st.integers(1, 500), RATES)
def test_the_shares_are_all_parts_once_and_only_of_those_that_reduce(parts: int, rates: list[float]) -> None:
    shares = split(parts, rates)
    assert len(shares) == len(rates)
    assert [index for share in shares for index in share] == list(range(parts))
    assert all(rate > 0 or not share for rate, share in zip(rates, shares, strict=True))


@given(st.integers(1, 500), st.integers(1, 64), st.floats(1.0, 1e9))
def test_equal_rates_give_equal_shares_but_for_one_part(parts: int, count: int, rate: float) -> None:
    sizes = [len(share) for share in split(parts, [rate] * count)]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.floats(1.0, 1e9), min_size=1, max_size=64))
def test_nobody_reduces_more_than_a_multiple_of_an_equal_share(rates: list[float]) -> None:
    parts = 10_000
    assert max(map(len, split(parts, rates))) <= parts * MAX_SHARE / len(rates) + 2


@given(st.lists(st.floats(1e3, 1e6), min_size=3, max_size=16))
def test_who_sends_slower_never_reduces_more(rates: list[float]) -> None:
    shares = split(10_000, sorted(rates))
    assert all(len(slow) <= len(fast) + 2 for slow, fast in pairwise(shares))


def test_all_members_finish_sending_together_where_no_cap_is_in_the_way() -> None:
    rates = [4.0, 5.0, 6.0, 5.0]
    parts = 100_000
    times = [(1 + len(share) / parts * 2) / rate for share, rate in zip(split(parts, rates), rates, strict=True)]
    assert max(times) / min(times) < 1.001


def test_a_group_in_which_nobody_reduces_has_no_shares() -> None:
    with pytest.raises(ValueError, match="needs a member that reduces"):
        split(10, [0.0, 0.0])


def test_a_rate_is_what_the_others_measured_and_never_ones_own_word() -> None:
    honest = [{peer: 100 for peer in PEERS if peer != own} for own in PEERS]
    boasting = [{**report, own: 10**9} if own == "a" else report for own, report in zip(PEERS, honest, strict=True)]
    assert agreed_rates(boasting, PEERS) == agreed_rates(honest, PEERS) == (100.0,) * len(PEERS)


@given(st.sets(st.sampled_from(PEERS), max_size=3), st.integers(1, 10**9))
def test_a_minority_that_lies_about_one_member_changes_nothing(liars: set[str], lie: int) -> None:
    truth = {peer: 100 + number for number, peer in enumerate(PEERS)}
    reports = [{**truth, "h": lie} if own in liars - {"h"} else truth for own in PEERS]
    assert agreed_rates(reports, PEERS) == agreed_rates([truth] * len(PEERS), PEERS)


def test_who_was_not_measured_counts_as_the_middle_and_outliers_are_bounded() -> None:
    reports = [{"a": 100, "b": 100, "c": 10**9, "d": 1} for _ in "abcde"]
    rates = agreed_rates(reports, tuple("abcde"))
    assert rates == (100.0, 100.0, 100.0 * RATE_SPREAD, 100.0 / RATE_SPREAD, 100.0)
    assert agreed_rates([{}] * 3, tuple("abc")) == (1.0, 1.0, 1.0)
