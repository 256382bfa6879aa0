"""What holds for every task that comes with the package, whatever it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr import tasks
from p2pasr.tasks import Bounded, Checkpoint, Probed, Task, build, pin

from .conftest import plan, start_of
from .every_kind import CONFIGS, kind_of, with_folders

Make = Callable[[], Task]

BLIND = {"frequency_masks": 8, "frequency_bins": 80, "time_masks": 8, "time_share": 1.0, "time_frames": 3000}
"""A `spec_augment` that hides nearly everything."""


@pytest.fixture
def shard_files(labelled_files: Sequence[Path]) -> Sequence[Path]:
    """Shards for all kinds: those with a teacher's labels are shards like any other."""
    return labelled_files


@pytest.fixture(params=CONFIGS)
def make(request: pytest.FixtureRequest, shard_files: Sequence[Path], language_model: Path) -> Make:
    """Makes a new instance of a task, configured as a manifest would hold it."""
    kind = kind_of(request.param)
    pinned = pin(kind, with_folders(request.param, language_model), None, shard_files)
    return lambda: build(kind, pinned, seed=3, shards=shard_files)


def test_every_kind_is_among_the_configurations() -> None:
    assert {*map(kind_of, CONFIGS)} == tasks.KINDS.keys()


def test_a_pinned_configuration_is_pinned_already(make: Make, shard_files: Sequence[Path]) -> None:
    task = make()
    assert isinstance(task, Task)
    assert isinstance(task, Bounded)
    config: Any = task.config  # type: ignore[attr-defined]
    assert type(task).pin(config, None, shard_files) == config  # type: ignore[attr-defined]


def test_two_instances_start_from_the_same_bits(make: Make) -> None:
    one, two = make().initial_params(), make().initial_params()
    assert one.keys() == two.keys() == dict(sorted(one.items())).keys()
    assert all(value.dtype == np.float32 and value.tobytes() == two[name].tobytes() for name, value in one.items())


def test_a_segment_gives_the_same_bits_again_and_from_a_packed_checkpoint(
    make: Make, shard_files: Sequence[Path]
) -> None:
    one, two = make(), make()
    first, _ = one.segment(start_of(one), shard_files, plan(steps=2))
    second, _ = one.segment(first, shard_files, plan(steps=1, seed=1, first=2))
    assert two.segment(start_of(two), shard_files, plan(steps=2))[0].pack() == first.pack()
    two.evaluate(None, shard_files[:1])
    again, _ = two.segment(Checkpoint.unpack(first.pack()), shard_files, plan(steps=1, seed=1, first=2))
    assert again.pack() == second.pack()


def test_no_value_goes_further_than_the_bound(make: Make, shard_files: Sequence[Path]) -> None:
    task = make()
    start = start_of(task)
    end, _ = task.segment(start, shard_files, plan(steps=3))
    moved = max(float(np.abs(end.params[name] - value).max()) for name, value in start.params.items())
    assert isinstance(task, Bounded)
    assert 0 < moved <= task.largest_move(start.params, 0, 3, 100)


def test_a_probe_says_the_same_whatever_was_trained_before(make: Make, shard_files: Sequence[Path]) -> None:
    fresh, used = make(), make()
    assert isinstance(fresh, Probed)
    assert isinstance(used, Probed)
    params = fresh.initial_params()
    first = fresh.probe_loss(params, shard_files)
    used.segment(start_of(used), shard_files, plan(steps=2, first=90))
    assert used.probe_loss(params, shard_files) == fresh.probe_loss(params, shard_files) == first


@pytest.mark.parametrize("name", [name for name in CONFIGS if kind_of(name) != "features"])
def test_what_training_hides_a_probe_hears(name: str, shard_files: Sequence[Path], language_model: Path) -> None:
    config, kind = with_folders(name, language_model), kind_of(name)
    made = [
        build(kind, pin(kind, {**config, "spec_augment": hidden}, None, shard_files), seed=3, shards=shard_files)
        for hidden in (None, BLIND)
    ]
    probed, trained = [], []
    for task in made:
        assert isinstance(task, Probed)
        probed.append(task.probe_loss(task.initial_params(), shard_files[:1]))
        trained.append(task.segment(start_of(task), shard_files, plan(steps=1))[1].loss)
    assert probed[0] == probed[1]
    assert trained[0] != trained[1]


def test_the_loss_falls(make: Make, shard_files: Sequence[Path]) -> None:
    task = make()
    at, losses = start_of(task), []
    for index in range(6):
        at, report = task.segment(at, shard_files, plan(steps=5, samples=8, seed=index, first=5 * index, total=60))
        losses.append(report.loss)
    assert losses[-1] < 0.8 * losses[0]


def test_every_parameter_learns_from_more_than_rounding(make: Make, shard_files: Sequence[Path]) -> None:
    """AdamW makes of a gradient that is only rounding a step of full length, and other machines another one."""
    task = make()
    start, _ = task.segment(start_of(task), shard_files, plan(seed=5, steps=2))  # a LoRA's A has no gradient before
    largest: dict[str, float] = {}
    for seed in range(3):
        end, _ = task.segment(Checkpoint(start.params), shard_files, plan(seed=seed, steps=1))
        for name, moment in end.moments.items():
            if name.endswith("exp_avg"):
                largest[name] = max(largest.get(name, 0.0), float(np.abs(moment).max()))
    idle = {name: value for name, value in largest.items() if value < 1e-6 * max(largest.values())}
    assert idle == {}


def test_initial_parameters_score_as_the_untrained_task(make: Make, shard_files: Sequence[Path]) -> None:
    task = make()
    untrained = task.evaluate(None, shard_files)
    end, _ = task.segment(start_of(task), shard_files, plan(steps=2))
    assert task.evaluate(end.params, shard_files).keys() == untrained.keys()
    assert task.evaluate(None, shard_files) == untrained == task.evaluate(task.initial_params(), shard_files)


def test_an_export_says_what_it_came_from(make: Make, tmp_path: Path) -> None:
    task = make()
    task.export(task.initial_params(), tmp_path, {"round": 7})
    assert '"round": 7' in (tmp_path / "p2pasr.json").read_text(encoding="utf-8")
    assert any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))
