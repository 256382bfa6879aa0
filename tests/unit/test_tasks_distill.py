"""Distillation: the loss, where a student starts, a teacher in the segments, and what a student gains from one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import WhisperForConditionalGeneration

from benchmarks.distillation import measure
from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import read_config, validated
from p2pasr.protocol.tensors import pack_tensors, unpack_tensors
from p2pasr.runs import shard_paths
from p2pasr.speech.labels import IDS
from p2pasr.speech.prepare import read_index
from p2pasr.speech.pretrained import weights_digest
from p2pasr.speech.shards import Clip, read_shard
from p2pasr.tasks import build, pin
from p2pasr.tasks.distill import DistillTask, DistillTaskConfig, divergence, temperature
from p2pasr.tasks.labelling import LabelSettings, label_shards
from p2pasr.tasks.teacher import Teacher, grouped
from p2pasr.tasks.whisper import collate, greedy, load_whisper, pick_layers

from .builders import make_identity
from .conftest import MODEL, plan, start_of

DISTILL: dict[str, Any] = {"model": MODEL, "decoder_layers": [0], "warmup_steps": 0, "learning_rate": 1e-3}
ONLINE: dict[str, Any] = {**DISTILL, "teacher_online": True, "top_k": 16}


def made(files: Sequence[Path], config: dict[str, Any]) -> DistillTask:
    """A task as a manifest would describe it."""
    task = build("distill", pin("distill", config, None, files), seed=1, shards=files)
    assert isinstance(task, DistillTask)
    return task


def logs_of(seed: int, outcomes: int = 30) -> torch.Tensor:
    return torch.randn(5, outcomes, generator=torch.Generator().manual_seed(seed)).mul(3).log_softmax(-1)


# --- the loss -----------------------------------------------------------------------------------


@given(one=st.integers(0, 99), other=st.integers(0, 99), width=st.integers(1, 29), heat=st.floats(1, 10))
def test_the_divergence_is_zero_of_oneself_and_never_below(one: int, other: int, width: int, heat: float) -> None:
    wanted, given_ = logs_of(one), logs_of(other)
    ids = wanted.topk(width).indices

    assert float(divergence(grouped(wanted, ids), grouped(given_, ids), heat)) >= -1e-5
    assert float(divergence(grouped(wanted, ids), grouped(wanted, ids), heat)) == pytest.approx(0, abs=1e-5)


@given(one=st.integers(0, 99), other=st.integers(0, 99), heat=st.floats(1, 10))
def test_where_all_tokens_but_one_are_named_it_is_the_divergence_of_the_whole_distributions(
    one: int, other: int, heat: float
) -> None:
    wanted, given_ = logs_of(one), logs_of(other)
    ids = wanted.topk(29).indices
    p, q = ((logs / heat).softmax(-1).double() for logs in (wanted, given_))

    whole = float((p * (p / q).log()).sum())
    assert float(divergence(grouped(wanted, ids), grouped(given_, ids), heat)) == pytest.approx(
        whole, rel=1e-3, abs=1e-4
    )


@given(one=st.integers(0, 99), other=st.integers(0, 99), width=st.integers(1, 28))
def test_naming_fewer_tokens_never_makes_distributions_more_different(one: int, other: int, width: int) -> None:
    wanted, given_ = logs_of(one), logs_of(other)
    few, more = (wanted.topk(count).indices for count in (width, width + 1))

    less = float(divergence(grouped(wanted, few), grouped(given_, few), 1.0))
    assert less <= float(divergence(grouped(wanted, more), grouped(given_, more), 1.0)) + 1e-4


def test_the_gradient_is_finite_where_the_named_tokens_hold_all_of_the_probability() -> None:
    logits = torch.full((1, 20), -80.0)
    logits[0, 3] = 0.0
    logits.requires_grad_()
    ids = torch.tensor([[3]])
    loss = divergence(grouped(logs_of(0, 20)[:1], ids), grouped(logits.log_softmax(-1), ids), 1.0)
    torch.autograd.backward(loss)

    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_temperature_falls_by_equal_steps_and_stays_at_its_last() -> None:
    config = DistillTaskConfig(model=MODEL)
    heats = [temperature(config, step, 7) for step in range(9)]

    assert heats == pytest.approx([4, 3.5, 3, 2.5, 2, 1.5, 1, 1, 1])
    assert temperature(config, 0, 1) == 4


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_the_teachers_share_and_that_of_the_transcripts(
    labelled_files: Sequence[Path], alpha: float
) -> None:
    task = made(labelled_files, {**DISTILL, "alpha": alpha})
    clips = list(read_shard(labelled_files[0]).clips[:3])
    task.model.eval()
    task.before_step(0, 10)
    with torch.no_grad():
        loss = float(task.loss(clips))
        hard = soft = 0.0
        for clip in clips:
            batch = collate([clip], 300, task.frontend.config.pad_token_id)
            out = task.model(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits[0]
            hard += float(cross_entropy(out, batch.labels[0], reduction="sum"))
            logs = out.log_softmax(-1).numpy().astype(np.float64)
            for row, ids in enumerate(clip.labels.ids):
                q = [*logs[row][ids], math.log(np.exp(np.delete(logs[row], ids)).sum())]
                p = [*clip.labels.logs[row].astype(np.float64), clip.labels.rest[row]]
                p4, q4 = (np.exp(np.array(each) / 4) / np.exp(np.array(each) / 4).sum() for each in (p, q))
                soft += float((p4 * np.log(p4 / q4)).sum())

    assert loss == pytest.approx(alpha * 16 * soft + (1 - alpha) * hard, rel=1e-4)


def test_the_temperature_follows_from_where_the_segment_stands_in_the_run(labelled_files: Sequence[Path]) -> None:
    task = made(labelled_files, {**DISTILL, "alpha": 1.0, "learning_rate": 1e-9})
    _, early = task.segment(start_of(task), labelled_files, plan(steps=1, first=0, total=2))
    assert task.temperature == 4
    _, late = task.segment(start_of(task), labelled_files, plan(steps=1, first=1, total=2))
    assert task.temperature == 1
    assert early.loss != late.loss
    assert task.segment(start_of(task), labelled_files, plan(steps=1, first=0, total=2))[1] == early


def test_the_probe_is_heard_at_the_last_temperature(labelled_files: Sequence[Path]) -> None:
    task = made(labelled_files, {**DISTILL, "first_temperature": 4.0, "last_temperature": 2.0})
    constant = made(labelled_files, {**DISTILL, "first_temperature": 2.0, "last_temperature": 2.0})
    params = task.initial_params()

    assert task.probe_loss(params, labelled_files) == constant.probe_loss(params, labelled_files)


# --- where a student starts ---------------------------------------------------------------------


def test_a_student_has_the_layers_that_were_picked_and_all_else_of_its_model() -> None:
    model = load_whisper(MODEL)
    small = pick_layers(model, [0, -1], [-1])
    theirs, own = model.state_dict(), small.state_dict()
    names = {"encoder.layers.0.": "encoder.layers.0.", "encoder.layers.1.": "encoder.layers.2."}
    names |= {"decoder.layers.0.": "decoder.layers.1."}

    def origin(name: str) -> str:
        for new, old in names.items():
            if new in name:
                return name.replace(new, old)
        return name

    assert (small.config.encoder_layers, small.config.decoder_layers) == (2, 1)
    assert (len(model.model.encoder.layers), model.config.encoder_layers) == (3, 3)
    assert all(torch.equal(value, theirs[origin(name)]) for name, value in own.items())
    assert small.proj_out.weight is small.model.decoder.embed_tokens.weight
    assert all(value.data_ptr() != theirs[origin(name)].data_ptr() for name, value in own.items())


def test_a_student_with_picked_layers_writes_the_same_with_and_without_its_past(labelled_files: Sequence[Path]) -> None:
    small = pick_layers(load_whisper(MODEL), None, [-1]).eval()
    clip = read_shard(labelled_files[0]).clips[0]
    batch = collate([clip], 300, small.config.pad_token_id)
    with torch.inference_mode():
        (row,) = greedy(small, batch.features, clip.tokens[:4])
        ids = list(clip.tokens[:4])
        for token in row[:10]:
            logits = small(input_features=batch.features, decoder_input_ids=torch.tensor([ids])).logits
            assert int(logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("layers", [[3], [-4], [0, 0], [0, -3], []], ids=str)
def test_layers_that_are_not_there_or_named_twice_are_refused(layers: list[int]) -> None:
    with pytest.raises(LocalError, match="cannot be picked from the encoder's 3"):
        pick_layers(load_whisper(MODEL), layers, None)


def test_an_exported_student_is_a_whisper_model_of_its_size(labelled_files: Sequence[Path], tmp_path: Path) -> None:
    task = made(labelled_files, DISTILL)
    end, _ = task.segment(start_of(task), labelled_files, plan(steps=2))
    task.export(end.params, tmp_path, {"round": 1})
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = collate(read_shard(labelled_files[0]).clips[:2], 300, plain.config.pad_token_id)
    task.model.eval()
    with torch.no_grad():
        theirs = plain(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits
        ours = task.model(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits

    assert plain.config.decoder_layers == 1
    assert torch.equal(theirs, ours)
    assert json.loads((tmp_path / "p2pasr.json").read_text(encoding="utf-8"))["teacher_weights"] == weights_digest(
        MODEL
    )


# --- labels and the manifest --------------------------------------------------------------------


def test_a_manifest_fixes_the_weights_of_student_and_teacher(
    labelled_files: Sequence[Path], shard_files: Sequence[Path], steady_base: Path
) -> None:
    offline = pin("distill", DISTILL, None, labelled_files)
    online = pin("distill", {**ONLINE, "teacher": str(steady_base)}, None, shard_files)

    assert offline["weights"] == offline["teacher_weights"] == weights_digest(MODEL)
    assert online["teacher_weights"] == weights_digest(str(steady_base))


def test_shards_without_labels_are_refused(shard_files: Sequence[Path], labelled_files: Sequence[Path]) -> None:
    with pytest.raises(LocalError, match="holds no teacher's labels"):
        made(shard_files, DISTILL)
    task = made(labelled_files, DISTILL)
    with pytest.raises(LocalError, match="hold no labels"):
        task.segment(start_of(task), shard_files, plan())


def test_shards_that_another_teacher_labelled_are_refused(labelled_files: Sequence[Path]) -> None:
    config = {**pin("distill", DISTILL, None, labelled_files), "teacher_weights": "ab" * 32}
    with pytest.raises(LocalError, match="labelled by another teacher"):
        build("distill", config, seed=1, shards=labelled_files)


def test_labels_of_different_widths_are_refused(labelled_files: Sequence[Path], shards: Path, tmp_path: Path) -> None:
    teacher = Teacher(MODEL, read_index(shards).features, MODEL)  # type: ignore[arg-type]
    label_shards(teacher, shards, tmp_path, LabelSettings(top_k=8), make_identity(1))
    with pytest.raises(LocalError, match="labels name 8 and 16 tokens"):
        made([labelled_files[0], shard_paths(tmp_path)[1]], DISTILL)


def test_a_teacher_is_only_named_where_it_runs_in_the_segments(labelled_files: Sequence[Path]) -> None:
    with pytest.raises(LocalError, match="set teacher_online"):
        pin("distill", {**DISTILL, "teacher": MODEL}, None, labelled_files)


def changed(folder: Path, path: Path, **tensors: Any) -> Path:
    old, meta = unpack_tensors(path.read_bytes())
    (folder / "changed").write_bytes(pack_tensors({**old, **tensors}, meta))
    return folder / "changed"


def test_labels_that_were_changed_after_signing_are_refused(labelled_files: Sequence[Path], tmp_path: Path) -> None:
    ids = unpack_tensors(labelled_files[0].read_bytes())[0][IDS]
    path = changed(tmp_path, labelled_files[0], **{IDS: ids[:, ::-1].copy()})
    with pytest.raises(LocalError, match="not signed by the peer"):
        made([path], DISTILL)


def test_a_label_of_a_token_that_the_student_lacks_is_refused_in_one_sentence(
    labelled_files: Sequence[Path], tmp_path: Path
) -> None:
    task = made(labelled_files, DISTILL)
    ids = unpack_tensors(labelled_files[0].read_bytes())[0][IDS].copy()
    ids[:, 0] = 70_000
    with pytest.raises(LocalError, match="names token 70000"):
        task.segment(start_of(task), [changed(tmp_path, labelled_files[0], **{IDS: ids})], plan(samples=8))


def test_a_student_is_scored_on_shards_without_labels(
    labelled_files: Sequence[Path], shard_files: Sequence[Path]
) -> None:
    task = made(labelled_files, DISTILL)

    assert task.evaluate(None, shard_files) == task.evaluate(None, labelled_files)


# --- a teacher in the segments ------------------------------------------------------------------


def steady(task: DistillTask, clips: Sequence[Clip]) -> float:
    """The loss without dropout."""
    task.model.eval()
    task.before_step(0, 10)
    with torch.no_grad():
        return float(task.loss(clips))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_teacher_in_the_segments_says_what_its_labels_say(
    labelled_files: Sequence[Path], shard_files: Sequence[Path], frozen: bool
) -> None:
    changes = {"freeze_encoder": frozen, "alpha": 1.0}
    online, offline = made(shard_files, {**ONLINE, **changes}), made(labelled_files, {**DISTILL, **changes})

    given_ = steady(online, read_shard(shard_files[0]).clips)
    assert given_ == pytest.approx(steady(offline, read_shard(labelled_files[0]).clips), rel=1e-3)


def test_an_encoder_that_student_and_teacher_share_hears_each_batch_once(shard_files: Sequence[Path]) -> None:
    task = made(shard_files, {**ONLINE, "freeze_encoder": True})
    heard: list[int] = []
    task.model.model.encoder.register_forward_hook(lambda *_: heard.append(1))
    before = {name: value.clone() for name, value in task.model.model.encoder.state_dict().items()}
    task.segment(start_of(task), shard_files, plan(steps=3))

    assert task.teacher is not None
    assert task.teacher.model.encoder is task.model.model.encoder
    assert len(heard) == 3
    assert not any(name.startswith("model.encoder") for name in task.trained)
    assert all(torch.equal(before[name], value) for name, value in task.model.model.encoder.state_dict().items())


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_hidden_is_hidden_from_the_student_only(
    shard_files: Sequence[Path], steady_base: Path, frozen: bool
) -> None:
    task = made(shard_files, {**ONLINE, "model": str(steady_base), "freeze_encoder": frozen, "spec_augment": {}})
    clips = read_shard(shard_files[0]).clips
    features = collate(clips, 300, task.frontend.config.pad_token_id).features
    heard: dict[str, list[bool]] = {"student": [], "teacher": []}

    def listen(who: str, model: Any) -> None:
        model.get_decoder().register_forward_pre_hook(
            lambda _, __, given_: heard[who].append(bool(torch.equal(given_["encoder_hidden_states"], clean))),
            with_kwargs=True,
        )

    with torch.no_grad():
        clean = task.model.get_encoder()(features).last_hidden_state
        listen("student", task.model)
        listen("teacher", task.teacher)
        task.model.train()
        task.loss(clips)

    assert heard == {"student": [False], "teacher": [True]}


@pytest.mark.parametrize("change", [{}, {"freeze_encoder": True, "encoder_layers": [0, 1]}], ids=str)
def test_an_encoder_that_differs_from_the_teachers_is_its_own(
    shard_files: Sequence[Path], change: dict[str, Any]
) -> None:
    task = made(shard_files, {**ONLINE, **change})
    assert task.teacher is not None
    assert task.teacher.model.encoder is not task.model.model.encoder
    before = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    task.segment(start_of(task), shard_files, plan(steps=2))

    assert all(torch.equal(before[name], value) for name, value in task.teacher.state_dict().items())
    assert not task.teacher.training


def test_a_teacher_with_other_weights_than_the_runs_is_refused(shard_files: Sequence[Path]) -> None:
    config = {**pin("distill", ONLINE, None, shard_files), "teacher_weights": "ab" * 32}
    with pytest.raises(LocalError, match="the weights of the teacher"):
        build("distill", config, seed=1, shards=shard_files)


def test_a_teacher_that_names_all_of_its_tokens_is_refused(shard_files: Sequence[Path]) -> None:
    with pytest.raises(LocalError, match="top_k is 4096, but the teacher has"):
        made(shard_files, {**ONLINE, "top_k": 4096})


# --- learning -----------------------------------------------------------------------------------


def test_of_transcripts_with_errors_a_student_with_a_teacher_learns_a_quarter_fewer_errors_at_equal_steps() -> None:
    rows = measure(seeds=[0, 1, 2], steps=60, wrong=0.2)

    for row in rows:
        assert row.teacher < 0.1
        assert row.with_teacher < 0.75 * row.without_teacher, row


@pytest.mark.parametrize("file", ["examples/distill.yaml", "p2pasr/demo/tasks/distill.yaml"])
def test_the_configurations_that_come_with_the_kind_are_valid(file: str) -> None:
    config = read_config(Path(__file__).parents[2] / file)

    assert config.task.kind == "distill"
    assert isinstance(validated(DistillTaskConfig, dict(config.task.config), file), DistillTaskConfig)
