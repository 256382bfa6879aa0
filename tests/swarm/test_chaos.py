"""Peers are killed at random moments and started again, as `python -m benchmarks chaos` does for longer."""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos import run


def test_peers_killed_at_random_moments_come_back_and_end_in_one_lineage(folder: Path) -> None:
    row = run(folder, peers=3, rounds=10, percent=30.0, seed=1)
    print(row)
    assert row.kills >= 3
    assert row.divergent_states == 0
    assert row.stuck_rounds == 0
    assert row.most_rounds_to_be_back <= 2
