"""What a peer trains: pure functions from a state, shards and a seed to the next state. No network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import validated
from p2pasr.tasks.base import Bounded, Checkpoint, SegmentPlan, SegmentReport, Task

__all__ = ["KINDS", "Bounded", "Checkpoint", "SegmentPlan", "SegmentReport", "Task", "build", "pin"]

KINDS = ("lora",)
"""The `task.kind` values of a manifest."""


def build(
    kind: str,
    config: Mapping[str, Any],
    *,
    seed: int,
    device: str = "cpu",
    model: str | None = None,
    shards: Sequence[Path] = (),
) -> Task:
    """Make the task that a manifest describes.

    Args:
        kind, config: the manifest's `task` section.
        seed: the run's seed.
        device: where to train.
        model: a local folder to load a pretrained base from, in place of the one named in `config`.
        shards: files that the task must be able to train on.

    Raises:
        LocalError: an unknown kind or key, a device or model that is missing, a model that is not the run's, or
            shards that were made for another.
    """
    from p2pasr.tasks.lora import LoraTask

    task = LoraTask(_lora_config(kind, config), seed, device, model)
    task.check(shards)
    return task


def pin(kind: str, config: Mapping[str, Any], model: str | None = None) -> dict[str, Any]:
    """The configuration with every default written out and every version fixed, for a manifest.

    Args:
        model: as for :func:`build`.

    Raises:
        LocalError: as :func:`build`.
    """
    from p2pasr.tasks import lora

    return lora.pin(_lora_config(kind, config), model).model_dump(mode="json")


def _lora_config(kind: str, config: Mapping[str, Any]) -> Any:
    from p2pasr.tasks.lora import LoraTaskConfig

    if kind not in KINDS:
        raise LocalError(f"task.kind {kind!r} is not one of {', '.join(KINDS)}")
    return validated(LoraTaskConfig, dict(config), "task.config")
