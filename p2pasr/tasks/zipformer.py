"""Zipformer (Yao et al. 2023, arXiv 2310.11230) with a CTC head.

What the paper adds for its optimizer's sake – balancers, whitening, layers that are skipped at random, schedules of
dropout and of bypasses – is left out: a step is a function of parameters, batch and seed, and nothing is counted or
remembered between steps. An example hears neither its neighbours in a batch nor their padding.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import glu, pad, softplus
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

from p2pasr.tasks.encoders import BLANK, ZipformerSizes

QUERY_WIDTH: Final = 32
POSITION_QUERY_WIDTH: Final = 4
VALUE_WIDTH: Final = 12
"""Of each head; the value's is that of the two self-attentions."""

POSITION_WIDTH: Final = 48
"""Features of a distance between positions, before each head's projection."""

LEAST_BYPASS: Final = 0.2
"""How much of a module's output a bypass lets through at least, by the paper after its first 20,000 steps."""

FIRST_BYPASS: Final = 0.9
"""How much it lets through before it has learned: the paper's least at the start of its schedule."""

FRONT_GAIN: Final = 1 / 0.273
"""One by the root mean square of SwooshR of standard normal numbers."""

EPSILON: Final = 1e-5
"""Added to a mean square, and to shares of a window, either of which may be zero."""


def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR, the activation of convolutions: zero at zero."""
    return softplus(x - 1) - 0.08 * x - 0.313261687


def swoosh_l(x: Tensor) -> Tensor:
    """SwooshL, the activation of feed-forward modules: SwooshR further to the right, nearly straight around zero."""
    return softplus(x - 4) - 0.08 * x - 0.035


class BiasNorm(nn.Module):
    """x / RMS(x − b) · exp(γ), over the channels; b is learned for each of them, γ is one number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (batch, time, width)."""
        square = (x - self.bias).square().mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(square + EPSILON) * self.log_scale.exp()


class Bypass(nn.Module):
    """(1 − c) · x + c · y with a c for each channel, which is a sigmoid's, from :data:`LEAST_BYPASS` to 1."""

    OFFSET: Final = math.log((FIRST_BYPASS - LEAST_BYPASS) / (1 - FIRST_BYPASS))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.openness = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What went around and what went through, both (batch, time, width), in one."""
        through = LEAST_BYPASS + (1 - LEAST_BYPASS) * torch.sigmoid(self.openness + self.OFFSET)
        return x + through * (y - x)


class Downsample(nn.Module):
    """A weighted mean of every `factor` frames; the weights are learned, and shared by all channels."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.shares = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """From (batch, time, width) to (batch, ⌈time / factor⌉, width).

        Args:
            real: bool, (batch, time); at a clip's end the mean is that of the frames which are real.
        """
        missing = -x.shape[1] % self.factor
        slow = (x.shape[1] + missing) // self.factor
        windows = pad(x, (0, 0, 0, missing)).reshape(len(x), slow, self.factor, -1)
        weights = pad(real, (0, missing)).reshape(len(x), slow, self.factor) * self.shares.softmax(0)
        mean: Tensor = (windows * weights[..., None]).sum(2) / (weights.sum(2, keepdim=True) + EPSILON)
        return mean


class ConvEmbed(nn.Module):
    """Log-mels at 100 Hz to states at 50 Hz: three convolutions, a ConvNeXt layer (Liu et al. 2022) and a norm."""

    STRIDES: Final = ((1, 2), (2, 2), (1, 2))
    """Of time and of frequency."""

    def __init__(self, mels: int, sizes: ZipformerSizes, dropout: float) -> None:
        super().__init__()
        channels = (1, *sizes.channels[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, padding=1)
            for before, after, stride in zip(channels, sizes.channels, self.STRIDES, strict=True)
        )
        width = sizes.channels[-1]
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.widen = nn.Conv2d(width, 3 * width, 1)
        self.narrow = nn.Conv2d(3 * width, width, 1)
        self.out = nn.Linear(width * math.ceil(mels / 8), sizes.widths[0])
        self.norm = BiasNorm(sizes.widths[0])
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """From (batch, frames, mels) and a bool mask of (batch, frames) to half as many of both, rounded up."""
        x = features[:, None]
        for convolution, (stride, _) in zip(self.convolutions, self.STRIDES, strict=True):
            x = swoosh_r(convolution(_silenced(x, real)))
            real = real[:, ::stride]
        x = x + self.narrow(swoosh_l(self.widen(self.depthwise(_silenced(x, real)))))
        return self.dropout(self.norm(self.out(x.transpose(1, 2).flatten(2)))), real


class AttentionWeights(nn.Module):
    """Which frames each frame attends to, by their states and their distance; computed once for a whole block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, heads * QUERY_WIDTH)
        # Softmax cancels a key's bias: its gradient would be rounding, of which AdamW makes full steps.
        self.key = nn.Linear(width, heads * QUERY_WIDTH, bias=False)
        self.position_query = nn.Linear(width, heads * POSITION_QUERY_WIDTH)
        self.position_key = nn.Linear(POSITION_WIDTH, heads * POSITION_QUERY_WIDTH, bias=False)

    def forward(self, x: Tensor, real: Tensor, distances: Tensor) -> Tensor:
        """(batch, heads, time, time), of which the last sums to one over the frames that are real.

        Args:
            real: bool, (batch, time).
            distances: of :func:`distance_features`.
        """
        query, key = _heads(self.query(x), self.heads), _heads(self.key(x), self.heads)
        by_state = query @ key.transpose(-1, -2) / math.sqrt(QUERY_WIDTH)
        position_key = _heads(self.position_key(distances.to(x.dtype))[None], self.heads)
        by_distance = _heads(self.position_query(x), self.heads) @ position_key.transpose(-1, -2)
        scores = by_state + _aligned(by_distance)
        return scores.masked_fill(~real[:, None, None, :], -math.inf).softmax(-1)


