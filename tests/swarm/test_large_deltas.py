"""A delta that is large beside a part passes through real network processes in little memory."""

from __future__ import annotations

from benchmarks.streaming import measure


def test_a_delta_takes_little_memory_beyond_the_model() -> None:
    (row,) = measure(40_000_000, 2, ["int8"])
    assert row.bits_equal
    assert row.encoded_megabytes > 40
    assert row.worst_multiple <= 2.5
