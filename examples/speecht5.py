"""A task beyond recognition: adapters of a SpeechT5 that learn to speak, with transformers and peft.

Prepare shards of your recordings with :func:`utterances` and `p2pasr.write_shards`, then
`p2pasr task check examples.speecht5:SpeechT5Task --shards shards`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import SpeechT5ForTextToSpeech

from p2pasr import GradientTask, OwnShard, TrainingConfig, fresh_params, read_tensors, trainable

MODEL = "microsoft/speecht5_tts"
FRAMES_A_SECOND = 62.5


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is to be said, how it sounds, and who says it.

    Attributes:
        text: int32, (characters,), the tokenizer's ids.
        mel: float32, (frames, 80), log-mels as `SpeechT5FeatureExtractor` makes them.
        voice: float32, (512,), the speaker's x-vector.
    """

    text: np.ndarray
    mel: np.ndarray
    voice: np.ndarray


def utterances(rows: Iterable[Utterance], size: int = 16) -> Iterator[OwnShard]:
    """Shards of so many utterances each."""
    held = list(rows)
    for start in range(0, len(held), size):
        piece = held[start : start + size]
        tensors = {
            "text": np.concatenate([row.text.astype(np.int32) for row in piece]),
            "text_ends": np.cumsum([len(row.text) for row in piece], dtype=np.int64),
            "mel": np.concatenate([row.mel.astype(np.float16) for row in piece]),
            "mel_ends": np.cumsum([len(row.mel) for row in piece], dtype=np.int64),
            "voices": np.stack([row.voice.astype(np.float32) for row in piece]),
        }
        yield OwnShard(tensors, len(piece), sum(len(row.mel) for row in piece) / FRAMES_A_SECOND)


class Adapted(torch.nn.Module):
    """A base with adapters. The running statistics of its postnet stay as they are: nobody averages or exports them."""

    def __init__(self, base: SpeechT5ForTextToSpeech) -> None:
        super().__init__()
        self.net: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

    def train(self, mode: bool = True) -> Adapted:
        """See :meth:`torch.nn.Module.train`."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
        return self


class SpeechT5Task(GradientTask[Utterance]):
    """Low-rank adapters in the attention of SpeechT5; the loss is the L1 distance of the log-mels.

    Args:
        model: a hub id or a folder.
    """

    def __init__(self, model: str = MODEL, learning_rate: float = 1e-3, seed: int = 0) -> None:
        self.config = TrainingConfig(learning_rate=learning_rate, warmup_steps=5)
        self.seed = seed
        self.device = torch.device("cpu")
        base = SpeechT5ForTextToSpeech.from_pretrained(model)
        self.reduction = int(base.config.reduction_factor)
        self.model = Adapted(base)
        self.trained = trainable(self.model)

    def initial_params(self) -> dict[str, np.ndarray]:
        """A drawn from the seed, B zero, so that the first model is the base."""
        drawn = fresh_params(self.trained, self.seed.to_bytes(8, "big"))
        return {name: np.zeros_like(value) if "lora_B" in name else value for name, value in drawn.items()}

    def examples(self, shards: Sequence[Path]) -> list[Utterance]:
        """The utterances of all shards."""
        found = []
        for path in shards:
            tensors, _ = read_tensors(path)
            texts = np.split(tensors["text"], tensors["text_ends"][:-1])
            mels = np.split(tensors["mel"], tensors["mel_ends"][:-1])
            found += [Utterance(*row) for row in zip(texts, mels, tensors["voices"], strict=True)]
        return found

    def weight(self, example: Utterance) -> float:
        """Frames."""
        return len(example.mel) // self.reduction * self.reduction

    def loss(self, examples: Sequence[Utterance]) -> torch.Tensor:
        """Summed L1 distance a frame, before and after the postnet.

        One utterance at a time, for the model's own loss means over padding too.
        """
        return torch.stack([self._loss(example) for example in examples]).sum()

    def _loss(self, example: Utterance) -> torch.Tensor:
        frames = int(self.weight(example))
        target = torch.from_numpy(example.mel[:frames].astype(np.float32))[None]
        text = torch.from_numpy(example.text.astype(np.int64))[None]
        voice = torch.from_numpy(np.array(example.voice))[None]
        model = self.model.net.base_model.model
        speecht5 = model.speecht5(
            input_values=text,
            decoder_input_values=_shifted(target, self.reduction),
            speaker_embeddings=voice,
            return_dict=True,
        )
        before, after, _ = model.speech_decoder_postnet(speecht5.last_hidden_state)
        return ((before - target).abs() + (after - target).abs()).mean(-1).sum()

    def evaluate(self, params: Any, shards: Sequence[Path], on_progress: Any = None) -> Mapping[str, Any]:
        """Mean L1 distance a frame. The decoder's prenet drops out at all times, so it is seeded."""
        self.set_params(self.initial_params() if params is None else params)
        self.model.eval()
        rows = self.examples(shards)
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            total = sum(float(self._loss(row)) for row in rows)
        return {"l1": total / sum(map(self.weight, rows))}

    def export(self, params: Any, out: Path, about: Mapping[str, Any]) -> None:
        """A PEFT adapter folder."""
        self.set_params(params)
        self.model.net.save_pretrained(out)
        (out / "p2pasr.json").write_text(json.dumps(dict(about), indent=1) + "\n", encoding="utf-8")


def _shifted(target: torch.Tensor, reduction: int) -> torch.Tensor:
    """The decoder's input: the last frame of each group, one group late."""
    kept = target[:, reduction - 1 :: reduction]
    return torch.cat([torch.zeros_like(kept[:, :1]), kept[:, :-1]], dim=1)
