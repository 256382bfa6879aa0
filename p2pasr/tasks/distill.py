"""Distil a large Whisper into a small one (Hinton et al. 2015): the student learns what its teacher expects.

The teacher's expectation of a target is a distribution over its k most likely tokens and one for all
others together, and so is what the student is compared by: the divergence between the two is that of
whole distributions in which some outcomes are not told apart, and never less than zero. A
temperature T divides the k + 1 logarithms, which are then normalised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss

from p2pasr.errors import LocalError
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.labels import Labelling, check_signature
from p2pasr.speech.pretrained import frontend, weights_digest
from p2pasr.speech.shards import Clip, Shard, read_shard
from p2pasr.tasks.full import FullTask, FullTaskConfig
from p2pasr.tasks.teacher import grouped, stacked
from p2pasr.tasks.whisper import IGNORED, Batch, collate, load_whisper, pick_layers, shorten

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

Layers = Annotated[tuple[Annotated[int, Field(ge=-1024, lt=1024)], ...], Field(min_length=1, strict=False)]


class DistillTaskConfig(FullTaskConfig):
    """The `task.config` section of a manifest whose task is `distill`. `model` is what the student starts from."""

    encoder_layers: Layers | None = None
    """Which of the model's layers that hear the student has; all if left out."""
    decoder_layers: Layers | None = None
    """Which of the model's layers the student has, such as [0, -1] for the first and the last; all if left out."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Share of the teacher in the loss; the rest is cross entropy with the transcripts."""
    first_temperature: Annotated[float, Field(ge=1, le=100)] = 4.0
    """Of teacher and student in the run's first step."""
    last_temperature: Annotated[float, Field(ge=1, le=100)] = 1.0
    """In its last; from one to the other it goes by equal steps."""
    teacher_online: bool = False
    """Run the teacher in the segments. Otherwise its labels are in the shards: `p2pasr distill label`."""
    teacher: str | None = None
    """Hub id or local folder of the teacher that runs in the segments; `model` if left out."""
    teacher_revision: str | None = None
    """Commit of its hub repository."""
    teacher_weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """BLAKE3 of the teacher's weights, filled in by `p2pasr run new`."""
    top_k: Annotated[int, Field(ge=1, le=4096)] = 64
    """Tokens that a teacher in the segments names at each target; shards have their own number."""

    @model_validator(mode="after")
    def _teacher_runs(self) -> DistillTaskConfig:
        if not self.teacher_online and (self.teacher, self.teacher_revision) != (None, None):
            raise ValueError("teacher names one that runs in the segments: set teacher_online, or leave it out")
        return self


