"""Encoders with a CTC head that hear log-mels: one module a family, of transformers' own layers but for Zipformer.

Each takes features of zero mean and unit variance, (batch, frames, mels) and the true frames of each clip, and gives
logits, (batch, time, classes), the blank's first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu

from p2pasr.errors import LocalError
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.pretrained import load
from p2pasr.tasks.training import fresh_params, trainable

if TYPE_CHECKING:
    from p2pasr.tasks.ctc import CtcConfig, CtcHeadConfig, ZipformerCtcConfig

KEY_BIASES = ("k_proj.bias", "linear_k.bias")
"""How the models' names of attention's key biases end."""

BLANK = 0
"""Class that stands for nothing; the pad token of exported models, which plain libraries take for the blank."""


class Encoder(nn.Module):
    """What the families share.

    Attributes:
        net: the transformers model.
        new: names of parts of `net` that no checkpoint holds: the head, and what replaces a waveform's front end.
    """

    net: Any
    new: tuple[str, ...]

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Logits of each subsampled frame."""
        mask = torch.arange(features.shape[1], device=lengths.device) < lengths[:, None]
        return self.hear(features, mask.long())

    def hear(self, features: Tensor, mask: Tensor) -> Tensor:
        """The same from a mask, int64, (batch, frames)."""
        logits: Tensor = self.net(features, attention_mask=mask).logits
        return logits

    def time(self, frames: int) -> int:
        """How many logits a clip of so many frames gets."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Encoder:
        """As torch's, but running statistics stay as they are: they are no parameters that peers would average."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def initial_params(self, key: bytes) -> Tensors:
        """Drawn parameters: of everything, or of what is new if the rest came from a checkpoint."""
        out = fresh_params(trainable(self), key)
        for name, value in out.items():
            if name.endswith("parametrizations.weight.original0"):  # weight norm's lengths, those of fresh directions
                out[name][...] = math.sqrt(self.net.config.hidden_size / value.size)
        return out

    def is_new(self, name: str) -> bool:
        """Whether a parameter of this name is in no checkpoint."""
        return name.removeprefix("net.").startswith(self.new)

    def freeze_key_biases(self, *, known: bool) -> None:
        """Leave out of training what attention cancels: a bias of its keys adds the same to all scores of a query.

        Its gradient is nothing but rounding, of which Adam makes full steps, other ones on other machines: an audit
        would see two trainings where there was one.

        Args:
            known: whether they came with a pretrained model, and stay what they were; else they are zeros.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(KEY_BIASES):
                parameter.requires_grad_(False)
                if not known:
                    torch.nn.init.zeros_(parameter)

    def checkpoint_gradients(self) -> None:
        """Compute activations again where gradients need them instead of keeping them."""
        self.net.gradient_checkpointing_enable({"use_reentrant": False})

    def save(self, out: Path) -> None:
        """Write what plain libraries load."""
        self.net.save_pretrained(out)


class TransformerNet(nn.Module):
    """Speech2Text's encoder (Wang et al. 2020) – two gated convolutions, then a pre-norm Transformer – and a head."""

    def __init__(self, config: CtcConfig, mels: int, classes: int) -> None:
        from transformers import Speech2TextConfig
        from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextEncoder

        super().__init__()
        layers, width, heads = config.shape
        self.encoder = Speech2TextEncoder(
            Speech2TextConfig(
                vocab_size=classes,
                d_model=width,
                encoder_layers=layers,
                encoder_attention_heads=heads,
                encoder_ffn_dim=4 * width,
                encoder_layerdrop=0.0,
                conv_channels=width,
                input_feat_per_channel=mels,
                dropout=config.dropout,
                activation_dropout=config.dropout,
                pad_token_id=BLANK,
            )
        )
        self.head = nn.Linear(width, classes)


