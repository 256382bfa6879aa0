"""What every Whisper-shaped task shares: clips from shards, the loss, greedy decoding, error rates."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from p2pasr.errors import LocalError
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.mel import restore
from p2pasr.speech.metrics import error_rates
from p2pasr.speech.pretrained import Frontend, frontend, load, weights_digest
from p2pasr.speech.shards import Clip, Features, Shard, read_shard
from p2pasr.speech.text import normalise
from p2pasr.tasks.augment import SpecAugment, spec_augment
from p2pasr.tasks.base import OnProgress
from p2pasr.tasks.determinism import usable_device
from p2pasr.tasks.training import GradientTask, TrainingConfig

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperTokenizer

FRAMES_A_SECOND = 100

PREFIX_TOKENS = 4
"""Tokens before a transcript's text: where it starts, its language, what is done, no timestamps."""

NOTES = "p2pasr.json"
"""File beside an exported model, for what its folder cannot say."""

IGNORED = -100
"""Label of positions that are padding; cross entropy leaves them out."""


class WhisperTaskConfig(TrainingConfig):
    """What the `task.config` sections of tasks that start from a Whisper model share."""

    model: str
    """Hub id or local folder of a Whisper model; `p2pasr/demo-base` is the one in this package."""
    revision: str | None = None
    """Commit of the hub repository."""
    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """BLAKE3 of the base's weights, filled in by `p2pasr run new`, so that all start from the same."""
    window_seconds: Annotated[float, Field(gt=0, le=30)] | None = None
    """A window shorter than the model's own. What is trained is only good at the window it was trained at."""
    spec_augment: SpecAugment | None = None
    """Hide stretches of the features while training; null for none."""


C = TypeVar("C", bound=WhisperTaskConfig)