class DistillTask(FullTask):
    """A student that learns from a teacher; implements :class:`p2pasr.tasks.base.Task` and its `Bounded`.

    Raises:
        LocalError: as :class:`p2pasr.tasks.whisper.WhisperTask`, or the teacher is missing, another one, or hears
            or writes otherwise than the student.
    """

    config: DistillTaskConfig

    def __init__(self, config: DistillTaskConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        super().__init__(config, seed, device, model)
        self.temperature = config.first_temperature
        same = _teacher(config, self.source) == (self.source, config.revision)
        self.shares_encoder = same and config.freeze_encoder and config.encoder_layers is None
        self.teacher = self._load_teacher() if config.teacher_online else None

    @staticmethod
    def pin(config: Any, model: str | None, shards: Sequence[Path]) -> Any:
        """Fill in what the manifest must fix: the digests of the weights of the student's start and of the teacher."""
        weights = config.teacher_weights
        if weights is None and config.teacher_online:
            weights = weights_digest(*_teacher(config, model or config.model))
        elif weights is None and shards:
            weights = _labelling(shards[0], read_shard(shards[0])).weights
        return FullTask.pin(config, model, shards).model_copy(update={"teacher_weights": weights})

    def check(self, shards: Sequence[Path]) -> None:
        """Were these shards made for this student and, unless the teacher runs here, labelled by its teacher?

        Raises:
            LocalError: one was not, or its labels are not signed by who is named in it.
        """
        widths = set()
        for path in shards:
            shard = self._shard(path)
            if self.teacher is None:
                labelling = _labelling(path, shard)
                check_signature(path, labelling)
                if labelling.weights != self.config.teacher_weights:
                    raise LocalError(f"the shard {path} was labelled by another teacher than the run's")
                widths |= {clip.labels.ids.shape[1] for clip in shard.clips if clip.labels is not None}
        if len(widths) > 1:
            raise LocalError(
                f"the shards' labels name {' and '.join(map(str, sorted(widths)))} tokens; label all with one --top-k"
            )

    def start(self) -> WhisperForConditionalGeneration:
        """See :meth:`p2pasr.tasks.full.FullTask.start`."""
        return pick_layers(super().start(), self.config.encoder_layers, self.config.decoder_layers)

    def notes(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`p2pasr.tasks.whisper.WhisperTask.notes`."""
        return {**super().notes(about), "teacher_weights": self.config.teacher_weights}

    def before_step(self, step: int, total: int) -> None:
        """See :meth:`p2pasr.tasks.training.GradientTask.before_step`."""
        self.temperature = temperature(self.config, step, total)

    def probe_loss(self, params: Tensors, shards: Sequence[Path]) -> float:
        """See :meth:`p2pasr.tasks.base.Probed.probe_loss`; at the last temperature, wherever the run stands."""
        self.temperature = self.config.last_temperature
        return super().probe_loss(params, shards)

    def loss(self, examples: Sequence[Clip]) -> Tensor:
        """The summed divergence from the teacher, times its share and T², and the cross entropy, times the rest."""
        batch = collate(examples, self.frames, self.frontend.config.pad_token_id)
        places = torch.nonzero(batch.labels != IGNORED, as_tuple=True)  # on the CPU, where they can be counted
        heard = self.partly_hidden(batch.features, examples)
        whole = heard is batch.features
        batch, learned = batch.to(self.device), tuple(place.to(self.device) for place in places)
        encoded = self._encode(batch.features if whole else heard.to(self.device))
        out = self.model(encoder_outputs=(encoded,), decoder_input_ids=batch.decoder_input_ids)
        logs = log_softmax(out.logits[learned].float(), dim=-1)
        if self.teacher is None:
            ids, expected = self._labels(examples)
        else:
            ids, expected = self._ask(batch, learned, encoded if whole and self.shares_encoder else None)
        soft = divergence(expected, grouped(logs, ids), self.temperature)
        hard = nll_loss(logs, batch.labels[learned], reduction="sum")
        alpha = self.config.alpha
        return alpha * self.temperature**2 * soft + (1 - alpha) * hard

    def _encode(self, features: Tensor) -> Tensor:
        """What the student's encoder makes of a batch; a frozen one without dropout."""
        encoder = self.model.get_encoder()
        if not self.config.freeze_encoder:
            return encoder(features).last_hidden_state  # type: ignore[no-any-return]
        with torch.no_grad():
            return encoder.eval()(features).last_hidden_state  # type: ignore[no-any-return]

    def _labels(self, examples: Sequence[Clip]) -> tuple[Tensor, Tensor]:
        """The teacher's labels of all targets of a batch: ids, (targets, k), and logarithms, (targets, k + 1)."""
        labels = [clip.labels for clip in examples if clip.labels is not None]
        if len(labels) < len(examples) or len({each.ids.shape[1] for each in labels}) > 1:
            raise LocalError("the shards hold no labels, or of different widths; make them with p2pasr distill label")
        ids = np.concatenate([each.ids for each in labels]).astype(np.int64)
        if ids.max() >= self.model.config.vocab_size:
            raise LocalError(f"a teacher's label names token {ids.max()}, which {self.config.model!r} does not have")
        return torch.from_numpy(ids).to(self.device), torch.cat([stacked(each) for each in labels]).to(self.device)

    @torch.no_grad()
    def _ask(self, batch: Batch, learned: tuple[Tensor, ...], encoded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same from the teacher that runs here; `encoded` is what its encoder makes of the batch, if known."""
        teacher: Any = self.teacher
        if encoded is None:
            encoded = teacher.get_encoder()(batch.features).last_hidden_state
        out = teacher(encoder_outputs=(encoded,), decoder_input_ids=batch.decoder_input_ids)
        logs = log_softmax(out.logits[learned].float(), dim=-1)
        ids = logs.topk(self.config.top_k).indices
        return ids, grouped(logs, ids)

    def _load_teacher(self) -> WhisperForConditionalGeneration:
        config = self.config
        name, revision = _teacher(config, self.source)
        if config.teacher_weights is not None and weights_digest(name, revision) != config.teacher_weights:
            raise LocalError(
                f"the weights of the teacher {name!r} are not those this run was made with; get that version"
            )
        part = frontend(name, revision)
        mels = int(part.extractor.feature_size)
        if (mels, part.vocabulary) != (self.features.n_mels, self.features.vocabulary):
            raise LocalError(
                f"the teacher {name!r} hears or writes otherwise than {config.model!r}: "
                f"label the shards with p2pasr distill label, and leave out task.config.teacher_online"
            )
        if part.window_seconds < self.frontend.window_seconds:
            raise LocalError(f"the teacher {name!r} hears {part.window_seconds:g} s, less than the student")
        teacher = load_whisper(name, revision)
        shorten(teacher, self.frames)
        if config.top_k >= teacher.config.vocab_size:
            raise LocalError(
                f"task.config.top_k is {config.top_k}, but the teacher has {teacher.config.vocab_size} tokens"
            )
        if self.shares_encoder:
            teacher.model.encoder = self.model.model.encoder
        return teacher.to(self.device).eval().requires_grad_(False)


def temperature(config: DistillTaskConfig, step: int, total: int) -> float:
    """The temperature of a step: from the first to the last by equal steps, the run's last step being at the last."""
    progress = min(step / max(total - 1, 1), 1.0)
    return config.first_temperature + progress * (config.last_temperature - config.first_temperature)


def divergence(expected: Tensor, given: Tensor, temperature: float) -> Tensor:
    """Summed Kullback–Leibler divergence of tempered distributions: what is expected from what the student gives.

    Args:
        expected, given: float32, (targets, outcomes), logarithms of probabilities.
    """
    wanted = log_softmax(expected / temperature, dim=-1)
    return kl_div(log_softmax(given / temperature, dim=-1), wanted, log_target=True, reduction="sum")


def _teacher(config: DistillTaskConfig, source: str) -> tuple[str, str | None]:
    """Name and revision of the teacher that runs in the segments, where `source` is what the student starts from."""
    return (source, config.revision) if config.teacher is None else (config.teacher, config.teacher_revision)


def _labelling(path: Path, shard: Shard) -> Labelling:
    if shard.labelling is None:
        raise LocalError(
            f"the shard {path} holds no teacher's labels; make them with p2pasr distill label, or set "
            f"task.config.teacher_online"
        )
    return shard.labelling


CONFIG = DistillTaskConfig
TASK = DistillTask
