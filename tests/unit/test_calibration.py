"""What honest hardware may differ by, and what is kept apart from it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.calibration import (
    CONTROL,
    SKIPPED,
    HardwareClass,
    Measured,
    control_task,
    errors_of,
    judge,
    reference_segments,
    train,
    train_less,
    trainer,
)
from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import VerifySection
from p2pasr.tasks import Checkpoint
from p2pasr.tolerances import tolerant

from .builders import ToyTask, make_manifest, make_state

MANIFEST = make_manifest(rounds={"segments": 3})
FILES = [Path(f"{number}.shard") for number in range(5)]


def test_segments_follow_each_other_as_in_a_round_and_each_state_has_its_share() -> None:
    task = ToyTask(1.0)
    state = make_state(MANIFEST)
    later = make_state(make_manifest(name="later"))
    segments = list(reference_segments(MANIFEST, task, [state, later], FILES, 9))
    assert len(segments) == 9
    first = segments[:5]
    assert [Checkpoint.unpack(segment.begin).step for segment in first] == [0, 3, 6, 0, 3]
    assert [one.end == two.begin for one, two in pairwise(first)] == [True, True, False, True]
    assert len({segment.plan.seed for segment in segments}) == 9
    assert all(len(segment.shards) == MANIFEST.rounds.shards_per_peer for segment in segments)


def test_the_same_training_again_has_no_error_and_another_rate_has_its_own() -> None:
    (segment,) = reference_segments(MANIFEST, ToyTask(1.0), [make_state(MANIFEST)], FILES, 1)
    assert set(errors_of(segment, train(ToyTask(1.0), segment)).values()) == {0.0}
    errors = errors_of(segment, train(ToyTask(1.05), segment))
    assert errors == pytest.approx({"param": 0.05, "moment exp_avg": 0.0}, rel=1e-3)


def test_who_skips_a_step_says_nothing_of_it() -> None:
    class Counting(ToyTask):
        def segment(self, start: Checkpoint, shards: Any, plan: Any, on_step: Any = None) -> Any:
            end, report = super().segment(start, shards, plan)
            params = {name: value + np.float32(plan.steps) for name, value in start.params.items()}
            return replace(end, params=params), report

    (segment,) = reference_segments(MANIFEST, Counting(), [make_state(MANIFEST)], FILES, 1)
    begin, end, less = (
        Checkpoint.unpack(data) for data in (segment.begin, segment.end, train_less(Counting(), segment))
    )
    assert less.step == end.step
    for name, value in begin.params.items():
        assert less.params[name] == pytest.approx(value + MANIFEST.rounds.steps_per_segment - 1)


def measured(cheat: float, **honest: float) -> list[Measured]:
    control = [
        Measured(CONTROL, "round 0", {"param": cheat, "moment first": 0.0}),
        Measured(CONTROL, "", {"param": 1.0}),
    ]
    return [
        Measured(name, "round 0", {"param": error, "moment first": 0.0}) for name, error in honest.items()
    ] + control


def test_the_limit_is_three_times_the_largest_error_of_the_classes_that_are_accepted() -> None:
    verdict = judge(measured(0.05, own=0.0, plain=1e-5, threads=2e-5), far=0.01)
    assert verdict.close == pytest.approx(6e-5)
    assert (verdict.cheat, verdict.refused) == (0.05, ())


@pytest.mark.parametrize(
    ("skipped", "cheat", "name"), [(0.08, 0.05, "learning rate +5 %"), (0.01, 0.01, "one step skipped")]
)
def test_far_may_be_a_fifth_of_the_smallest_cheat(skipped: float, cheat: float, name: str) -> None:
    less = Measured(SKIPPED, "round 0", {"param": skipped, "moment first": skipped / 2})
    verdict = judge([*measured(0.05, own=0.0), less], far=0.01)
    assert (verdict.cheat, verdict.cheat_name, verdict.most_far) == (cheat, name, pytest.approx(cheat / 5))


@pytest.mark.parametrize(("cheat", "far"), [(0.05, 0.001), (0.001, 0.05)])
def test_a_class_that_leaves_no_room_below_far_and_the_smallest_cheat_is_refused(cheat: float, far: float) -> None:
    verdict = judge(measured(cheat, near=0.001 / 15.1, off=0.001 / 14.9), far)
    assert verdict.refused == ("off",)
    assert verdict.close == pytest.approx(3 * 0.001 / 15.1)


def test_where_all_bits_are_equal_nothing_is_proposed() -> None:
    assert judge(measured(0.05, own=0.0, plain=0.0), far=0.01).close is None


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), max_size=6), st.floats(1e-3, 1), st.floats(1e-3, 0.9)
)
def test_what_is_proposed_always_leaves_room(honest: dict[str, float], cheat: float, far: float) -> None:
    verdict = judge(measured(cheat, **honest), far)
    assert (verdict.close or 0.0) <= min(far, cheat) / 5
    for name, error in honest.items():
        assert name in verdict.refused or 3 * error <= min(far, cheat) / 5


def test_a_task_without_a_learning_rate_has_no_control() -> None:
    with pytest.raises(LocalError, match="no learning rate"):
        control_task(make_manifest(task={"kind": "toy", "config": {}}), "cpu", None)


def test_a_process_that_ends_is_said_to_have_ended() -> None:
    unknown = make_manifest(task={"kind": "unknown", "config": {}})
    with (
        pytest.raises(LocalError, match="the process of the class 'odd' ended"),
        trainer(unknown, HardwareClass("odd", "cpu"), None),
    ):
        pass


@given(st.floats(1e-9, 0.3), st.floats(1e-3, 0.5))
def test_coarse_arithmetic_is_judged_by_honest_errors_alone_and_its_limits_keep_them(
    error: float, cheat: float
) -> None:
    verdict = judge(measured(cheat, plain=error), far=0.7, coarse=True)
    assert bool(verdict.refused) == (3 * error > 0.7)
    assert verdict.close is not None
    assert verdict.close >= error
    section = VerifySection(close=verdict.close, far=verdict.far)
    assert tolerant(section, {"precision": "bf16"}) == section