class WhisperTask(GradientTask[Clip]):
    """Learning to transcribe from a Whisper model, whatever of it is trained.

    Args:
        config: the task's section of the manifest.
        seed: the run's seed.
        device: where to train, such as "cpu" or "cuda".
        model: a folder to load the base from instead of `config.model`; its weights must be the same.

    Raises:
        LocalError: the device or the model is missing, or the model is another one.
    """

    config: WhisperTaskConfig

    def __init__(self, config: WhisperTaskConfig, seed: int, device: str = "cpu", model: str | None = None) -> None:
        self.config = config
        self.seed = seed
        self.device = usable_device(device)
        self.source = model or config.model
        self.frontend: Frontend = frontend(self.source, config.revision, config.window_seconds)
        if config.weights is not None and weights_digest(self.source, config.revision) != config.weights:
            raise LocalError(
                f"the weights of {self.source!r} are not those this run was made with ({config.weights[:12]}…); "
                f"get that version and name its folder with --model"
            )
        self.frames = round(self.frontend.window_seconds * FRAMES_A_SECOND)
        self.features = Features(
            int(self.frontend.extractor.feature_size), self.frontend.window_seconds, self.frontend.vocabulary
        )

    @staticmethod
    def pin(config: C, model: str | None, shards: Sequence[Path]) -> C:  # noqa: ARG004 (other tasks look at shards)
        """Fill in what the manifest must fix: the digest of the base's weights."""
        return config.model_copy(update={"weights": weights_digest(model or config.model, config.revision)})

    @property
    def whisper(self) -> WhisperForConditionalGeneration:
        """The whole Whisper model, with what is trained in it."""
        raise NotImplementedError

    def check(self, shards: Sequence[Path]) -> None:
        """Were these shards made for this model and window?

        Raises:
            LocalError: one was not, or is no shard.
        """
        for path in shards:
            self._shard(path)

    def examples(self, shards: Sequence[Path]) -> list[Clip]:
        """See :meth:`p2pasr.tasks.training.GradientTask.examples`."""
        return [clip for path in shards for clip in self._shard(path).clips]

    def weight(self, example: Clip) -> float:
        """Tokens that are learned: all but the first."""
        return len(example.tokens) - 1

    def loss(self, examples: Sequence[Clip]) -> Tensor:
        """Summed cross entropy of the transcripts."""
        batch = collate(examples, self.frames, self.frontend.config.pad_token_id)
        batch = replace(batch, features=self.partly_hidden(batch.features, examples))
        return summed_loss(self.model, batch.to(self.device))

    def partly_hidden(self, features: Tensor, clips: Sequence[Clip]) -> Tensor:
        """What is left of the padded features of clips by SpecAugment; all, the same tensor, where nothing is trained.

        Args:
            features: float32, (batch, n_mels, frames), on the CPU.
        """
        config = self.config.spec_augment
        if config is None or not self.model.training:
            return features
        return spec_augment(features, [clip.mel.shape[1] for clip in clips], config)

    def untrained(self) -> AbstractContextManager[Any]:
        """A context in which :attr:`whisper` is the base."""
        return nullcontext()

    def evaluate(
        self, params: Tensors | None, shards: Sequence[Path], on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """Error rates of the base (params None) or the trained model on held-out shards.

        Raises:
            LocalError: the shards are others than the model takes, or hold no text.
        """
        clips = self.examples(shards)
        tokenizer = self.frontend.tokenizer
        wanted = [tokenizer.decode(clip.tokens, skip_special_tokens=True) for clip in clips]
        if not any(map(normalise, wanted)):
            raise LocalError("the shards cannot be scored: no reference holds any text")
        if params is not None:
            self.set_params(params)
        with self.untrained() if params is None else nullcontext():
            heard = self.transcripts(clips, on_progress)
        return error_rates(wanted, heard).as_dict()

    def transcripts(self, clips: Sequence[Clip], on_progress: OnProgress | None = None) -> list[str]:
        """Greedy transcripts of clips, in their order."""
        return transcribe(self.whisper, self.frontend.tokenizer, clips, self.frames, on_progress=on_progress)

    def notes(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What goes beside an exported model, for a model's folder cannot say it."""
        return {
            **about,
            "base_model": self.config.model,
            "base_revision": self.config.revision,
            "base_weights": self.config.weights,
            "task": "transcribe",
            "window_seconds": self.frontend.window_seconds,
            "scored_after": "p2pasr.speech.text.normalise",
        }

    def _shard(self, path: Path) -> Shard:
        return matching_shard(path, self.features, self.config.model, self.config.window_seconds)


def matching_shard(path: Path, features: Features, model: str, window_seconds: float | None) -> Shard:
    """Open a shard that was prepared for a model's features.

    Args:
        window_seconds: the task's, None for the model's own.

    Raises:
        LocalError: it was prepared for others, or is no shard.
    """
    shard = read_shard(path)
    if shard.features != features:
        option = "" if window_seconds is None else f" --window-seconds {window_seconds:g}"
        raise LocalError(
            f"shard {path} was prepared for other features than {model!r} takes; "
            f"prepare it with --model {model}{option}"
        )
    return shard


def write_notes(out: Path, notes: Mapping[str, Any]) -> None:
    """Write :data:`NOTES`."""
    (out / NOTES).write_text(json.dumps(notes, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_whisper(model: str, revision: str | None = None) -> WhisperForConditionalGeneration:
    """A Whisper model with its weights in float32.

    Raises:
        LocalError: as :func:`p2pasr.speech.pretrained.load`.
    """
    from transformers import WhisperForConditionalGeneration

    loaded: WhisperForConditionalGeneration = load(
        WhisperForConditionalGeneration, model, revision, dtype=torch.float32
    )
    return loaded


def pick_layers(
    model: WhisperForConditionalGeneration, encoder: Sequence[int] | None, decoder: Sequence[int] | None
) -> WhisperForConditionalGeneration:
    """A smaller copy of a model that has some of its layers, as distil-whisper's students start (Gandhi et al. 2023).

    Args:
        encoder, decoder: the layers to keep, in their new order, -1 being the last; all if None.

    Raises:
        LocalError: a layer is named that the model does not have, or one twice.
    """
    small = copy.deepcopy(model)
    parts = {"encoder": encoder, "decoder": decoder}
    for name, picked in parts.items():
        part: Any = getattr(small.model, name)
        count = len(part.layers)
        kept = list(range(count)) if picked is None else [index % count for index in picked if -count <= index < count]
        if not kept or len(set(kept)) != len(kept) or (picked is not None and len(kept) != len(picked)):
            raise LocalError(
                f"the layers {list(picked or ())} cannot be picked from the {name}'s {count}: "
                f"name each once, from 0 to {count - 1} or from -{count} to -1"
            )
        part.layers = torch.nn.ModuleList([part.layers[index] for index in kept])
        for index, layer in enumerate(part.layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):  # where an attention keeps its past keys and values
                    module.layer_idx = index
        setattr(small.config, f"{name}_layers", len(kept))
    small.generation_config.alignment_heads = None  # they name layers of the larger model
    return small


def shorten(model: Any, frames: int) -> None:
    """Cut the encoder's positions to a shorter window (two frames a position), and keep them out of training."""
    positions = frames // 2
    encoder = model.model.encoder
    if positions < model.config.max_source_positions:
        kept = encoder.embed_positions.weight[:positions].detach().clone()
        embedding = torch.nn.Embedding(kept.shape[0], kept.shape[1], _weight=kept, _freeze=True)
        encoder.embed_positions = embedding
        model.config.max_source_positions = encoder.max_source_positions = positions
    encoder.embed_positions.requires_grad_(False)  # sines, which from_pretrained makes trainable


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples.

    Attributes:
        features: float32, (batch, n_mels, frames), the padded log-mels.
        decoder_input_ids: int64, (batch, tokens), from ``<|startoftranscript|>`` on.
        labels: int64, (batch, tokens), the same shifted left by one, padding :data:`IGNORED`.
    """

    features: Tensor
    decoder_input_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.features.to(device), self.decoder_input_ids.to(device), self.labels.to(device))


def collate(clips: Sequence[Clip], frames: int, pad_id: int) -> Batch:
    """Pad clips to one batch.

    The decoder starts from the clip's own ``<|startoftranscript|>``; labels are masked by length and
    not by id, since Whisper pads with the very token that ends a transcript.

    Args:
        clips: examples; each holds at least two tokens.
        frames: frames of the model's window (100 a second).
        pad_id: fills the decoder's input behind shorter transcripts.
    """
    longest = max(len(clip.tokens) for clip in clips) - 1
    inputs = torch.full((len(clips), longest), pad_id, dtype=torch.int64)
    labels = torch.full((len(clips), longest), IGNORED, dtype=torch.int64)
    for row, clip in enumerate(clips):
        tokens = torch.tensor(clip.tokens, dtype=torch.int64)
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, : len(tokens) - 1] = tokens[1:]
    return Batch(padded(clips, frames), inputs, labels)


def padded(clips: Sequence[Clip], frames: int) -> Tensor:
    """The features of clips, padded as the model takes them: float32, (batch, n_mels, frames)."""
    return torch.from_numpy(np.stack([restore(clip.mel, frames) for clip in clips]).astype(np.float32))


def token_losses(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross entropy, as :func:`summed_loss`, and the number of tokens it is over."""
    return summed_loss(model, batch), int((batch.labels != IGNORED).sum())


def summed_loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Cross entropy summed over all labels, a float32 scalar.

    The first labels (language, task, no-timestamps) are learned too: they are cheap and keep a
    dialect's adapter from drifting to another language's token.
    """
    logits = model(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits
    return cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.inference_mode()
def transcribe(
    model: WhisperForConditionalGeneration,
    tokenizer: WhisperTokenizer,
    clips: Sequence[Clip],
    frames: int,
    batch_size: int = 32,
    on_progress: OnProgress | None = None,
) -> list[str]:
    """Greedy transcripts of clips, in their order.

    Each clip is decoded from its own prefix (language, task), so dialects may be mixed.
    """
    model.eval()
    device = next(model.parameters()).device
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for index, clip in enumerate(clips):
        by_prefix.setdefault(clip.tokens[:PREFIX_TOKENS], []).append(index)
    results: dict[int, str] = {}
    for prefix, members in by_prefix.items():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            ids = greedy(model, padded([clips[index] for index in chosen], frames).to(device), prefix)
            for index, row in zip(chosen, ids, strict=True):
                results[index] = tokenizer.decode(row, skip_special_tokens=True).strip()
            if on_progress is not None:
                on_progress(len(results), len(clips))
    return [results[index] for index in range(len(clips))]


def greedy(model: WhisperForConditionalGeneration, features: Tensor, prefix: Sequence[int]) -> list[list[int]]:
    """Most likely next token, one at a time, until ``<|endoftext|>`` or the model's longest text.

    Args:
        features: float32, (batch, n_mels, frames).
        prefix: ids that the decoder starts from.

    Returns:
        Token ids behind the prefix, without ``<|endoftext|>``.
    """
    config = model.config
    encoder = model.get_encoder()(features)
    ids = torch.tensor([list(prefix)] * len(features), device=features.device)
    done = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    past, step = None, ids
    while ids.shape[1] < config.max_target_positions and not done.all():
        out = model(encoder_outputs=encoder, decoder_input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        step = out.logits[:, -1].argmax(-1, keepdim=True).masked_fill(done[:, None], config.eos_token_id)
        ids = torch.cat([ids, step], dim=1)
        done |= step[:, 0] == config.eos_token_id
    rows = ids[:, len(prefix) :].tolist()
    return [row[: row.index(config.eos_token_id)] if config.eos_token_id in row else row for row in rows]
