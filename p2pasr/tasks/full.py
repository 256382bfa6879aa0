"""Fine-tune all of a Whisper model, or all but its encoder: for the small ones, whose deltas still travel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from p2pasr.protocol.tensors import Tensors
from p2pasr.tasks.training import trainable
from p2pasr.tasks.whisper import WhisperTask, WhisperTaskConfig, load_whisper, shorten, write_notes

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


class FullTaskConfig(WhisperTaskConfig):
    """The `task.config` section of a manifest whose task is `full`."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """AdamW's, at its highest: it falls from there to zero by a cosine over the run."""
    freeze_encoder: bool = False
    """Train the decoder only: what the encoder makes of sound stays as it is."""
    gradient_checkpointing: bool = False
    """Compute states again on the way back instead of keeping them: less memory, about a third more time."""


class FullTask(WhisperTask):
    """A Whisper model that is trained whole; implements :class:`p2pasr.tasks.base.Task` and its `Bounded`.

    Raises:
        LocalError: as :class:`p2pasr.tasks.whisper.WhisperTask`.
    """

    config: FullTaskConfig

    def __init__(self, config: FullTaskConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        super().__init__(config, seed, device, model)
        self.model = self.start()
        shorten(self.model, self.frames)
        self.model = self.model.to(self.device)
        if config.freeze_encoder:
            self.model.model.encoder.requires_grad_(False)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = trainable(self.model)
        self._base = self.get_params()

    def start(self) -> WhisperForConditionalGeneration:
        """The model that training starts from, with its whole window."""
        return load_whisper(self.source, self.config.revision)

    @property
    def whisper(self) -> WhisperForConditionalGeneration:
        """See :attr:`p2pasr.tasks.whisper.WhisperTask.whisper`."""
        return self.model

    def untrained(self) -> AbstractContextManager[Any]:
        """See :meth:`p2pasr.tasks.whisper.WhisperTask.untrained`."""
        self.set_params(self._base)
        return nullcontext()

    def initial_params(self) -> Tensors:
        """The base's own."""
        return dict(self._base)

    def export(self, params: Tensors, out: Path, about: Mapping[str, Any]) -> None:
        """Write a model folder for `WhisperForConditionalGeneration.from_pretrained`, with features and tokens."""
        self.set_params(params)
        self.model.save_pretrained(out)
        self.frontend.extractor.save_pretrained(out)
        self.frontend.tokenizer.save_pretrained(out)
        write_notes(out, self.notes(about))


CONFIG = FullTaskConfig
TASK = FullTask
