"""Configurations of every kind of task, so small that a few clips teach them something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2pasr.speech.synthetic import ACTIONS, DIGITS, OPENINGS

from .conftest import LORA, MODEL

STUDENT: dict[str, Any] = {"model": MODEL, "warmup_steps": 0, "learning_rate": 3e-3, "width": 32, "heads": 2}
DISTIL: dict[str, Any] = {"architecture": "distil-whisper", "model": MODEL, "warmup_steps": 0}
CTC = {**STUDENT, "layers": 1, "spec_augment": {"frequency_bins": 8, "time_share": 0.1}}
ZIPFORMER: dict[str, Any] = {
    "architecture": "zipformer-ctc",
    "model": MODEL,
    "warmup_steps": 0,
    "learning_rate": 3e-3,
    "sizes": {
        "layers": [1, 1, 1],
        "widths": [32, 48, 40],
        "downsampling": [1, 4, 2],
        "heads": [2, 2, 2],
        "feedforwards": [64, 64, 64],
        "kernels": [7, 5, 5],
        "channels": [4, 8, 8],
    },
    "spec_augment": CTC["spec_augment"],
}
LLM: dict[str, Any] = {
    "model": MODEL,
    "projector_width": 128,
    "max_tokens": 48,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
}
"""The folder of its language model is made for a session, see :func:`with_folders`."""

SPOKEN = sorted({*"".join((*OPENINGS, *ACTIONS)), *DIGITS})
"""Characters of the synthetic corpus."""

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "learning_rate": 3e-3},
    "full": {"model": MODEL, "warmup_steps": 0, "learning_rate": 3e-4},
    "full-decoder": {"model": MODEL, "warmup_steps": 0, "learning_rate": 3e-4, "freeze_encoder": True},
    "student-whisper": {**STUDENT, "architecture": "whisper", "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0},
    "student-distil-whisper": {
        "model": MODEL,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "architecture": "distil-whisper",
    },
    "student-transformer-ctc": {**CTC, "architecture": "transformer-ctc"},
    "student-transformer-ctc-bytes": {**CTC, "architecture": "transformer-ctc", "units": "bytes"},
    "student-parakeet-ctc": {**CTC, "architecture": "parakeet-ctc"},
    "student-wav2vec2-ctc": {**CTC, "architecture": "wav2vec2-ctc"},
    "student-hubert-ctc": {**CTC, "architecture": "hubert-ctc"},
    "student-wav2vec2-bert-ctc": {**CTC, "architecture": "wav2vec2-bert-ctc"},
    "student-zipformer-ctc": ZIPFORMER,
    "distill": {
        "model": MODEL,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "encoder_layers": [0],
        "decoder_layers": [0],
    },
    "distill-online": {
        "model": MODEL,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "decoder_layers": [-1],
        "freeze_encoder": True,
        "teacher_online": True,
    },
    "features": {
        "model": MODEL,
        "heads": ["accent", "speaker", "vad", "confidence", "masked"],
        "dialects": ["cmn", "yue"],
        "encoder": {"width": 32, "layers": 1, "feedforward": 64},
        "text_layers": 1,
        "warmup_steps": 0,
        "learning_rate": 5e-3,
    },
    "features-text": {
        "model": MODEL,
        "heads": ["correction", "phoneme"],
        "pronunciations": {"yue": {char: [f"u{ord(char) % 7}", f"v{ord(char) % 5}"] for char in SPOKEN}},
        "encoder": {"width": 32, "layers": 1, "feedforward": 64},
        "text_layers": 1,
        "warmup_steps": 0,
        "learning_rate": 5e-3,
    },
    "llm": {**LLM, "stage": "adapters", "rank": 4},
    "llm-projector": {**LLM, "stage": "projector"},
}
"""Name of a variant, of which the first word is its kind → a configuration that learns from a few clips."""


def kind_of(name: str) -> str:
    """The kind of a variant."""
    return name.partition("-")[0]


def with_folders(name: str, language_model: Path) -> dict[str, Any]:
    """The configuration of a variant, with the folder that it needs.

    Args:
        language_model: a folder with a language model.
    """
    folders = {"language_model": str(language_model)} if kind_of(name) == "llm" else {}
    return {**CONFIGS[name], **folders}
