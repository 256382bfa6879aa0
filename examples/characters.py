"""A task outside speech: a small network that guesses the next character of a text.

python examples/characters.py TEXT.txt shards            # cut a text into shards
p2pasr task check examples.characters:Characters --shards shards
python examples/characters.py --train shards             # a run of one peer; others join with the line it prints
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from p2pasr import (
    GradientTask,
    OwnShard,
    Peer,
    PeerOptions,
    RunConfig,
    TrainingConfig,
    fresh_params,
    new_run,
    read_tensors,
    trainable,
    write_shards,
)

CONTEXT, WIDTH = 16, 64
CHARACTERS_A_SHARD = 4096


class Characters(GradientTask[np.ndarray]):
    """Guesses a byte from the 16 before it. An example is 17 bytes; a step's loss is the mean cross entropy in nats."""

    def __init__(self, learning_rate: float = 3e-3, seed: int = 0) -> None:
        self.config = TrainingConfig(learning_rate=learning_rate, warmup_steps=5)
        self.seed = seed
        self.device = torch.device("cpu")
        self.model = torch.nn.Sequential(
            torch.nn.Embedding(256, 16),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * CONTEXT, WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(WIDTH, 256),
        )
        self.trained = trainable(self.model)

    def initial_params(self) -> dict[str, np.ndarray]:
        """Drawn from the seed, so that all peers start from the same bits."""
        return fresh_params(self.trained, self.seed.to_bytes(8, "big"))

    def examples(self, shards: Sequence[Path]) -> list[np.ndarray]:
        """All windows of the text."""
        texts = [read_tensors(path)[0]["text"] for path in shards]
        return [window for text in texts for window in np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)]

    def weight(self, example: np.ndarray) -> float:
        """Each window is one guess."""
        return 1.0

    def loss(self, examples: Sequence[np.ndarray]) -> torch.Tensor:
        """Summed cross entropy."""
        batch = torch.from_numpy(np.stack(examples).astype(np.int64))
        return torch.nn.functional.cross_entropy(self.model(batch[:, :-1]), batch[:, -1], reduction="sum")

    def evaluate(self, params: Any, shards: Sequence[Path], on_progress: Any = None) -> Mapping[str, Any]:
        """Bits a character on every seventh window, and the share that is guessed right."""
        self.set_params(self.initial_params() if params is None else params)
        self.model.eval()
        batch = torch.from_numpy(np.stack(self.examples(shards)[::7]).astype(np.int64))
        with torch.inference_mode():
            logits = self.model(batch[:, :-1])
        nats = torch.nn.functional.cross_entropy(logits, batch[:, -1])
        right = (logits.argmax(-1) == batch[:, -1]).float().mean()
        return {"bits_per_character": float(nats) / float(np.log(2)), "accuracy": float(right)}

    def export(self, params: Any, out: Path, about: Mapping[str, Any]) -> None:
        """The network's weights as a safetensors file."""
        save_file({name: np.ascontiguousarray(value) for name, value in params.items()}, out / "model.safetensors")
        (out / "p2pasr.json").write_text(json.dumps(dict(about), indent=1) + "\n", encoding="utf-8")


def cut(text: bytes) -> Iterator[OwnShard]:
    """A text as shards; what counts as work is the number of characters."""
    for start in range(0, len(text) - CONTEXT, CHARACTERS_A_SHARD):
        piece = np.frombuffer(text[start : start + CHARACTERS_A_SHARD + CONTEXT], dtype=np.uint8)
        if len(piece) > CONTEXT:
            yield OwnShard({"text": piece}, len(piece) - CONTEXT, float(len(piece)))


def run_config(rounds: int = 4) -> RunConfig:
    """A short run."""
    sections = {"rounds": rounds, "segments": 2, "steps_per_segment": 20, "samples_per_step": 32, "shards_per_peer": 4}
    return RunConfig.model_validate({"name": "characters", "task": {"kind": "characters"}, "rounds": sections})


def main(arguments: Sequence[str]) -> None:
    """Cut a text into shards, or train on them."""
    if arguments[0] == "--train":
        shards, task = Path(arguments[1]), Characters()
        options = PeerOptions(state_dir=Path("characters-run"), seed_data=shards)
        with Peer(new_run(run_config(), shards, task=task), options, task=task) as peer:
            for _ in peer.rounds():
                print(task.evaluate(peer.state.params, sorted(shards.glob("*.safetensors"))))
    else:
        write_shards(Path(arguments[1]), cut(Path(arguments[0]).read_bytes()))


if __name__ == "__main__":
    main(sys.argv[1:])
