"""Encoders that learn to transcribe by connectionist temporal classification (Graves et al. 2006)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import ctc_loss, log_softmax

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.metrics import error_rates
from p2pasr.speech.pretrained import Frontend, frontend, weights_digest
from p2pasr.speech.shards import Clip, Features, Shard, read_shard, silence
from p2pasr.speech.text import normalise
from p2pasr.tasks.augment import spec_augment
from p2pasr.tasks.base import OnProgress
from p2pasr.tasks.determinism import usable_device
from p2pasr.tasks.encoders import BLANK, ENCODERS, Encoder, ZipformerSizes
from p2pasr.tasks.training import GradientTask, trainable
from p2pasr.tasks.whisper import WhisperTaskConfig, matching_shard, write_notes

SIZES: Final = {
    "transformer-ctc": (12, 1024, 16),
    "parakeet-ctc": (17, 512, 8),
    "wav2vec2-ctc": (12, 768, 12),
    "hubert-ctc": (12, 768, 12),
    "wav2vec2-bert-ctc": (24, 1024, 16),
}
"""Architecture → layers, width and heads of what starts from nothing, unless the configuration says otherwise."""

SCORED_AT_ONCE: Final = 16
"""Clips that are scored in one batch; it is fixed because padding moves the last bits of logits."""


class CtcHeadConfig(WhisperTaskConfig):
    """What the `task.config` of all students with a CTC head share.

    `model` names the Whisper model whose features and tokens the shards were made for; it is not trained, and no
    weights of it are loaded.
    """

    architecture: str
    """The student's shape."""
    pretrained: str | None = None
    """Hub id or local folder of a model to start from; all of it is trained. Its head is replaced."""
    pretrained_revision: str | None = None
    """Commit of its hub repository."""
    pretrained_weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """BLAKE3 of its weights, filled in by `p2pasr run new`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of what starts from nothing; a pretrained model brings its own."""
    units: Literal["characters", "bytes"] = "characters"
    """What the head writes. `bytes` of UTF-8 are 256 classes for every script, but a Chinese character takes three."""
    characters: Annotated[str, Field(min_length=1, max_length=100_000)] | None = None
    """Those that the head can write, ascending; filled in from the run's shards by `p2pasr run new`."""
    gradient_checkpointing: bool = False
    """Compute states again on the way back instead of keeping them: less memory, about a third more time."""

    @model_validator(mode="after")
    def _head_fits(self) -> CtcHeadConfig:
        if self.pretrained is None and self.pretrained_weights is not None:
            raise ValueError("pretrained_weights is the digest of pretrained, which is not given")
        if self.weights is not None:
            raise ValueError("weights is of no use: nothing of model is loaded but its features and tokens")
        if self.characters is not None and (
            self.units != "characters" or list(self.characters) != sorted(set(self.characters))
        ):
            raise ValueError("characters must ascend without repetition, and go with units: characters")
        return self

    def sized(self) -> dict[str, Any]:
        """The fields that say what shape starts from nothing, with what is left out filled in."""
        raise NotImplementedError


class CtcConfig(CtcHeadConfig):
    """The `task.config` of a student with a CTC head whose layers are all alike."""

    architecture: Literal["transformer-ctc", "parakeet-ctc", "wav2vec2-ctc", "hubert-ctc", "wav2vec2-bert-ctc"]
    """The student's shape."""
    layers: Annotated[int, Field(ge=1, le=128)] | None = None
    """Of what starts from nothing; as published where it is left out, like the next two."""
    width: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] | None = None
    """Values of a state."""
    heads: Annotated[int, Field(ge=1, le=64)] | None = None
    """Of each attention; the width is a multiple of twice as many."""

    @model_validator(mode="after")
    def _fits_together(self) -> CtcConfig:
        given = self.layers or self.width or self.heads
        if self.pretrained is not None and (self.architecture == "transformer-ctc" or given):
            raise ValueError("pretrained brings its own layers, width and heads, and there is none for transformer-ctc")
        _, width, heads = self.shape
        if width % (2 * heads):
            raise ValueError(f"width ({width}) must be a multiple of twice the heads ({heads}); give both")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, width and heads of what starts from nothing."""
        layers, width, heads = SIZES[self.architecture]
        return self.layers or layers, self.width or width, self.heads or heads

    def sized(self) -> dict[str, Any]:
        """See :meth:`CtcHeadConfig.sized`."""
        return dict(zip(("layers", "width", "heads"), self.shape, strict=True))


class ZipformerCtcConfig(CtcHeadConfig):
    """The `task.config` of a Zipformer with a CTC head."""

    architecture: Literal["zipformer-ctc"]
    """The student's shape."""
    sizes: ZipformerSizes | None = None
    """The shape of what starts from nothing; Zipformer-S where it is left out."""

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> ZipformerCtcConfig:
        if self.pretrained is not None and self.sizes is not None:
            raise ValueError("pretrained brings its own sizes; give one of the two")
        return self

    def sized(self) -> dict[str, Any]:
        """See :meth:`CtcHeadConfig.sized`."""
        return {"sizes": self.sizes or ZipformerSizes()}


