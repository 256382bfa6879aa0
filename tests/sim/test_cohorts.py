"""A thousand peers in cohorts, with churn and a cohort that is late: bytes a peer stay flat and states equal."""

from __future__ import annotations

import pytest

from benchmarks.simulation import Simulation

KINDS = ("delta exchange", "mix", "records")


@pytest.mark.parametrize("seed", range(3))
def test_a_swarm_with_a_late_cohort_mixes_without_it_and_then_with_it(seed: int) -> None:
    world = Simulation(150, 25, seed, late=1)
    in_step_after_mixes(world)
    assert [mix.number for mix in world.mixes] == [8, 16, 24]
    whole, without, again = world.mixes
    assert (whole.left_out, without.left_out, again.left_out) == ((), (without.cohorts,), ())
    assert {peer.state.digest for peer in world.online} == again.states


def test_a_thousand_peers_stay_in_step_at_less_than_one_and_a_half_times_the_bytes_of_one_group() -> None:
    group, crowd = Simulation(64, 17), Simulation(1000, 17, late=0)
    in_step_after_mixes(group)
    in_step_after_mixes(crowd)
    assert not group.mixes
    assert [(mix.number, mix.cohorts, mix.left_out) for mix in crowd.mixes] == [(8, 31, (31,)), (16, 32, ())]
    assert bytes_a_round(crowd) < 1.5 * bytes_a_round(group)


def in_step_after_mixes(world: Simulation) -> None:
    """Run to the end: nobody differs from the others of its cohort, nor a cohort from the others it was mixed with."""
    seen = 0
    for _ in world.run_to_the_end():
        assert world.differing == 0
        for mix in world.mixes[seen:]:
            assert len(mix.states) == 1
            held = {peer.state.digest for peer in world.online if world.cohort(peer).index not in mix.left_out}
            assert held == mix.states, "somebody who was away or missed the mix is not in step"
        seen = len(world.mixes)
    assert {peer.state.round for peer in world.online} == {world.manifest.rounds.rounds}


def bytes_a_round(world: Simulation) -> float:
    return sum(world.bytes_a_round(kind) for kind in KINDS)


def test_a_run_of_the_simulation_repeats_exactly() -> None:
    one, other = (Simulation(100, 17, seed=5, late=0) for _ in range(2))
    for world in (one, other):
        in_step_after_mixes(world)
    assert one.mixes == other.mixes
    assert one.received == other.received