class TransformerCtc(Encoder):
    """A Transformer over log-mels, one logit for 40 ms."""

    new = ("head",)

    def __init__(self, config: CtcConfig, mels: int, classes: int) -> None:
        super().__init__()
        self.net = TransformerNet(config, mels, classes)

    def hear(self, features: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`Encoder.hear`."""
        logits: Tensor = self.net.head(self.net.encoder(features, attention_mask=mask).last_hidden_state)
        return logits

    def time(self, frames: int) -> int:
        """See :meth:`Encoder.time`."""
        return _halved(frames, 2)

    def checkpoint_gradients(self) -> None:
        """See :meth:`Encoder.checkpoint_gradients`."""
        self.net.encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def save(self, out: Path) -> None:
        """Write a folder for `Speech2TextEncoder.from_pretrained`, and the head's weight and bias beside it."""
        from safetensors.torch import save_file

        self.net.encoder.save_pretrained(out)
        save_file({name: value.contiguous() for name, value in self.net.head.state_dict().items()}, out / HEAD_FILE)


HEAD_FILE = "ctc_head.safetensors"
"""Where an exported :class:`TransformerCtc` has `weight`, (classes, width), and `bias` of its linear head."""


class Parakeet(Encoder):
    """FastConformer (Rekesh et al. 2023), one logit for 80 ms."""

    new = ("ctc_head",)

    def __init__(self, config: CtcConfig, mels: int, classes: int) -> None:
        from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

        super().__init__()
        if config.pretrained is not None:
            self.net = _pretrained(ParakeetForCTC, config, classes, self.new, pad_token_id=BLANK)
            self.net.encoder.layerdrop = 0.0
            _same_mels(config, self.net.config.encoder_config.num_mel_bins, mels)
            return
        layers, width, heads = config.shape
        encoder = ParakeetEncoderConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            subsampling_conv_channels=width // 2,
            num_mel_bins=mels,
            dropout=config.dropout,
            activation_dropout=config.dropout,
            attention_dropout=config.dropout,
            layerdrop=0.0,
        )
        self.net = ParakeetForCTC(
            ParakeetCTCConfig(vocab_size=classes, encoder_config=encoder.to_dict(), pad_token_id=BLANK)
        )

    def time(self, frames: int) -> int:
        """See :meth:`Encoder.time`."""
        return _halved(frames, 3)


