"""What small models hear and read with: a Transformer whose blocks also convolve (after Gulati et al. 2020).

Every operation has a deterministic form on all devices: attention is written out, and norms are those of single
positions, which carry nothing from one step of training to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import glu, silu

SUBSAMPLING = 4
"""Mel frames that one position of :class:`SpeechEncoder` stands for: 40 ms."""


class EncoderConfig(BaseModel):
    """Sizes of the encoder; those of its blocks hold for blocks that read text too."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    width: Annotated[int, Field(ge=8, le=1024)] = 256
    """Values of a state."""
    layers: Annotated[int, Field(ge=1, le=48)] = 8
    """Blocks that hear."""
    attention_heads: Annotated[int, Field(ge=1, le=64)] = 4
    """Of each block; a divisor of the width."""
    feedforward: Annotated[int, Field(ge=8, le=8192)] = 1024
    """Width of a block's hidden layer."""
    kernel: Annotated[int, Field(ge=1, le=63)] = 15
    """Positions that the convolution of a block sees; odd."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of every block, while training."""

    @model_validator(mode="after")
    def _fits(self) -> EncoderConfig:
        if self.width % self.attention_heads:
            raise ValueError(f"a width of {self.width} cannot be shared among {self.attention_heads} attention heads")
        if not self.kernel % 2:
            raise ValueError(f"a kernel of {self.kernel} has no middle; make it odd")
        return self


@dataclass(frozen=True, slots=True)
class States:
    """What a model makes of a padded batch.

    Attributes:
        values: (batch, positions, width).
        real: bool, (batch, positions), False where there is padding.
    """

    values: Tensor
    real: Tensor

    def mean(self) -> Tensor:
        """Mean over the real positions, (batch, width)."""
        weights = self.real[..., None].to(self.values.dtype)
        return (self.values * weights).sum(1) / weights.sum(1)

    def statistics(self) -> Tensor:
        """Mean and standard deviation over the real positions (Snyder et al. 2018), (batch, 2 · width)."""
        mean = self.mean()
        squares = States((self.values - mean[:, None]) ** 2, self.real).mean()
        return torch.cat([mean, torch.sqrt(squares + 1e-5)], dim=1)


class SpeechEncoder(nn.Module):
    """Log-mels to one state for four frames.

    Args:
        n_mels: mel bands.
        config: sizes.
    """

    def __init__(self, n_mels: int, config: EncoderConfig) -> None:
        super().__init__()
        self.first = nn.Conv1d(n_mels, config.width, 3, stride=2, padding=1)
        self.second = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, mels: Tensor, frames: Tensor) -> States:
        """Encode clips; what lies behind a clip's frames changes nothing.

        Args:
            mels: float32, (batch, n_mels, frames).
            frames: int64, (batch,), the true length of each clip, at least 1.

        Returns:
            States of ⌈frames / 4⌉ positions.
        """
        x = mels
        for convolution in (self.first, self.second):
            x = silu(convolution(x * until(frames, x.shape[2])[:, None]))
            frames = (frames + 1) // 2
        x, real = x.transpose(1, 2), until(frames, x.shape[2])
        for block in self.blocks:
            x = block(x, real)
        return States(self.norm(x), real)


class TextModel(nn.Module):
    """Token ids to one state for each, from what stands around them or before them, and from what was heard.

    Args:
        vocabulary: number of ids.
        config: sizes of the blocks.
        layers: number of blocks, instead of the encoder's.
        hears: whether blocks attend to an encoder's states.
        causal: whether a state knows only the tokens up to its own.
    """

    def __init__(
        self, vocabulary: int, config: EncoderConfig, layers: int, *, hears: bool = False, causal: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.scale = math.sqrt(config.width)
        self.blocks = nn.ModuleList(Block(config, hears=hears, causal=causal) for _ in range(layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, lengths: Tensor, heard: States | None = None) -> States:
        """Read padded ids, int64, (batch, tokens), of the true lengths, int64, (batch,), at least 1."""
        x, real = self.scale * self.embedding(ids), until(lengths, ids.shape[1])
        for block in self.blocks:
            x = block(x, real, heard)
        return States(self.norm(x), real)


class Block(nn.Module):
    """Self-attention, convolution, attention to other states and a feed-forward layer, each added to its input."""

    def __init__(self, config: EncoderConfig, *, hears: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.attention = Attention(config, causal=causal)
        self.convolution = Convolution(config, causal=causal)
        self.hearing = Attention(config) if hears else None
        self.feedforward = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.feedforward),
            nn.SiLU(),
            nn.Linear(config.feedforward, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor, heard: States | None = None) -> Tensor:
        """Next states, shape (batch, positions, width), of those that are `real`; padding is left to chance."""
        x = x + self.dropout(self.convolution(x, real))
        x = x + self.dropout(self.attention(x, None, real))
        if self.hearing is not None and heard is not None:
            x = x + self.dropout(self.hearing(x, heard.values, heard.real))
        out: Tensor = x + self.dropout(self.feedforward(x))
        return out


class Attention(nn.Module):
    """Scaled dot-product attention (Vaswani et al. 2017) to the same or to other states."""

    def __init__(self, config: EncoderConfig, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = config.attention_heads, causal
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width, bias=False)  # which attention would cancel
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, others: Tensor | None, real: Tensor) -> Tensor:
        """Attend from x to `others`, or to x if None, where those are `real`."""
        x = self.norm(x)
        others = x if others is None else others
        query, key, value = map(self._split, (self.query(x), self.key(others), self.value(others)))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        unseen = ~real[:, None, None, :]
        if self.causal:
            unseen = unseen | torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        seen = scores.masked_fill(unseen, -math.inf).softmax(-1) @ value
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """(batch, positions, width) → (batch, heads, positions, width of a head)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Convolution(nn.Module):
    """A gated depthwise convolution, from which a block knows the order of its positions."""

    def __init__(self, config: EncoderConfig, *, causal: bool = False) -> None:
        super().__init__()
        self.reach = config.kernel - 1 if causal else config.kernel // 2
        self.norm = nn.LayerNorm(config.width)
        self.before = nn.Linear(config.width, 2 * config.width)
        self.depthwise = nn.Conv1d(config.width, config.width, config.kernel, padding=self.reach, groups=config.width)
        self.after = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Convolve the positions that are `real`."""
        gated = glu(self.before(self.norm(x)), dim=-1) * real[..., None]
        convolved = self.depthwise(gated.transpose(1, 2))[..., : x.shape[1]]
        out: Tensor = self.after(silu(convolved.transpose(1, 2)))
        return out


def until(lengths: Tensor, longest: int) -> Tensor:
    """Bool, (batch, longest): True before each length."""
    return torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]
