"""What every Whisper-shaped task shares: batches from shards, the loss, greedy decoding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from p2pasr.speech.mel import restore
from p2pasr.speech.shards import Clip
from p2pasr.tasks.base import OnProgress
from p2pasr.tasks.determinism import shuffled

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperTokenizer

IGNORED = -100
"""Label of positions that are padding; cross entropy leaves them out."""


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
    features = np.stack([restore(clip.mel, frames) for clip in clips]).astype(np.float32)
    inputs = torch.full((len(clips), longest), pad_id, dtype=torch.int64)
    labels = torch.full((len(clips), longest), IGNORED, dtype=torch.int64)
    for row, clip in enumerate(clips):
        tokens = torch.tensor(clip.tokens, dtype=torch.int64)
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        labels[row, : len(tokens) - 1] = tokens[1:]
    return Batch(torch.from_numpy(features), inputs, labels)


def token_losses(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross entropy, a float32 scalar, and the number of tokens it is over.

    The first labels (language, task, no-timestamps) are learned too: they are cheap and keep a
    dialect's adapter from drifting to another language's token.
    """
    logits = model(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits
    total = cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((batch.labels != IGNORED).sum())


def sample_batches(clips: int, batch_size: int, seed: bytes) -> Iterator[list[int]]:
    """Endless batches of clip indices: whole shuffled passes over the clips, cut into batches."""
    queue: list[int] = []
    for turn in itertools.count():
        queue += shuffled(clips, seed + turn.to_bytes(8, "big"))
        while len(queue) >= batch_size:
            yield queue[:batch_size]
            del queue[:batch_size]


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
    prefix_length = 4
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for index, clip in enumerate(clips):
        by_prefix.setdefault(clip.tokens[:prefix_length], []).append(index)
    results: dict[int, str] = {}
    for prefix, members in by_prefix.items():
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            features = np.stack([restore(clips[index].mel, frames) for index in chosen]).astype(np.float32)
            ids = greedy(model, torch.from_numpy(features).to(device), prefix)
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