class Wav2Vec2Bert(Encoder):
    """The Conformer of w2v-BERT 2.0 (Seamless Communication 2023) over pairs of frames, one logit for 20 ms."""

    new = ("lm_head",)

    def __init__(self, config: CtcConfig, mels: int, classes: int) -> None:
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC

        super().__init__()
        if config.pretrained is not None:
            self.net = _pretrained(Wav2Vec2BertForCTC, config, classes, self.new, **_NO_MASKS)
            _same_mels(config, self.net.config.feature_projection_input_dim // 2, mels)
            return
        self.net = Wav2Vec2BertForCTC(
            Wav2Vec2BertConfig(vocab_size=classes, feature_projection_input_dim=2 * mels, **_sizes(config), **_NO_MASKS)
        )

    def hear(self, features: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`Encoder.hear`."""
        even = features.shape[1] - features.shape[1] % 2
        pairs = features[:, :even].reshape(len(features), even // 2, -1)
        return super().hear(pairs, mask[:, 1::2])

    def time(self, frames: int) -> int:
        """See :meth:`Encoder.time`."""
        return frames // 2


class MelFrontEnd(nn.Module):
    """What stands where wav2vec 2.0 and HuBERT hear a waveform: one convolution over log-mels, strided to 20 ms.

    It replaces their stack of convolutions, for shards hold no waveform; what is behind it stays as it was trained.
    """

    KERNEL, STRIDE = 3, 2

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(mels, width, self.KERNEL, self.STRIDE)

    def forward(self, features: Tensor) -> Tensor:
        """Float32, (batch, frames, mels), to (batch, width, time)."""
        return gelu(self.conv(features.transpose(1, 2)))


class Wav2Vec2(Encoder):
    """The Transformer of wav2vec 2.0 (Baevski et al. 2020) or HuBERT (Hsu et al. 2021) behind a new front end."""

    def __init__(self, config: CtcConfig, mels: int, classes: int) -> None:
        from transformers import HubertConfig, HubertForCTC, Wav2Vec2Config, Wav2Vec2ForCTC

        super().__init__()
        hubert = config.architecture == "hubert-ctc"
        body = "hubert" if hubert else "wav2vec2"
        self.new = ("lm_head", f"{body}.feature_extractor")
        loader: Any = HubertForCTC if hubert else Wav2Vec2ForCTC
        if config.pretrained is not None:
            self.net = _pretrained(loader, config, classes, self.new, **_NO_MASKS)
        else:
            options = {"conv_dim": (512,), "conv_kernel": (3,), "conv_stride": (2,), "do_stable_layer_norm": True}
            self.net = loader(
                (HubertConfig if hubert else Wav2Vec2Config)(
                    vocab_size=classes, **options, **_sizes(config), **_NO_MASKS
                )
            )
        shape = self.net.config
        width = shape.conv_dim[-1]
        getattr(self.net, body).feature_extractor = MelFrontEnd(mels, width)
        # From these transformers computes how many frames of a padded clip are true.
        shape.conv_dim, shape.conv_kernel, shape.conv_stride = (width,), (MelFrontEnd.KERNEL,), (MelFrontEnd.STRIDE,)

    def time(self, frames: int) -> int:
        """See :meth:`Encoder.time`."""
        return max((frames - MelFrontEnd.KERNEL) // MelFrontEnd.STRIDE + 1, 0)


MOST_STACKS = 12
"""Stacks that a Zipformer can have."""

_PER_STACK = Field(min_length=1, max_length=MOST_STACKS, strict=False)
_Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], _PER_STACK]
_Widths = Annotated[tuple[Annotated[int, Field(ge=8, le=2048, multiple_of=4)], ...], _PER_STACK]
_Factors = Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], _PER_STACK]
_HiddenWidths = Annotated[tuple[Annotated[int, Field(ge=8, le=16_384)], ...], _PER_STACK]
_Kernels = Annotated[tuple[Annotated[int, Field(ge=1, le=127)], ...], _PER_STACK]
_Channels = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=3, max_length=3, strict=False)]


class ZipformerSizes(BaseModel):
    """The shape of a Zipformer, by default that of Zipformer-S: a value for each stack, the first heard first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    layers: _Counts = (2, 2, 2, 2, 2, 2)
    """Blocks of each stack."""
    widths: _Widths = (192, 256, 256, 256, 256, 256)
    """Values of a state."""
    downsampling: _Factors = (1, 2, 4, 8, 4, 2)
    """How many of the front end's frames, which are 20 ms each, are one of the stack's."""
    heads: _Counts = (4, 4, 4, 8, 4, 4)
    """Of each attention."""
    feedforwards: _HiddenWidths = (512, 768, 768, 768, 768, 768)
    """Hidden width of a block's second feed-forward module; the first has three quarters of it, the third five."""
    kernels: _Kernels = (31, 31, 15, 15, 15, 31)
    """Frames of the stack that a convolution sees; odd."""
    channels: _Channels = (8, 32, 128)
    """Of the front end's three convolutions."""

    @model_validator(mode="after")
    def _fits(self) -> ZipformerSizes:
        stacks = len(self.widths)
        for name in ("layers", "downsampling", "heads", "feedforwards", "kernels"):
            if len(getattr(self, name)) != stacks:
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {stacks} stacks (widths)")
        if even := [kernel for kernel in self.kernels if not kernel % 2]:
            raise ValueError(f"a kernel of {even[0]} has no middle; make it odd")
        return self


class Zipformer(Encoder):
    """Zipformer (Yao et al. 2023), one logit for 40 ms."""

    new = ("ctc_head",)

    def __init__(self, config: ZipformerCtcConfig, mels: int, classes: int) -> None:
        from p2pasr.tasks.zipformer import ZipformerConfig, ZipformerForCTC

        super().__init__()
        if config.pretrained is not None:
            self.net = _pretrained(ZipformerForCTC, config, classes, self.new)
            _same_mels(config, self.net.config.num_mel_bins, mels)
            return
        sizes = (config.sizes or ZipformerSizes()).model_dump(mode="json")
        self.net = ZipformerForCTC(ZipformerConfig(classes, mels, sizes, config.dropout))

    def initial_params(self, key: bytes) -> Tensors:
        """See :meth:`Encoder.initial_params`."""
        from p2pasr.tasks.zipformer import start_gain

        return {name: value * np.float32(start_gain(name)) for name, value in super().initial_params(key).items()}

    def time(self, frames: int) -> int:
        """See :meth:`Encoder.time`."""
        return _halved(frames, 2)


ENCODERS: Mapping[str, type[Any]] = {
    "transformer-ctc": TransformerCtc,
    "parakeet-ctc": Parakeet,
    "wav2vec2-ctc": Wav2Vec2,
    "hubert-ctc": Wav2Vec2,
    "wav2vec2-bert-ctc": Wav2Vec2Bert,
    "zipformer-ctc": Zipformer,
}
"""The architectures by name."""

_NO_MASKS: Mapping[str, Any] = {
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
    "pad_token_id": BLANK,
}
"""Off, for they draw from numpy's generator, which no seed of a segment sets, or leave layers without gradients."""


def _sizes(config: CtcConfig) -> dict[str, Any]:
    layers, width, heads = config.shape
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        "feat_proj_dropout": 0.0,
        "final_dropout": config.dropout,
    }


def _pretrained(loader: Any, config: CtcHeadConfig, classes: int, new: Sequence[str], **options: Any) -> Any:
    """A checkpoint with a head for other classes.

    Raises:
        LocalError: it cannot be loaded, or lacks more than what is new.
    """
    net, found = load(
        loader,
        str(config.pretrained),
        config.pretrained_revision,
        dtype=torch.float32,
        vocab_size=classes,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    others = {name for name in found["missing_keys"] if not name.startswith(tuple(new))}
    others |= {str(name) for name, *_ in found["mismatched_keys"] if not str(name).startswith(tuple(new))}
    if others:
        raise LocalError(
            f"task.config.pretrained: {config.pretrained!r} is no {loader.__name__}; it lacks {len(others)} of its "
            f"parameters, such as {min(others)}"
        )
    return net


def _same_mels(config: CtcHeadConfig, wanted: int, mels: int) -> None:
    if wanted != mels:
        raise LocalError(
            f"task.config.pretrained: {config.pretrained!r} hears {wanted} mel bands and the shards' features "
            f"({config.model!r}) have {mels}; name a Whisper model with {wanted}"
        )


def _halved(frames: int, times: int) -> int:
    for _ in range(times):
        frames = (frames - 1) // 2 + 1
    return frames
