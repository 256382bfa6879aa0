"""A task that trains in microseconds: a softmax classifier whose examples follow from its shards' bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.tasks.base import Checkpoint, OnStep, SegmentPlan, SegmentReport

FEATURES, CLASSES, EXAMPLES = 64, 16, 256
LEARNING_RATE = np.float32(0.05)
MOMENTUM = np.float32(0.9)

Examples = tuple[np.ndarray, np.ndarray]


@cache
def examples(seed: bytes) -> Examples:
    """Features, (n, 64) float32, and labels that one linear map gives all examples of the world."""
    teacher = np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)
    rng = np.random.default_rng(list(seed))
    features = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    return features, np.argmax(features @ teacher, axis=1)


def gradient(weights: np.ndarray, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Of the mean cross entropy; and that itself."""
    scores = features @ weights
    scores -= scores.max(axis=1, keepdims=True)
    odds = np.exp(scores)
    odds /= odds.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(-np.log(odds[rows, labels] + np.float32(1e-9)).mean())
    odds[rows, labels] -= 1
    return (features.T @ odds / np.float32(len(labels))).astype(np.float32), loss


class TinyTask:
    """The classifier, trained by momentum; `hardware` stands for the kind of machine that it runs on."""

    def __init__(self, learning_rate: np.float32 = LEARNING_RATE, hardware: str = "numpy") -> None:
        self.learning_rate = learning_rate
        self.hardware_class = hardware

    def initial_params(self) -> Tensors:
        return {"weights": np.zeros((FEATURES, CLASSES), dtype=np.float32)}

    def segment(
        self, start: Checkpoint, shards: Sequence[Path], plan: SegmentPlan, on_step: OnStep | None = None
    ) -> tuple[Checkpoint, SegmentReport]:
        features, labels = self.read(shards)
        weights = start.params["weights"]
        speed = start.moments.get("weights/speed", np.zeros_like(weights))
        rng = np.random.default_rng(list(plan.seed))
        losses = []
        for _ in range(plan.steps):
            batch = rng.integers(0, len(labels), plan.samples_per_step)
            slope, loss = gradient(weights, features[batch], labels[batch])
            speed = MOMENTUM * speed + slope
            weights = weights - self.learning_rate * speed
            losses.append(loss)
        end = Checkpoint({"weights": weights}, {"weights/speed": speed}, start.step + plan.steps)
        return end, SegmentReport(float(np.mean(losses)), plan.steps * plan.samples_per_step)

    def read(self, shards: Sequence[Path]) -> Examples:
        """The examples of some shards, together."""
        parts = [examples(shard.read_bytes()) for shard in shards]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def probe_loss(self, params: Tensors, shards: Sequence[Path]) -> float:
        return gradient(params["weights"], *self.read(shards))[1]

    def evaluate(self, params: Any, shards: Sequence[Path], on_progress: Any = None) -> Mapping[str, Any]:
        weights = self.initial_params()["weights"] if params is None else params["weights"]
        return {"loss": gradient(weights, *self.read(shards))[1]}

    def export(self, params: Any, out: Path, about: Mapping[str, Any]) -> None:
        np.save(out / "weights.npy", params["weights"])


def held_out_loss(params: Tensors) -> float:
    """Loss on examples that no shard has."""
    return gradient(params["weights"], *examples(blob_digest(b"held out")))[1]
