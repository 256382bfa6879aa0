"""Small models that the swarm trains whole: from nothing, or from what a larger or another model knows.

The configuration's `architecture` chooses between models that write like Whisper, which are here, and those with a
CTC head, which are in :mod:`p2pasr.tasks.ctc`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, RootModel, model_validator

from p2pasr.protocol.encoding import digest
from p2pasr.speech.pretrained import GENERATION, load, weight_file
from p2pasr.tasks.base import Task
from p2pasr.tasks.ctc import CtcConfig, CtcTask, ZipformerCtcConfig
from p2pasr.tasks.full import FullTask, FullTaskConfig
from p2pasr.tasks.training import fresh_params
from p2pasr.tasks.whisper import pick_layers

if TYPE_CHECKING:
    from transformers import WhisperConfig, WhisperForConditionalGeneration


class ScratchWhisperConfig(FullTaskConfig):
    """The `task.config` of a student that has Whisper's shape and starts from nothing.

    Of `model` it takes features, tokens, window and what its folder says about writing them, and no weights.
    """

    architecture: Literal["whisper"]
    """The student's shape."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    """AdamW's, at its highest: it falls from there to zero by a cosine over the run."""
    width: Annotated[int, Field(ge=8, le=4096)] = 512
    """Values of a state; hidden layers have four times as many."""
    encoder_layers: Annotated[int, Field(ge=1, le=64)] = 6
    """Layers that hear."""
    decoder_layers: Annotated[int, Field(ge=1, le=64)] = 6
    """Layers that write."""
    heads: Annotated[int, Field(ge=1, le=64)] = 8
    """Of each attention; the width is a multiple of twice as many."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of every layer, while training."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> ScratchWhisperConfig:
        if self.width % (2 * self.heads):
            raise ValueError(f"width ({self.width}) must be a multiple of twice the heads ({self.heads})")
        if self.freeze_encoder:
            raise ValueError("freeze_encoder would leave an encoder that knows nothing; a whisper student trains it")
        return self


class ScratchWhisperTask(FullTask):
    """A Whisper-shaped model from nothing.

    Raises:
        LocalError: as :class:`p2pasr.tasks.full.FullTask`.
    """

    config: ScratchWhisperConfig

    def __init__(self, config: ScratchWhisperConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        super().__init__(config, seed, device, model)
        self._base = fresh_params(self.trained, digest("student", seed.to_bytes(8, "big")))

    @staticmethod
    def pin(config: Any, model: str | None, shards: Sequence[Path]) -> Any:  # noqa: ARG004 (other tasks use them)
        """Every version is fixed already: no weights are loaded, and shards name the vocabulary."""
        return config

    def start(self) -> WhisperForConditionalGeneration:
        """See :meth:`p2pasr.tasks.full.FullTask.start`."""
        from transformers import GenerationConfig, WhisperForConditionalGeneration

        model = WhisperForConditionalGeneration(whisper_shape(self.config, self.frontend.config, self.frames))
        if weight_file(self.source, GENERATION, self.config.revision) is not None:
            model.generation_config = load(GenerationConfig, self.source, self.config.revision)
            model.generation_config.alignment_heads = None  # they name layers of the other model
        return model


_KEPT = (
    *("vocab_size", "num_mel_bins", "max_target_positions", "begin_suppress_tokens", "suppress_tokens"),
    *("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def whisper_shape(config: ScratchWhisperConfig, like: WhisperConfig, frames: int) -> WhisperConfig:
    """The transformers configuration of a student.

    Args:
        like: the configuration of the model whose features and tokens the student takes.
        frames: frames of the student's window, 100 a second.
    """
    from transformers import WhisperConfig

    return WhisperConfig(
        **{name: getattr(like, name) for name in _KEPT},
        max_source_positions=frames // 2,
        d_model=config.width,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.heads,
        decoder_attention_heads=config.heads,
        encoder_ffn_dim=4 * config.width,
        decoder_ffn_dim=4 * config.width,
        dropout=config.dropout,
    )


class DistilWhisperConfig(FullTaskConfig):
    """The `task.config` of a student that keeps the encoder of `model` and a few layers of its decoder."""

    architecture: Literal["distil-whisper"]
    """The student's shape."""
    freeze_encoder: bool = True
    """As Distil-Whisper does (Gandhi et al. 2023): what the teacher hears, the student hears."""
    decoder_layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=64, strict=False)] = (0, -1)
    """The teacher's decoder layers that the student starts from, ascending; negative ones count from the last."""


class DistilWhisperTask(FullTask):
    """A Whisper model with most of its decoder taken out.

    Raises:
        LocalError: as :class:`p2pasr.tasks.full.FullTask`, or the teacher has no such layers.
    """

    config: DistilWhisperConfig

    def start(self) -> WhisperForConditionalGeneration:
        """See :meth:`p2pasr.tasks.full.FullTask.start`."""
        return pick_layers(super().start(), None, self.config.decoder_layers)

    def notes(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`p2pasr.tasks.whisper.WhisperTask.notes`."""
        return {**super().notes(about), "decoder_layers": list(self.config.decoder_layers)}


class StudentConfig(
    RootModel[
        Annotated[
            ScratchWhisperConfig | DistilWhisperConfig | CtcConfig | ZipformerCtcConfig,
            Field(discriminator="architecture"),
        ]
    ]
):
    """The `task.config` section of a manifest whose task is `student`: what its `architecture` asks for."""


class Students:
    """Makes the task that an architecture needs, and pins its configuration."""

    _tasks: Mapping[type, Any] = {
        ScratchWhisperConfig: ScratchWhisperTask,
        DistilWhisperConfig: DistilWhisperTask,
        CtcConfig: CtcTask,
        ZipformerCtcConfig: CtcTask,
    }

    def __call__(self, config: StudentConfig, seed: int, device: str = "cpu", model: str | None = None) -> Task:
        """See :func:`p2pasr.tasks.build`."""
        task: Task = self._tasks[type(config.root)](config.root, seed, device, model)
        return task

    def pin(self, config: StudentConfig, model: str | None, shards: Sequence[Path]) -> StudentConfig:
        """See :func:`p2pasr.tasks.pin`."""
        return StudentConfig(self._tasks[type(config.root)].pin(config.root, model, shards))


CONFIG = StudentConfig
TASK = Students()
