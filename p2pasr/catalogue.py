"""What can be planned: tasks of this package at published sizes, each with the ways of setting it.

They are described by configurations of runs, and of the models that these name by folders without weights: a Whisper's
or a language model's `config.json`, and the tokenizer and features of the model that comes with this package.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from p2pasr.speech.pretrained import BUNDLED

if TYPE_CHECKING:
    from transformers import Qwen2Config, WhisperConfig

WHISPERS: Final = {
    "whisper-tiny": (384, 4, 6, 80, 51_865),
    "whisper-base": (512, 6, 8, 80, 51_865),
    "whisper-small": (768, 12, 12, 80, 51_865),
    "whisper-medium": (1024, 24, 16, 80, 51_865),
    "whisper-large-v3": (1280, 32, 20, 128, 51_866),
}
"""Width, layers of encoder and decoder, heads, mel bands and tokens (Radford et al. 2022, and their model cards)."""

LANGUAGE_MODELS: Final = {"Qwen2.5-0.5B": (896, 24, 14, 2, 4864), "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960)}
"""Width, layers, heads of queries and of keys, and width of the feed-forward layers (their model cards)."""

LANGUAGE_MODEL_TOKENS: Final = 151_936

CHARACTERS: Final = 5000
"""Classes of a CTC head: what Chinese texts are written with."""

FULL: Final = ("whisper-tiny", "whisper-base", "whisper-small")
"""Those whose whole deltas still travel from home."""

DIALECTS: Final = ("cmn", "yue")


@dataclass(frozen=True, slots=True)
class Choice:
    """A task that could be trained, and one way of setting it.

    Attributes:
        kind, model: `task.kind`, and the model as people call it.
        config: what makes it that model: `task.config`, with folders of :func:`write_shapes` in place of models.
        settings: of `task.config`, besides.
    """

    kind: str
    model: str
    config: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


def catalogue(shapes: Path, *, precision: str = "fp32", accelerator: bool = False) -> Iterator[list[Choice]]:
    """Every task at its sizes, the smallest first, in settings that save ever more memory.

    Args:
        shapes: what :func:`write_shapes` wrote.
        precision: what the machine computes best in.
        accelerator: whether it is one; what is stored in 4 bits trains too slowly elsewhere.
    """
    for kind, model, config, saving in _entries(shapes):
        ways = [Choice(kind, model, config, _settings(config, more, precision)) for more in ({}, *saving)]
        if possible := [way for way in ways if accelerator or "quantise" not in {**config, **way.settings}]:
            yield possible


def _settings(config: Mapping[str, Any], saving: Mapping[str, Any], precision: str) -> Mapping[str, Any]:
    """What saves memory, and the precision; a base of few bits is computed with in float32."""
    plain = precision == "fp32" or "quantise" in {**config, **saving}
    return saving if plain else {"precision": precision, **saving}


Entry = tuple[str, str, Mapping[str, Any], Sequence[Mapping[str, Any]]]
"""Kind, model, its configuration and what saves memory, ever more of it."""

_CHECKPOINTING: Final = ({"gradient_checkpointing": True},)
_QUANTISED: Final = (*_CHECKPOINTING, {"gradient_checkpointing": True, "quantise": "4bit"})


def _entries(shapes: Path) -> Iterator[Entry]:
    at = {name: str(shapes / name) for name in (*WHISPERS, *LANGUAGE_MODELS)}
    yield from _features(at["whisper-small"])
    yield from _students(at)
    for name in WHISPERS:
        yield "lora", name, {"model": at[name]}, _CHECKPOINTING
    for name in ("whisper-medium", "whisper-large-v3"):
        yield "lora", f"{name}, 4-bit", {"model": at[name], "quantise": "4bit"}, _CHECKPOINTING
    for name in FULL:
        yield "full", name, {"model": at[name]}, _CHECKPOINTING
    yield from _distilled(at)
    for name in LANGUAGE_MODELS:
        for stage in ("projector", "adapters"):
            config = {"model": at["whisper-small"], "language_model": at[name], "stage": stage}
            yield "llm", f"{name}, {stage}", config, _QUANTISED


def _features(model: str) -> Iterator[Entry]:
    speakers = [f"{index:016x}" for index in range(1000)]
    sizes: list[tuple[str, list[str], dict[str, int]]] = [
        ("vad", ["vad"], {"width": 192}),
        ("accent speaker vad masked", ["accent", "speaker", "vad", "masked"], {}),
        ("accent confidence", ["accent", "confidence"], {}),
        ("correction", ["correction"], {}),
        ("masked 9 × 512", ["masked"], {"width": 512, "layers": 9, "attention_heads": 8, "feedforward": 2048}),
    ]
    for label, heads, encoder in sizes:
        config = {"model": model, "heads": heads, "encoder": encoder, "dialects": DIALECTS, "speakers": speakers}
        yield "features", label, config, ()


def _students(at: Mapping[str, str]) -> Iterator[Entry]:
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + CHARACTERS)))
    small = {"model": at["whisper-small"]}
    ctc = {**small, "characters": characters}
    yield "student", "whisper", {**small, "architecture": "whisper"}, _CHECKPOINTING
    yield "student", "zipformer-ctc", {**ctc, "architecture": "zipformer-ctc"}, _CHECKPOINTING
    shapes = [("transformer-ctc", 12, 768, 12), ("parakeet-ctc", 17, 512, 8), ("transformer-ctc", 23, 1024, 16)]
    for architecture, layers, width, heads in shapes:
        shape = {"architecture": architecture, "layers": layers, "width": width, "heads": heads}
        yield "student", f"{architecture} {layers} × {width}", {**ctc, **shape}, _CHECKPOINTING
    for name in ("whisper-small", "whisper-large-v3"):
        config = {"model": at[name], "architecture": "distil-whisper"}
        yield "student", name.replace("whisper", "distil"), config, _CHECKPOINTING


def _distilled(at: Mapping[str, str]) -> Iterator[Entry]:
    picked = {"decoder_layers": [0, -1], "freeze_encoder": True}
    for name in ("whisper-small", "whisper-large-v3"):
        label, config = name.replace("whisper", "distil"), {**picked, "model": at[name]}
        yield "distill", label, config, _CHECKPOINTING
        yield "distill", f"{label}, online", {**config, "teacher_online": True}, _CHECKPOINTING
    taught = {"model": at["whisper-tiny"], "teacher": at["whisper-medium"], "teacher_online": True}
    yield "distill", "tiny from medium, online", taught, _CHECKPOINTING


def write_shapes(folder: Path) -> None:
    """Write a folder for each of :data:`WHISPERS` and :data:`LANGUAGE_MODELS`, without weights.

    Tokens are those of the model that comes with this package, which are fewer than theirs.
    """
    (bundled,) = BUNDLED.values()
    extractor = json.loads((bundled / "preprocessor_config.json").read_text(encoding="utf-8"))
    configs = {name: whisper_config(*sizes) for name, sizes in WHISPERS.items()}
    others = {name: language_model_config(*sizes) for name, sizes in LANGUAGE_MODELS.items()}
    for name, config in (configs | others).items():
        config.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled / file, folder / name / file)
    for name, config in configs.items():
        settings = json.dumps({**extractor, "feature_size": config.num_mel_bins})
        (folder / name / "preprocessor_config.json").write_text(settings, encoding="utf-8")


def whisper_config(width: int, layers: int, heads: int, mels: int, tokens: int) -> WhisperConfig:
    """A Whisper by its sizes."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=tokens,
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )


def language_model_config(width: int, layers: int, heads: int, keys: int, feedforward: int) -> Qwen2Config:
    """A Qwen2 by its sizes, whose output shares the embeddings."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=LANGUAGE_MODEL_TOKENS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=feedforward,
        tie_word_embeddings=True,
    )
