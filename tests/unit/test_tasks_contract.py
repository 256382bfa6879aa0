"""What holds for every task that comes with the package, whatever it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr import tasks
from p2pasr.speech.synthetic import ACTIONS, DIGITS, OPENINGS
from p2pasr.tasks import Bounded, Checkpoint, Task, build, pin

from .conftest import LORA, MODEL, plan, start_of

STUDENT: dict[str, Any] = {"model": MODEL, "warmup_steps": 0, "learning_rate": 3e-3, "width": 32, "heads": 2}
DISTIL: dict[str, Any] = {"architecture": "distil-whisper", "model": MODEL, "warmup_steps": 0}
CTC = {**STUDENT, "layers": 1, "spec_augment": {"frequency_bins": 8, "time_share": 0.1}}
ZIPFORMER: dict[str, Any] = {
    "architecture": "zipformer-ctc",
    "model": MODEL,
    "warmup_steps": 0,
    "learning_rate": 3e-3,
    "sizes": {
        "layers": [1, 1, 1],
        "widths": [32, 48, 40],
        "downsampling": [1, 4, 2],
        "heads": [2, 2, 2],
        "feedforwards": [64, 64, 64],
        "kernels": [7, 5, 5],
        "channels": [4, 8, 8],
    },
    "spec_augment": CTC["spec_augment"],
}
LLM: dict[str, Any] = {
    "model": MODEL,
    "projector_width": 128,
    "max_tokens": 48,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
}
"""The folder of its language model is made for a session."""

SPOKEN = sorted({*"".join((*OPENINGS, *ACTIONS)), *DIGITS})
"""Characters of the synthetic corpus."""

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "learning_rate": 3e-3},
    "full": {"model": MODEL, "warmup_steps": 0, "learning_rate": 3e-4},
    "full-decoder": {"model": MODEL, "warmup_steps": 0, "learning_rate": 3e-4, "freeze_encoder": True},
    "student-whisper": {**STUDENT, "architecture": "whisper", "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0},
    "student-distil-whisper": {
        "model": MODEL,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "architecture": "distil-whisper",
    },
    "student-transformer-ctc": {**CTC, "architecture": "transformer-ctc"},
    "student-transformer-ctc-bytes": {**CTC, "architecture": "transformer-ctc", "units": "bytes"},
    "student-parakeet-ctc": {**CTC, "architecture": "parakeet-ctc"},
    "student-wav2vec2-ctc": {**CTC, "architecture": "wav2vec2-ctc"},
    "student-hubert-ctc": {**CTC, "architecture": "hubert-ctc"},
    "student-wav2vec2-bert-ctc": {**CTC, "architecture": "wav2vec2-bert-ctc"},
    "student-zipformer-ctc": ZIPFORMER,
    "distill": {
        "model": MODEL,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "encoder_layers": [0],
        "decoder_layers": [0],
    },
    "distill-online": {
        "model": MODEL,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "decoder_layers": [-1],
        "freeze_encoder": True,
        "teacher_online": True,
    },
    "features": {
        "model": MODEL,
        "heads": ["accent", "speaker", "vad", "confidence", "masked"],
        "dialects": ["cmn", "yue"],
        "encoder": {"width": 32, "layers": 1, "feedforward": 64},
        "text_layers": 1,
        "warmup_steps": 0,
        "learning_rate": 5e-3,
    },
    "features-text": {
        "model": MODEL,
        "heads": ["correction", "phoneme"],
        "pronunciations": {"yue": {char: [f"u{ord(char) % 7}", f"v{ord(char) % 5}"] for char in SPOKEN}},
        "encoder": {"width": 32, "layers": 1, "feedforward": 64},
        "text_layers": 1,
        "warmup_steps": 0,
        "learning_rate": 5e-3,
    },
    "llm": {**LLM, "stage": "adapters", "rank": 4},
    "llm-projector": {**LLM, "stage": "projector"},
}
"""Name of a variant, of which the first word is its kind → a configuration that learns from a few clips."""

Make = Callable[[], Task]


@pytest.fixture
def shard_files(labelled_files: Sequence[Path]) -> Sequence[Path]:
    """Shards for all kinds: those with a teacher's labels are shards like any other."""
    return labelled_files


@pytest.fixture(params=CONFIGS)
def make(request: pytest.FixtureRequest, shard_files: Sequence[Path], language_model: Path) -> Make:
    """Makes a new instance of a task, configured as a manifest would hold it."""
    kind = request.param.partition("-")[0]
    made = {"language_model": str(language_model)} if kind == "llm" else {}
    pinned = pin(kind, {**CONFIGS[request.param], **made}, None, shard_files)
    return lambda: build(kind, pinned, seed=3, shards=shard_files)


def test_every_kind_is_among_the_configurations() -> None:
    assert {name.partition("-")[0] for name in CONFIGS} == tasks.KINDS.keys()


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


def test_the_loss_falls(make: Make, shard_files: Sequence[Path]) -> None:
    task = make()
    at, losses = start_of(task), []
    for index in range(6):
        at, report = task.segment(at, shard_files, plan(steps=5, samples=8, seed=index, first=5 * index, total=60))
        losses.append(report.loss)
    assert losses[-1] < 0.8 * losses[0]


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
