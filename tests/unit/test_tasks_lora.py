"""Training with adapters: a pure function from a state, shards and a seed to the next state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

from p2pasr.errors import LocalError, NonFiniteStep
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.pretrained import BUNDLED, weights_digest
from p2pasr.speech.shards import Clip, read_shard
from p2pasr.tasks import Bounded, Checkpoint, Task, build, pin
from p2pasr.tasks.lora import LoraTask, LoraTaskConfig
from p2pasr.tasks.training import learning_rate
from p2pasr.tasks.whisper import collate

from .conftest import LORA, MODEL, plan, start_of

MakeTask = Callable[..., LoraTask]
Shards = Sequence[Path]

EIGHT_BIT = {"optimizer": "adamw8bit", "rank": 32, "targets": ["fc1"]}
"""Parameters large enough for bitsandbytes to keep their moments in 8 bits."""


def vector(params: Tensors) -> np.ndarray:
    """All parameters as one vector, in the order of their names."""
    return np.concatenate([params[name].reshape(-1) for name in sorted(params)])


def moved(task: LoraTask, end: Checkpoint) -> np.ndarray:
    """How far a segment from the initial parameters went."""
    return vector(end.params) - vector(task.initial_params())


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Of two deltas, relative to the first."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model": MODEL, "ranks": 4}, "task.config: ranks is not a known key; remove it or check its spelling"),
        ({}, "task.config: model is missing"),
        ({"model": 7}, "task.config: model: input should be a valid string (found 7)"),
        ({"model": MODEL, "rank": 0}, "task.config: rank: input should be greater than or equal to 1 (found 0)"),
        ({"model": MODEL, "rank": "16"}, "task.config: rank: input should be a valid integer (found '16')"),
        ({"model": MODEL, "rank": True}, "task.config: rank: input should be a valid integer (found True)"),
        ({"model": MODEL, "dropout": 1.0}, "task.config: dropout: input should be less than 1 (found 1.0)"),
        ({"model": MODEL, "learning_rate": 0.0}, "task.config: learning_rate: input should be greater than 0"),
        ({"model": MODEL, "learning_rate": float("nan")}, "task.config: learning_rate: input should be"),
        ({"model": MODEL, "targets": []}, "task.config: targets: "),
        ({"model": MODEL, "targets": "q_proj"}, "task.config: targets: input should be a list (found 'q_proj')"),
        ({"model": MODEL, "average": "mean"}, "task.config: average: input should be 'factors' or 'frozen-a'"),
        ({"model": MODEL, "quantise": "2bit"}, "task.config: quantise: input should be 'none', '8bit' or '4bit'"),
        ({"model": MODEL, "precision": "fp16"}, "task.config: precision: input should be 'fp32' or 'bf16'"),
        ({"model": MODEL, "micro_batch": 0}, "task.config: micro_batch: input should be greater than or equal to 1"),
        ({"model": MODEL, "weights": "abc"}, "task.config: weights: "),
        ({"model": MODEL, "window_seconds": 31.0}, "task.config: window_seconds: input should be less than or equal"),
    ],
)
def test_a_wrong_configuration_is_one_sentence_that_names_the_key(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LocalError) as error:
        build("lora", config, seed=0)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["beta1", "beta2", "alpha", "max_grad_norm", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(key: str, value: float) -> None:
    with pytest.raises(LocalError, match=rf"^task\.config: {key}: "):
        build("lora", {**LORA, key: value}, seed=0)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:99", "meta", ""])
def test_a_device_that_torch_does_not_have_is_refused(device: str) -> None:
    with pytest.raises(LocalError, match=rf"^the device '{device}' cannot be used \(.*\); try cpu, cuda or cuda:1$"):
        build("lora", LORA, seed=0, device=device)


def test_an_unknown_kind_of_task_is_refused() -> None:
    with pytest.raises(LocalError, match=r"^task\.kind 'nothing' is not one of lora, full"):
        build("nothing", LORA, seed=0)


@pytest.mark.parametrize(
    "targets",
    [["query"], ["q_proj", "query"], ["embed_tokens"], ["conv1"], ["encoder"], [""], [".*"]],
    ids=str,
)
def test_targets_that_are_no_linear_layers_are_refused(make_task: MakeTask, targets: list[str]) -> None:
    sentence = f"task.config.targets: {targets[-1]!r} is no linear layer of 'p2pasr/demo-base'; it has fc1, fc2, k_proj"
    with pytest.raises(LocalError, match=f"^{re.escape(sentence)}"):
        make_task(targets=targets)


def test_other_weights_than_the_runs_are_refused(make_task: MakeTask) -> None:
    with pytest.raises(LocalError, match=r"the weights of 'p2pasr/demo-base' are not those this run was made with"):
        make_task(weights="ab" * 32)


def test_a_base_in_another_folder_is_used_if_its_weights_are_the_runs(steady_base: Path) -> None:
    pinned = pin("lora", LORA)
    there = build("lora", {**pinned, "model": "somebody/else"}, seed=1, model=str(steady_base))

    assert pinned["weights"] == weights_digest(MODEL)
    assert isinstance(there, LoraTask)


def test_pinning_writes_every_default_out_and_changes_nothing(make_task: MakeTask) -> None:
    pinned = pin("lora", LORA)

    assert pinned.keys() == LoraTaskConfig.model_fields.keys()
    assert pin("lora", pinned) == pinned == json.loads(json.dumps(pinned))
    assert build("lora", pinned, seed=1).initial_params().keys() == make_task().initial_params().keys()


def test_a_task_implements_the_protocols(task: LoraTask) -> None:
    assert isinstance(task, Task)
    assert isinstance(task, Bounded)
    assert task.hardware_class.startswith("cpu/")
    assert task.hardware_class.endswith("/fp32")


# --- initial parameters -------------------------------------------------------------------------


def test_initial_parameters_are_the_same_in_every_instance(make_task: MakeTask) -> None:
    one, other = make_task(seed=7).initial_params(), make_task(seed=7, steady=True).initial_params()

    assert Checkpoint(one).pack() == Checkpoint(other).pack()


def test_initial_parameters_are_the_same_after_training(task: LoraTask, shard_files: Shards) -> None:
    before = Checkpoint(task.initial_params()).pack()
    task.segment(start_of(task), shard_files, plan())

    assert Checkpoint(task.initial_params()).pack() == before


def test_initial_parameters_depend_on_the_seed_and_on_the_layer(make_task: MakeTask) -> None:
    one, other = make_task(seed=1).initial_params(), make_task(seed=2).initial_params()

    drawn = [name for name in one if "lora_A" in name]
    assert all(not np.array_equal(one[name], other[name]) for name in drawn)
    assert len({one[name].tobytes() for name in drawn}) == len(drawn)


def test_a_is_drawn_within_one_over_the_root_of_its_fan_in_and_b_is_zero(task: LoraTask) -> None:
    for name, value in task.initial_params().items():
        assert value.dtype == np.float32
        if "lora_B" in name:
            assert not value.any()
        else:
            bound = 1 / np.sqrt(value.shape[1])
            assert 0.9 * bound < np.abs(value).max() <= bound
            assert abs(value.mean()) < 0.2 * bound


def test_names_are_short_and_cover_every_target(task: LoraTask) -> None:
    names = list(task.initial_params())

    assert len(names) == 2 * 2 * (3 + 2 + 2)  # A and B of two projections in 3 encoder, 2 decoder and 2 cross layers
    assert names == sorted(names)
    assert all(name.startswith("model.") and ".default" not in name for name in names)


def test_frozen_a_trains_only_b_and_halves_the_count(make_task: MakeTask, shard_files: Shards) -> None:
    factors, frozen = make_task(steady=True), make_task(steady=True, average="frozen-a")
    start = start_of(frozen)
    end, _ = frozen.segment(start, shard_files, plan())

    assert vector(start.params).size * 2 == vector(factors.initial_params()).size
    assert all("lora_B" in name for name in end.params)
    assert all(value.any() for value in end.params.values())


def test_frozen_a_is_the_a_that_factors_starts_from(make_task: MakeTask, shard_files: Shards) -> None:
    # B is zero at the start, so that A has no gradient and the first step of both moves B alike.
    factors, frozen = (make_task(steady=True, average=kind, max_grad_norm=1e9) for kind in ("factors", "frozen-a"))
    one, _ = factors.segment(start_of(factors), shard_files, plan(steps=1))
    other, _ = frozen.segment(start_of(frozen), shard_files, plan(steps=1))

    for name, value in other.params.items():
        np.testing.assert_array_equal(value, one.params[name])


# --- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"dropout": 0.2}, {"precision": "bf16"}, EIGHT_BIT, {"quantise": "8bit"}], ids=str
)
def test_the_same_segment_gives_the_same_bits(make_task: MakeTask, shard_files: Shards, config: dict[str, Any]) -> None:
    one, other = make_task(**config), make_task(**config)

    first, report = one.segment(start_of(one), shard_files, plan())
    other.segment(start_of(other), shard_files, plan(seed=9))  # what was trained before must not matter
    torch.manual_seed(99)
    again, report_again = other.segment(start_of(other), shard_files, plan())

    assert first.pack() == again.pack()
    assert report == report_again


def test_evaluating_between_segments_changes_nothing(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task()
    first, _ = task.segment(start_of(task), shard_files, plan())
    task.evaluate(None, shard_files[:1])
    task.evaluate(first.params, shard_files[:1])

    assert task.segment(start_of(task), shard_files, plan())[0].pack() == first.pack()


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 3}, {"samples": 5}, {"first": 50}], ids=str)
def test_another_plan_gives_another_end(task: LoraTask, shard_files: Shards, change: dict[str, int]) -> None:
    first, _ = task.segment(start_of(task), shard_files, plan())
    other, _ = task.segment(start_of(task), shard_files, plan(**change))

    assert first.pack() != other.pack()


def test_other_shards_give_another_end(task: LoraTask, shard_files: Shards) -> None:
    one, _ = task.segment(start_of(task), shard_files[:1], plan())
    other, _ = task.segment(start_of(task), shard_files[1:2], plan())

    assert one.pack() != other.pack()


def test_a_segment_leaves_its_start_and_the_callers_dice_alone(task: LoraTask, shard_files: Shards) -> None:
    start = start_of(task)
    before = start.pack()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    task.segment(start, shard_files, plan())

    assert start.pack() == before
    assert torch.equal(torch.rand(3), wanted)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("config", [{}, EIGHT_BIT, {"precision": "bf16"}, {"average": "frozen-a"}], ids=str)
def test_going_on_from_a_packed_checkpoint_equals_going_on(
    make_task: MakeTask, shard_files: Shards, config: dict[str, Any]
) -> None:
    one, other = make_task(**config), make_task(**config)
    middle, _ = one.segment(start_of(one), shard_files, plan(steps=3))
    end, _ = one.segment(middle, shard_files, plan(steps=3, seed=1, first=3))

    unpacked = Checkpoint.unpack(middle.pack())
    resumed, _ = other.segment(unpacked, shard_files, plan(steps=3, seed=1, first=3))

    assert unpacked.pack() == middle.pack()
    assert (middle.step, end.step) == (3, 6)
    assert resumed.pack() == end.pack()


@pytest.mark.parametrize("config", [{}, EIGHT_BIT], ids=str)
def test_the_optimizers_moments_are_carried_over(
    make_task: MakeTask, shard_files: Shards, config: dict[str, Any]
) -> None:
    task = make_task(**config)
    middle, _ = task.segment(start_of(task), shard_files, plan(steps=3))
    with_moments, _ = task.segment(middle, shard_files, plan(seed=1))
    without, _ = task.segment(replace(middle, moments={}), shard_files, plan(seed=1))
    restarted, _ = task.segment(replace(middle, step=0), shard_files, plan(seed=1))

    ends = {vector(end.params).tobytes() for end in (with_moments, without, restarted)}
    assert len(ends) == 3


def test_eight_bit_moments_are_kept_in_eight_bits(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task(**EIGHT_BIT)
    end, _ = task.segment(start_of(task), shard_files, plan())

    states = {name.rsplit("/", 1)[0] for name, value in end.moments.items() if value.dtype == np.uint8}
    assert states == set(end.params)


def test_moments_are_named_by_their_parameter(task: LoraTask, shard_files: Shards) -> None:
    end, _ = task.segment(start_of(task), shard_files, plan())

    assert end.moments.keys() == {f"{name}/{kind}" for name in end.params for kind in ("exp_avg", "exp_avg_sq")}
    assert all(value.dtype == np.float32 for value in end.moments.values())


# --- ways to train ------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_micro_batches_give_nearly_the_step_of_the_whole_batch(
    make_task: MakeTask, shard_files: Shards, micro_batch: int
) -> None:
    whole, cut = make_task(steady=True), make_task(steady=True, micro_batch=micro_batch)
    one, report = whole.segment(start_of(whole), shard_files, plan(samples=8))
    other, report_cut = cut.segment(start_of(cut), shard_files, plan(samples=8))

    assert report_cut.loss == pytest.approx(report.loss, rel=1e-5)
    assert distance(moved(whole, one), moved(cut, other)) < 1e-2


def test_recomputing_activations_gives_the_same_step(make_task: MakeTask, shard_files: Shards) -> None:
    kept, recomputed = make_task(steady=True), make_task(steady=True, gradient_checkpointing=True)
    one, report = kept.segment(start_of(kept), shard_files, plan())
    other, report_recomputed = recomputed.segment(start_of(recomputed), shard_files, plan())

    assert recomputed.model.base_model.model.is_gradient_checkpointing
    assert report_recomputed.loss == pytest.approx(report.loss, rel=1e-5)
    assert distance(moved(kept, one), moved(recomputed, other)) < 1e-2


def test_recomputing_activations_does_not_change_what_is_transcribed(make_task: MakeTask, shard_files: Shards) -> None:
    recomputed = make_task(gradient_checkpointing=True)
    recomputed.segment(start_of(recomputed), shard_files, plan())

    assert recomputed.evaluate(None, shard_files[:1]) == make_task().evaluate(None, shard_files[:1])


def test_bfloat16_trains_close_to_float32_and_keeps_its_parameters_in_float32(
    make_task: MakeTask, shard_files: Shards
) -> None:
    full, half = make_task(steady=True), make_task(steady=True, precision="bf16")
    one, report = full.segment(start_of(full), shard_files, plan(samples=8))
    other, report_half = half.segment(start_of(half), shard_files, plan(samples=8))

    assert all(value.dtype == np.float32 for value in other.params.values())
    assert report_half.loss != report.loss
    assert report_half.loss == pytest.approx(report.loss, rel=0.02)
    assert distance(moved(full, one), moved(half, other)) < 0.5
    assert half.hardware_class.endswith("/bf16")


@pytest.mark.parametrize(("bits", "tolerance"), [("8bit", 0.05), ("4bit", 0.3)])
def test_a_quantised_base_trains(make_task: MakeTask, shard_files: Shards, bits: str, tolerance: float) -> None:
    full, small = make_task(steady=True), make_task(steady=True, quantise=bits)
    _, report = full.segment(start_of(full), shard_files, plan(samples=8))
    end, report_small = small.segment(start_of(small), shard_files, plan(samples=8))

    assert np.isfinite(report_small.loss)
    assert report_small.loss != report.loss
    assert report_small.loss == pytest.approx(report.loss, rel=tolerance)
    assert np.isfinite(vector(end.params)).all()
    assert moved(small, end).any()
    assert end.params.keys() == full.initial_params().keys()
    assert small.hardware_class.endswith(f"/{bits}")


def test_the_base_itself_is_not_trained(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task(weight_decay=0.5, targets=["q_proj", "fc1"])
    before = {n: p.detach().clone() for n, p in task.model.named_parameters() if "lora_" not in n}
    task.segment(start_of(task), shard_files, plan(steps=3))

    after = dict(task.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_loss_falls_over_a_few_segments(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task(rank=16, targets=["q_proj", "v_proj", "fc1", "fc2"], learning_rate=3e-3)
    checkpoint, losses = start_of(task), []
    for number in range(4):
        segment = plan(steps=8, samples=8, seed=number, first=8 * number, total=64)
        checkpoint, report = task.segment(checkpoint, shard_files, segment)
        losses.append(report.loss)

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    trained, untrained = task.evaluate(checkpoint.params, shard_files), task.evaluate(None, shard_files)
    assert trained["cer"] < 0.7 * untrained["cer"]


def test_every_step_is_reported_and_their_mean_is_the_segments_loss(task: LoraTask, shard_files: Shards) -> None:
    steps: list[tuple[int, float]] = []
    end, report = task.segment(
        start_of(task), shard_files, plan(steps=3, samples=5), lambda done, loss: steps.append((done, loss))
    )

    assert [done for done, _ in steps] == [1, 2, 3]
    assert report.loss == pytest.approx(np.mean([loss for _, loss in steps]))
    assert (report.samples, end.step) == (15, 3)


def test_more_samples_than_there_are_clips_are_drawn_again(task: LoraTask, shard_files: Shards) -> None:
    _, report = task.segment(start_of(task), shard_files[:1], plan(steps=2, samples=20))

    assert report.samples == 40


def test_the_first_loss_is_that_of_the_base(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task(steady=True)
    clips = [clip for path in shard_files for clip in read_shard(path).clips]
    _, report = task.segment(start_of(task), shard_files, plan(steps=1, samples=len(clips)))

    base = WhisperForConditionalGeneration.from_pretrained(BUNDLED[MODEL], dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = mean_loss(base, clips)
    assert report.loss == pytest.approx(wanted, rel=1e-4)


def mean_loss(model: WhisperForConditionalGeneration, clips: Sequence[Clip]) -> float:
    """Cross entropy by transformers' own loss, token by token of each clip alone."""
    total = 0.0
    for clip in clips:
        batch = collate([clip], 300, model.config.pad_token_id)
        out = model(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids, labels=batch.labels)
        total += float(out.loss) * (len(clip.tokens) - 1)
    return total / sum(len(clip.tokens) - 1 for clip in clips)