@dataclass(frozen=True, slots=True)
class Alphabet:
    """The classes of a CTC head: the blank, then characters or bytes.

    Attributes:
        characters: those known, ascending; None for the 256 bytes.
    """

    characters: str | None

    @property
    def size(self) -> int:
        """Classes, the blank among them."""
        return 1 + (256 if self.characters is None else len(self.characters))

    def unknown(self, text: str) -> str:
        """The characters of a transcript that it has no class for."""
        return "" if self.characters is None else "".join(sorted(set(text) - set(self.characters)))

    def encode(self, text: str) -> tuple[int, ...]:
        """Classes of a transcript; characters that are unknown are left out."""
        if self.characters is None:
            return tuple(byte + 1 for byte in text.encode())
        places = {character: place for place, character in enumerate(self.characters, 1)}
        return tuple(places[character] for character in text if character in places)

    def decode(self, classes: Sequence[int]) -> str:
        """The transcript of classes, none of them the blank; bytes that are no UTF-8 are left out."""
        if self.characters is None:
            return bytes(number - 1 for number in classes).decode("utf-8", errors="ignore")
        return "".join(self.characters[number - 1] for number in classes)


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is heard and the classes that are to be written."""

    clip: Clip
    target: tuple[int, ...]


class CtcTask(GradientTask[Utterance]):
    """An encoder with a CTC head; implements :class:`p2pasr.tasks.base.Task` and its `Bounded`.

    Raises:
        LocalError: the device or a model is missing, a model is another one, or the characters are not filled in.
    """

    config: CtcHeadConfig
    model: Encoder

    def __init__(self, config: CtcHeadConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        self.config = config
        self.seed = seed
        self.device = usable_device(device)
        self.frontend: Frontend = frontend(model or config.model, config.revision, config.window_seconds)
        self.features = Features(
            int(self.frontend.extractor.feature_size), self.frontend.window_seconds, self.frontend.vocabulary
        )
        if config.units == "characters" and config.characters is None:
            raise LocalError("task.config.characters is not filled in; `p2pasr run new` takes them from the shards")
        self.alphabet = Alphabet(config.characters)
        if config.pretrained_weights is not None:
            _check_weights(config)
        self.model = encoder(config, self.features.n_mels, self.alphabet.size).to(self.device)
        if config.gradient_checkpointing:
            self.model.checkpoint_gradients()
        self.trained = trainable(self.model)
        fresh = self.model.initial_params(digest("student", seed.to_bytes(8, "big")))
        self._base = (
            fresh
            if config.pretrained is None
            else self.get_params() | {name: value for name, value in fresh.items() if self.model.is_new(name)}
        )

    @staticmethod
    def pin(config: CtcHeadConfig, model: str | None, shards: Sequence[Path]) -> CtcHeadConfig:
        """Fill in the shape, the digest of a pretrained model's weights and the characters of the shards.

        Raises:
            LocalError: the shards hold no text to take the characters from.
        """
        changes: dict[str, Any] = {}
        if config.pretrained is None:
            changes |= config.sized()
        else:
            changes["pretrained_weights"] = weights_digest(config.pretrained, config.pretrained_revision)
        if config.units == "characters" and config.characters is None:
            tokenizer = frontend(model or config.model, config.revision, config.window_seconds).tokenizer
            found = {char for path in shards for clip in read_shard(path).clips for char in text_of(clip, tokenizer)}
            if not found:
                raise LocalError("the run's shards hold no text to take a CTC head's characters from")
            changes["characters"] = "".join(sorted(found))
        return config.model_copy(update=changes)

    def check(self, shards: Sequence[Path]) -> None:
        """Can the shards be trained on?

        Raises:
            LocalError: one was made for other features, holds characters that the head cannot write, or is spoken
                too fast for it.
        """
        for path in shards:
            clips = self._shard(path).clips
            texts = [text_of(clip, self.frontend.tokenizer) for clip in clips]
            if unknown := self.alphabet.unknown("".join(texts)):
                raise LocalError(
                    f"shard {path} holds characters that task.config.characters does not list ({unknown:.20}); "
                    f"make the run anew from all of its shards, or install the p2pasr version it was made with"
                )
            fitting = sum(self._fits(clip, self.alphabet.encode(text)) for clip, text in zip(clips, texts, strict=True))
            if 2 * fitting < len(clips):
                raise LocalError(
                    f"shard {path}: {len(clips) - fitting} of {len(clips)} transcripts have more {self.config.units} "
                    f"than {self.config.architecture} writes in the time they take; choose another architecture"
                    + (" or units: characters" if self.config.units == "bytes" else "")
                )

    def examples(self, shards: Sequence[Path]) -> list[Utterance]:
        """Clips with what is to be written, without those that are spoken too fast to be aligned."""
        clips = [clip for path in shards for clip in self._shard(path).clips]
        said = [Utterance(clip, self.alphabet.encode(text_of(clip, self.frontend.tokenizer))) for clip in clips]
        return [utterance for utterance in said if self._fits(utterance.clip, utterance.target)]

    def example_of(self, seconds: float) -> Utterance:
        """See :meth:`p2pasr.tasks.training.GradientTask.example_of`."""
        return Utterance(silence(seconds, self.features.n_mels), ())

    def weight(self, example: Utterance) -> float:
        """Characters or bytes, at least one."""
        return max(len(example.target), 1)

    def loss(self, examples: Sequence[Utterance]) -> Tensor:
        """Summed CTC loss.

        It is computed on the CPU wherever the model runs; logits and their gradients travel. torch's CUDA kernel adds
        gradients up in no fixed order and raises where only deterministic ones may run, and cuDNN's takes neither
        padded batches nor transcripts of more than 256 characters.
        """
        logits, lengths = self._logits([utterance.clip for utterance in examples])
        scores = log_softmax(logits.float(), dim=-1).transpose(0, 1)
        if scores.is_meta:  # where only memory is planned, and nothing can be moved
            return scores.sum()
        return ctc_loss(
            scores.cpu(),
            torch.tensor([number for utterance in examples for number in utterance.target], dtype=torch.int64),
            torch.tensor(lengths),
            torch.tensor([len(utterance.target) for utterance in examples]),
            blank=BLANK,
            reduction="sum",
        )

    def drops_out(self) -> bool:
        """See :meth:`p2pasr.tasks.training.GradientTask.drops_out`."""
        return self.config.pretrained is not None or self.config.dropout > 0

    def initial_params(self) -> Tensors:
        """Drawn from the run's seed, or of a pretrained model, with a head drawn from the seed."""
        return dict(self._base)

    def evaluate(
        self, params: Tensors | None, shards: Sequence[Path], on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """Error rates of the initial (params None) or the trained model on held-out shards.

        Returns:
            What :class:`p2pasr.speech.metrics.ErrorRates` has, and `too_fast`: clips that could not be transcribed
            without an error because they have more characters than logits.

        Raises:
            LocalError: the shards are others than the model takes, or hold no text.
        """
        clips = [clip for path in shards for clip in self._shard(path).clips]
        wanted = [text_of(clip, self.frontend.tokenizer) for clip in clips]
        if not any(wanted):
            raise LocalError("the shards cannot be scored: no reference holds any text")
        self.set_params(self._base if params is None else params)
        heard: list[str] = []
        for start in range(0, len(clips), SCORED_AT_ONCE):
            heard += self.transcribe(clips[start : start + SCORED_AT_ONCE])
            if on_progress is not None:
                on_progress(len(heard), len(clips))
        fast = sum(not self._fits(clip, self.alphabet.encode(text)) for clip, text in zip(clips, wanted, strict=True))
        return {**error_rates(wanted, heard).as_dict(), "too_fast": fast}

    @torch.inference_mode()
    def transcribe(self, clips: Sequence[Clip]) -> list[str]:
        """Greedy transcripts: the best class of every frame, without repetitions and blanks."""
        self.model.eval()
        logits, lengths = self._logits(clips)
        best = logits.argmax(-1).tolist()
        return [
            self.alphabet.decode([number for number, _ in itertools.groupby(row[:length]) if number != BLANK])
            for row, length in zip(best, lengths, strict=True)
        ]

    def export(self, params: Tensors, out: Path, about: Mapping[str, Any]) -> None:
        """Write a model folder; `p2pasr.json` beside it lists what the classes stand for."""
        self.set_params(params)
        self.model.save(out)
        config = self.config
        write_notes(
            out,
            {
                **about,
                "architecture": config.architecture,
                "features_of": config.model,
                "pretrained": config.pretrained,
                "pretrained_revision": config.pretrained_revision,
                "pretrained_weights": config.pretrained_weights,
                "units": config.units,
                "characters": config.characters,
                "blank": BLANK,
                "task": "transcribe",
                "window_seconds": self.frontend.window_seconds,
                "scored_after": "p2pasr.speech.text.normalise",
            },
        )

    def _shard(self, path: Path) -> Shard:
        return matching_shard(path, self.features, self.config.model, self.config.window_seconds)

    def _logits(self, clips: Sequence[Clip]) -> tuple[Tensor, list[int]]:
        """Logits, (batch, time, classes), and how many of each clip's are true."""
        frames = [clip.mel.shape[1] for clip in clips]
        features = torch.zeros(len(clips), self.features.n_mels, max(frames))
        for row, clip in enumerate(clips):
            features[row, :, : frames[row]] = torch.from_numpy(standardised(clip.mel))
        if self.model.training and self.config.spec_augment is not None:
            features = spec_augment(features, frames, self.config.spec_augment)
        logits = self.model(features.transpose(1, 2).to(self.device), torch.tensor(frames, device=self.device))
        return logits, [self.model.time(length) for length in frames]

    def _fits(self, clip: Clip, target: tuple[int, ...]) -> bool:
        repeats = sum(one == two for one, two in itertools.pairwise(target))  # a blank must stand between these
        return len(target) + repeats <= self.model.time(clip.mel.shape[1])


def standardised(mel: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Log-mels with zero mean and unit variance in every band, over a clip's true frames.

    Args:
        mel: shape (n_mels, frames), Whisper's, which end 80 dB below the loudest.

    Returns:
        float32, the same shape. What scales and shifts logarithms – their base, their offset – cancels out.
    """
    values = mel.astype(np.float32)
    centred = values - values.mean(axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = centred / (np.sqrt(np.square(centred).mean(axis=1, keepdims=True)) + 1e-5)
    return scaled


def text_of(clip: Clip, tokenizer: Any) -> str:
    """The transcript that a clip is scored against, which is also what CTC students learn to write."""
    return normalise(tokenizer.decode(clip.tokens, skip_special_tokens=True))


def encoder(config: CtcHeadConfig, mels: int, classes: int) -> Encoder:
    """An untrained model by its configuration, or a pretrained one with an untrained head."""
    made: Encoder = ENCODERS[config.architecture](config, mels, classes)
    made.freeze_key_biases(known=config.pretrained is not None)
    return made


def _check_weights(config: CtcHeadConfig) -> None:
    if weights_digest(str(config.pretrained), config.pretrained_revision) != config.pretrained_weights:
        raise LocalError(
            f"the weights of {config.pretrained!r} are not those this run was made with "
            f"({str(config.pretrained_weights)[:12]}…); get that version"
        )
