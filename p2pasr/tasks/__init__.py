"""What a peer trains: pure functions from a state, shards and a seed to the next state. No network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import validated
from p2pasr.tasks.base import Bounded, Checkpoint, Probed, SegmentPlan, SegmentReport, Task

__all__ = ["KINDS", "Bounded", "Checkpoint", "Probed", "SegmentPlan", "SegmentReport", "Task", "build", "pin"]

KINDS = {
    "lora": "p2pasr.tasks.lora",
    "full": "p2pasr.tasks.full",
    "student": "p2pasr.tasks.student",
    "distill": "p2pasr.tasks.distill",
    "features": "p2pasr.tasks.features",
    "llm": "p2pasr.tasks.speech_llm",
}
"""The `task.kind` values of a manifest, and the module of each: it has CONFIG, a pydantic model, and TASK, a class that
is made from one and checks shards, and pins what a configuration leaves open."""


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
    module = _module(kind)
    task: Any = module.TASK(_validated(module, config), seed, device, model)
    task.check(shards)
    made: Task = task
    return made


def pin(kind: str, config: Mapping[str, Any], model: str | None = None, shards: Sequence[Path] = ()) -> dict[str, Any]:
    """The configuration with every default written out and every version fixed, for a manifest.

    Args:
        model: as for :func:`build`.
        shards: all of the run's, from which a task takes what they decide, such as its classes.

    Raises:
        LocalError: as :func:`build`.
    """
    module = _module(kind)
    pinned: dict[str, Any] = module.TASK.pin(_validated(module, config), model, shards).model_dump(mode="json")
    return pinned


def _module(kind: str) -> Any:
    if kind not in KINDS:
        raise LocalError(f"task.kind {kind!r} is not one of {', '.join(KINDS)}")
    return import_module(KINDS[kind])


def _validated(module: Any, config: Mapping[str, Any]) -> Any:
    return validated(module.CONFIG, dict(config), "task.config")