class SelfAttention(nn.Module):
    """Values by attention weights that are there already."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(width, heads * VALUE_WIDTH)
        self.out = nn.Linear(heads * VALUE_WIDTH, width)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """(batch, time, width) by (batch, heads, time, time)."""
        seen = weights @ _heads(self.value(x), self.heads)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out


class NonLinearAttention(nn.Module):
    """A ⊙ attention(tanh(B) ⊙ C) with three projections of the input and the first head's weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * (3 * width // 4))
        self.out = nn.Linear(3 * width // 4, width)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """(batch, time, width) by (batch, heads, time, time)."""
        gate, inner, value = self.project(x).chunk(3, dim=-1)
        out: Tensor = self.out(gate * (weights[:, 0] @ (torch.tanh(inner) * value)))
        return out


class FeedForward(nn.Module):
    """Two linear layers around SwooshL."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each frame of (batch, time, width) on its own."""
        out: Tensor = self.narrow(self.dropout(swoosh_l(self.widen(x))))
        return out


class Convolution(nn.Module):
    """A gated depthwise convolution (Gulati et al. 2020) without batch norm, and with SwooshR."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.before = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.after = nn.Linear(width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Convolve the frames of (batch, time, width) that are real."""
        gated = glu(self.before(x), dim=-1) * real[..., None]
        out: Tensor = self.after(swoosh_r(self.depthwise(gated.transpose(1, 2)).transpose(1, 2)))
        return out


class Block(GradientCheckpointingLayer):  # type: ignore[misc]
    """Feed-forward and non-linear attention, then twice self-attention, convolution and feed-forward."""

    def __init__(self, width: int, heads: int, feedforward: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.weights = AttentionWeights(width, heads)
        self.nonlinear = NonLinearAttention(width)
        self.attentions = nn.ModuleList(SelfAttention(width, heads) for _ in range(2))
        self.convolutions = nn.ModuleList(Convolution(width, kernel) for _ in range(2))
        self.feedforwards = nn.ModuleList(
            FeedForward(width, quarters * feedforward // 4, dropout) for quarters in (3, 4, 5)
        )
        self.middle, self.end = Bypass(width), Bypass(width)
        self.norm = BiasNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, start: Tensor, real: Tensor, distances: Tensor) -> Tensor:
        """Next states of (batch, time, width); arguments as for :class:`AttentionWeights`."""
        weights = self.weights(start, real, distances)
        x = start + self.dropout(self.feedforwards[0](start))
        x = x + self.dropout(self.nonlinear(x, weights))
        x = self.middle(start, self._group(0, x, real, weights))
        x = self.norm(self._group(1, x, real, weights))
        out: Tensor = self.end(start, x)
        return out

    def _group(self, place: int, x: Tensor, real: Tensor, weights: Tensor) -> Tensor:
        x = x + self.dropout(self.attentions[place](x, weights))
        x = x + self.dropout(self.convolutions[place](x, real))
        out: Tensor = x + self.dropout(self.feedforwards[place + 1](x))
        return out


class Stack(nn.Module):
    """Blocks at a frame rate of their own; what comes in goes around those that run at a lower one."""

    def __init__(self, sizes: ZipformerSizes, place: int, dropout: float) -> None:
        super().__init__()
        self.factor, self.width = sizes.downsampling[place], sizes.widths[place]
        self.downsample = Downsample(self.factor) if self.factor > 1 else None
        self.blocks = nn.ModuleList(
            Block(self.width, sizes.heads[place], sizes.feedforwards[place], sizes.kernels[place], dropout)
            for _ in range(sizes.layers[place])
        )
        self.bypass = Bypass(self.width) if self.factor > 1 else None

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """From (batch, time, any width) to (batch, time, width); `real` is bool, (batch, time)."""
        x = pad(x, (0, self.width - x.shape[2]))  # cuts channels off where that is negative
        if self.downsample is None or self.bypass is None:
            return self._through(x, real)
        slow = self._through(self.downsample(x, real), real[:, :: self.factor])
        repeated = slow[:, :, None].expand(-1, -1, self.factor, -1).flatten(1, 2)[:, : x.shape[1]]
        out: Tensor = self.bypass(x, repeated)
        return out

    def _through(self, x: Tensor, real: Tensor) -> Tensor:
        distances = distance_features(x.shape[1], x.device)
        for block in self.blocks:
            x = block(x, real, distances)
        return x


def start_gain(name: str) -> float:
    """What a parameter is multiplied by where training starts from nothing.

    Layers of the front end that read what SwooshR gives are drawn wider, so that what is heard reaches the first norm
    at full size: the paper's balancers and its optimizer see to that, which are not here.

    Args:
        name: as the model's :meth:`named_parameters` has it, with or without something before it.
    """
    reads_swoosh = ("convolutions.1.weight", "convolutions.2.weight", "depthwise.weight", "out.weight")
    return FRONT_GAIN if name.endswith(tuple(f"embed.{layer}" for layer in reads_swoosh)) else 1.0


def distance_features(time: int, device: torch.device) -> Tensor:
    """The authors' compact relative positional encoding: waves over an angle that changes ever less with the distance.

    Returns:
        float32, (2 · time, :data:`POSITION_WIDTH`), of the distances from 1 − time to time. Cosines and sines are of
        multiples of an angle between −π/2 and π/2, an arctangent of the distance's logarithm, so that features
        differ most among near frames and hardly among those far away.
    """
    distance = torch.arange(1 - time, time + 1, dtype=torch.float32, device=device)
    unit = math.sqrt(POSITION_WIDTH)
    logarithm = unit * distance.sign() * torch.log1p(distance.abs() / unit)
    angle = torch.atan(2 * math.pi / POSITION_WIDTH * logarithm)
    multiples = angle[:, None] * torch.arange(1, POSITION_WIDTH // 2 + 1, device=device)
    return torch.cat([multiples.cos(), multiples.sin()], dim=1)


def _aligned(scores: Tensor) -> Tensor:
    """Scores by distance, (…, time, 2 · time), to scores by frame, (…, time, time): at i, j that of j − i."""
    time = scores.shape[-2]
    # One column less in a row makes each start one frame further to the left than the one before.
    rows = scores.flatten(-2)[..., time - 1 : -1].reshape(*scores.shape[:-1], 2 * time - 1)
    return rows[..., :time]


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads · width) → (batch, heads, time, width)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _silenced(x: Tensor, real: Tensor) -> Tensor:
    """(batch, channels, time, bands) with zeros where nothing is real, as there are beyond the last frame."""
    return x * real[:, None, :, None]


class ZipformerConfig(PreTrainedConfig):  # type: ignore[misc]
    """The `config.json` of an exported model.

    Args:
        vocab_size: classes of the head, the blank among them.
        num_mel_bins: bands of the log-mels.
        sizes: fields of :class:`p2pasr.tasks.encoders.ZipformerSizes`; the defaults of what is left out.
        dropout: after each module.
    """

    model_type = "zipformer_ctc"

    def __init__(
        self,
        vocab_size: int = 257,
        num_mel_bins: int = 80,
        sizes: dict[str, Any] | None = None,
        dropout: float = 0.1,
        pad_token_id: int = BLANK,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_mel_bins = num_mel_bins
        self.sizes = ZipformerSizes.model_validate(sizes or {}).model_dump(mode="json")
        self.dropout = dropout
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class ZipformerForCTC(PreTrainedModel):  # type: ignore[misc]
    """Log-mels at 100 Hz to logits at 25 Hz."""

    config_class = ZipformerConfig
    base_model_prefix = "zipformer"
    main_input_name = "input_features"
    supports_gradient_checkpointing = True

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__(config)
        sizes = ZipformerSizes.model_validate(config.sizes)
        self.embed = ConvEmbed(config.num_mel_bins, sizes, config.dropout)
        self.stacks = nn.ModuleList(Stack(sizes, place, config.dropout) for place in range(len(sizes.widths)))
        self.downsample = Downsample(2)
        self.ctc_head = nn.Linear(max(sizes.widths), config.vocab_size)
        self.post_init()

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Logits of each fourth frame, rounded up.

        Args:
            input_features: float32, (batch, frames, mels).
            attention_mask: (batch, frames), zero where there is padding; none if it is left out.
        """
        if attention_mask is None:
            attention_mask = torch.ones(input_features.shape[:2], device=input_features.device)
        x, real = self.embed(input_features, attention_mask > 0)
        heard = []
        for stack in self.stacks:
            x = stack(x, real)
            heard.append(x)
        return CausalLMOutput(logits=self.ctc_head(self.downsample(_latest_channels(heard), real)))


def _latest_channels(heard: list[Tensor]) -> Tensor:
    """Of each channel the output of the last stack that has it, so that the widest stack says how many there are."""
    latest = heard[-1]
    for x in reversed(heard):
        latest = torch.cat([latest, x[..., latest.shape[-1] :]], dim=-1)
    return latest