# --- what goes wrong ----------------------------------------------------------------------------


def poisoned(task: LoraTask, value: float) -> Checkpoint:
    """The start of a run with one trained value replaced."""
    params = {name: np.array(array) for name, array in task.initial_params().items()}
    params[next(name for name in params if "lora_B" in name)][0, 0] = value
    return Checkpoint(params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_stops_the_segment(make_task: MakeTask, shard_files: Shards, value: float) -> None:
    task, steps = make_task(), []

    with pytest.raises(NonFiniteStep, match="nothing of it is published"):
        task.segment(poisoned(task, value), shard_files, plan(), lambda done, loss: steps.append(done))
    assert steps == []


def test_parameters_that_overflow_in_the_last_step_stop_the_segment(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task(learning_rate=1.0)
    params = task.initial_params()
    moments = {f"{name}/exp_avg": np.full_like(value, 3e38) for name, value in params.items()}
    moments |= {f"{name}/exp_avg_sq": np.zeros_like(value) for name, value in params.items()}

    with pytest.raises(NonFiniteStep, match="parameters became NaN or infinite by step 2 of the round"):
        task.segment(Checkpoint(params, moments, 1), shard_files, plan(steps=1))


def test_a_task_trains_as_before_after_a_step_that_was_not_finite(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task()
    wanted, _ = task.segment(start_of(task), shard_files, plan())
    with pytest.raises(NonFiniteStep):
        task.segment(poisoned(task, np.nan), shard_files, plan())

    # The failed step's gradients must not be added to the next segment's first ones.
    again, _ = task.segment(start_of(task), shard_files, plan())
    assert again.pack() == wanted.pack()


def test_a_task_trains_as_before_after_an_interrupted_step(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task(micro_batch=2)
    wanted, _ = task.segment(start_of(task), shard_files, plan())
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    hook = task.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        task.segment(start_of(task), shard_files, plan())
    hook.remove()

    again, _ = task.segment(start_of(task), shard_files, plan())
    assert again.pack() == wanted.pack()


def test_shards_of_another_window_are_refused(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task(window_seconds=2.0)

    with pytest.raises(LocalError, match="was prepared for other features than 'p2pasr/demo-base' takes"):
        task.segment(start_of(task), shard_files, plan())
    with pytest.raises(LocalError, match="was prepared for other features"):
        task.evaluate(None, shard_files)


def test_the_advice_for_shards_of_another_window_names_the_window(make_task: MakeTask, shard_files: Shards) -> None:
    with pytest.raises(LocalError, match=r"; prepare it with --model p2pasr/demo-base --window-seconds 2$"):
        make_task(window_seconds=2.0).evaluate(None, shard_files)


@pytest.mark.parametrize("window", [2.0, 1.0, 2.5, 1.01, 2.007, 1.37])
def test_a_shorter_window_trains(make_task: MakeTask, corpus: Path, tmp_path: Path, window: float) -> None:
    settings = Settings(MODEL, dialect="yue", window_seconds=window, clips_per_shard=24)
    index = prepare(corpus, tmp_path, settings)

    # Windows that are no multiple of an encoder position's 0.02 s too.
    task = make_task(window_seconds=window)
    end, report = task.segment(start_of(task), [tmp_path / index.shards[0].file], plan())

    assert np.isfinite(report.loss)
    assert moved(task, end).any()


# --- the schedule -------------------------------------------------------------------------------


def config(**changes: Any) -> LoraTaskConfig:
    return LoraTaskConfig.model_validate({"model": MODEL, "learning_rate": 0.01, "warmup_steps": 10, **changes})


def test_the_learning_rate_rises_to_its_peak_and_falls_along_half_a_cosine() -> None:
    rates = [learning_rate(config(), step, 110) for step in range(111)]

    assert rates[0] == pytest.approx(0.001)
    assert rates[9] == rates[10] == max(rates) == 0.01
    assert rates[:10] == pytest.approx([0.001 * (step + 1) for step in range(10)])
    assert rates[60] == pytest.approx(0.005)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[110] == pytest.approx(0.0)


@given(
    step=st.integers(0, 10_000), total=st.integers(1, 10_000), warmup=st.integers(0, 10_000), peak=st.floats(1e-6, 1)
)
def test_the_learning_rate_stays_between_zero_and_its_peak(step: int, total: int, warmup: int, peak: float) -> None:
    rate = learning_rate(config(learning_rate=peak, warmup_steps=warmup), step, total)

    assert 0.0 <= rate <= peak


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert learning_rate(config(warmup_steps=0), 0, 100) == 0.01


def test_at_a_learning_rate_of_zero_nothing_moves(task: LoraTask, shard_files: Shards) -> None:
    end, _ = task.segment(start_of(task), shard_files, plan(first=100, total=100))

    assert not moved(task, end).any()


# --- how far a value can move -------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{}, {"weight_decay": 0.5, "learning_rate": 0.1}, {"precision": "bf16"}, {"quantise": "8bit"}, {"beta2": 0.9}],
    ids=str,
)
def test_no_value_moves_further_than_the_task_says(
    make_task: MakeTask, shard_files: Shards, config: dict[str, Any]
) -> None:
    task = make_task(**config)
    start = middle = start_of(task)
    for segment in range(2):
        first = 3 * segment
        middle, _ = task.segment(middle, shard_files, plan(steps=3, seed=segment, first=first))
        bound = task.largest_move(start.params, 0, first + 3, 100)
        assert 0.1 * bound < np.abs(moved(task, middle)).max() <= 1.01 * bound


@pytest.mark.parametrize("first", [0, 60])
def test_the_first_step_of_a_round_moves_values_as_far_as_the_task_says(
    make_task: MakeTask, shard_files: Shards, first: int
) -> None:
    task = make_task(warmup_steps=10)
    end, _ = task.segment(start_of(task), shard_files, plan(steps=1, first=first))
    bound = task.largest_move(task.initial_params(), first, 1, 100)

    assert bound == pytest.approx(learning_rate(task.config, first, 100), rel=1e-3)
    assert 0.99 * bound < np.abs(moved(task, end)).max() <= 1.01 * bound


def test_moments_in_eight_bits_leave_no_bound(make_task: MakeTask) -> None:
    task = make_task(**EIGHT_BIT)

    assert task.largest_move(task.initial_params(), 0, 1, 100) == math.inf


# --- scoring and exporting ----------------------------------------------------------------------


def test_none_scores_the_untrained_base(make_task: MakeTask, shard_files: Shards) -> None:
    task = make_task()
    at_start = task.evaluate(task.initial_params(), shard_files)
    elsewhere = {name: value + np.float32(0.3) for name, value in task.initial_params().items()}

    assert task.evaluate(elsewhere, shard_files) != at_start
    assert task.evaluate(None, shard_files) == at_start
    assert (at_start["clips"], at_start["empty"], at_start["wer"]) == (24, 0, None)
    assert 0.3 < at_start["cer"] < 1.5


def test_scoring_reports_its_progress(task: LoraTask, shard_files: Shards) -> None:
    calls: list[tuple[int, int]] = []
    task.evaluate(None, shard_files, lambda done, total: calls.append((done, total)))

    assert calls[-1] == (24, 24)


def test_shards_without_any_text_cannot_be_scored(make_task: MakeTask, tmp_path: Path, corpus: Path) -> None:
    rows = json.loads((corpus / "labels.json").read_text(encoding="utf-8"))[:2]
    for row in rows:
        row["audio"] = str(corpus / row["audio"])
        row["text"] = "。"
    (tmp_path / "labels.json").write_text(json.dumps(rows), encoding="utf-8")
    index = prepare(tmp_path, tmp_path / "out", Settings(MODEL))

    with pytest.raises(LocalError, match="no reference holds any text"):
        make_task().evaluate(None, [tmp_path / "out" / shard.file for shard in index.shards])


@pytest.mark.parametrize(
    "config", [{}, {"average": "frozen-a"}, {"targets": ["fc1", "out_proj"], "alpha": 7.0}], ids=str
)
def test_an_exported_adapter_gives_the_same_logits_through_plain_peft(
    make_task: MakeTask, shard_files: Shards, tmp_path: Path, config: dict[str, Any]
) -> None:
    task = make_task(**config)
    end, _ = task.segment(start_of(task), shard_files, plan(steps=4))
    task.export(end.params, tmp_path / "adapter", {"round": 1})
    clips = read_shard(shard_files[0]).clips[:3]
    batch = collate(clips, 300, task.frontend.config.pad_token_id)

    base = WhisperForConditionalGeneration.from_pretrained(BUNDLED[MODEL], dtype=torch.float32).eval()
    with torch.no_grad():
        untrained = base(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits
        plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        theirs = plain(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits
        task.model.eval()
        ours = task.model(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits

    assert torch.equal(theirs, ours)
    assert (theirs - untrained).abs().max() > 1e-3


def test_an_exported_adapter_says_what_an_adapter_folder_cannot(make_task: MakeTask, tmp_path: Path) -> None:
    task = build("lora", pin("lora", {**LORA, "alpha": 8.0}), seed=1)
    task.export(task.initial_params(), tmp_path / "adapter", {"run": "ab" * 32, "round": 3})

    notes = json.loads((tmp_path / "adapter" / "p2pasr.json").read_text(encoding="utf-8"))
    assert notes == {
        "run": "ab" * 32,
        "round": 3,
        "base_model": MODEL,
        "base_revision": None,
        "base_weights": weights_digest(MODEL),
        "task": "transcribe",
        "window_seconds": 3.0,
        "scored_after": "p2pasr.speech.text.normalise",
        "lora": {"rank": 4, "alpha": 8.0, "average": "factors"},
    }
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (4, 8.0, ["q_proj", "v_proj"])
    assert adapter["task_type"] is None


def test_an_exported_adapter_names_its_base_and_no_folder_of_this_machine(steady_base: Path, tmp_path: Path) -> None:
    task = build("lora", LORA, seed=1, model=str(steady_base))
    task.export(task.initial_params(), tmp_path / "adapter", {})

    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == MODEL
    for path in (tmp_path / "adapter").iterdir():
        content = path.read_bytes()
        assert str(steady_base).encode() not in content
        assert str(BUNDLED[MODEL]).encode() not in content


def test_a_window_is_heard_in_whole_positions_of_the_encoder(make_task: MakeTask) -> None:
    # 1.1 s is 55 positions, though 1.1 * 50 is above 55 in binary.
    windows = {3.0: 300, 2.0: 200, 1.1: 110, 0.14: 14, 1.01: 102, 2.007: 202}
    assert {window: make_task(window_seconds=window).frames for window in windows} == windows


# --- a device that is too small -------------------------------------------------------------------


class Cramped:
    """A loss that has room for so many examples at once."""

    def __init__(self, task: LoraTask, room: int) -> None:
        self.loss, self.room, self.sizes = task.loss, room, list[int]()

    def __call__(self, examples: Sequence[Any]) -> torch.Tensor:
        self.sizes.append(len(examples))
        if len(examples) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.loss(examples)


def test_a_batch_that_does_not_fit_is_trained_in_smaller_pieces(
    make_task: MakeTask, shard_files: Shards, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roomy, small = make_task(steady=True), make_task(steady=True)
    cramped = Cramped(small, 3)
    monkeypatch.setattr(small, "loss", cramped)
    end, _ = roomy.segment(start_of(roomy), shard_files, plan(samples=8))
    again, _ = small.segment(start_of(small), shard_files, plan(samples=8))

    assert cramped.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert distance(moved(roomy, end), moved(roomy, again)) < 1e-3
    assert "8 examples at once do not fit the memory of this device; 4 do from now on" in caplog.text


@pytest.mark.parametrize(
    ("steady", "room", "sentence"),
    [
        (True, 0, r"^not even one example fits this device's memory; p2pasr plan says what does$"),
        (False, 3, r"^4 examples at once do not fit .* start the run with task\.config\.micro_batch: 2$"),
    ],
)
def test_what_no_piece_can_mend_is_one_sentence(
    make_task: MakeTask, shard_files: Shards, monkeypatch: pytest.MonkeyPatch, steady: bool, room: int, sentence: str
) -> None:
    task = make_task(steady=steady)
    monkeypatch.setattr(task, "loss", Cramped(task, room))

    with pytest.raises(LocalError, match=sentence):
        task.segment(start_of(task), shard_files, plan(samples=4))
