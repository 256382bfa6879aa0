"""How far honest re-runs lie from each other: the same segments, trained by different classes of hardware.

From it follows `verify.close`. What else a run's limits must keep apart is measured beside it: the smallest cheats
that audits are meant to see, a learning rate that is one part in twenty too high and a step that is skipped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from p2pasr import runs, tasks
from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import RunManifest, parse_manifest
from p2pasr.protocol.state import State
from p2pasr.tasks.base import Checkpoint, SegmentPlan, Task
from p2pasr.tolerances import COARSE_CLOSE, COARSE_FAR
from p2pasr.verify.compare import relative_errors
from p2pasr.verify.evidence import checkpoint_groups

MARGIN: Final = 3.0
"""`close` is so many times the largest error seen between honest classes."""

ROOM: Final = 5.0
"""`far` and the smallest cheat must each be at least so many times `close`."""

CONTROL: Final = "control: learning rate +5 %"
SKIPPED: Final = "control: one step skipped"
CONTROLS: Final = (CONTROL, SKIPPED)
"""The cheats that are measured beside honest classes."""


@dataclass(frozen=True, slots=True)
class HardwareClass:
    """A way of computing that is available on this machine.

    Attributes:
        threads: torch's CPU threads; None for its own choice.
        capability: value of ATEN_CPU_CAPABILITY; None for the best instructions that the CPU has.
    """

    name: str
    device: str
    threads: int | None = None
    capability: str | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment to train, with its reference.

    Attributes:
        phase: from where in the run it starts, for people.
        begin, end: packed checkpoints, as this process's class makes them.
    """

    phase: str
    plan: SegmentPlan
    shards: tuple[Path, ...]
    begin: bytes
    end: bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """The relative errors of one segment in one class: group of arrays → error."""

    name: str
    phase: str
    errors: dict[str, float]


def classes_here(device: str) -> list[HardwareClass]:
    """The classes that this machine can play, its own first."""
    import torch

    own = HardwareClass(f"{device}, as configured", device)
    threads = sorted({1, 2, os.cpu_count() or 1} - {torch.get_num_threads()})
    cpu = [HardwareClass(f"cpu, {count} thread{'s' if count > 1 else ''}", "cpu", threads=count) for count in threads]
    plain = HardwareClass("cpu, plainest instructions", "cpu", capability="default")
    others = [HardwareClass("cpu", "cpu")] if device != "cpu" else []
    if device == "cpu" and torch.cuda.is_available():
        others.append(HardwareClass("cuda", "cuda"))
    return [own, *cpu, plain, *others]


def reference_segments(
    manifest: RunManifest, task: Task, states: Sequence[State], files: Sequence[Path], count: int
) -> Iterator[Segment]:
    """Consecutive segments from each state, trained by this process's class.

    Args:
        states: where in the run to start, each gets its share of `count`.
        files: shards; each chain of segments takes as many as a peer of the run does.
    """
    for place, state in enumerate(states):
        share = len(range(place, count, len(states)))
        begin = Checkpoint(state.params)
        for index in range(share):
            chain, segment = divmod(index, manifest.rounds.segments)
            if segment == 0:
                begin = Checkpoint(state.params)
            plan = SegmentPlan.of(manifest.rounds, state.round, state.digest, f"calibration {chain}", segment)
            taken = [files[(chain + i) % len(files)] for i in range(manifest.rounds.shards_per_peer)]
            shards = tuple(dict.fromkeys(taken))
            end, _ = task.segment(begin, shards, plan)
            yield Segment(f"round {state.round}", plan, shards, begin.pack(), end.pack())
            begin = end


def control_task(manifest: RunManifest, device: str, model: str | None) -> Task:
    """The run's task with a learning rate that is one part in twenty too high.

    Raises:
        LocalError: the task has no learning rate.
    """
    config = manifest.task.config
    if not isinstance(config.get("learning_rate"), float):
        raise LocalError(f"a task of the kind {manifest.task.kind!r} has no learning rate to measure a cheat by")
    cheating = {**config, "learning_rate": 1.05 * config["learning_rate"]}
    return tasks.build(manifest.task.kind, cheating, seed=manifest.seed, device=device, model=model)


def train(task: Task, segment: Segment) -> bytes:
    """The packed checkpoint at the end of a segment, trained by a task of this process."""
    end, _ = task.segment(Checkpoint.unpack(segment.begin), segment.shards, segment.plan)
    return end.pack()


def train_less(task: Task, segment: Segment) -> bytes:
    """The same by a peer that skips the segment's last step and says nothing of it."""
    fewer = replace(segment, plan=replace(segment.plan, steps=segment.plan.steps - 1))
    end = Checkpoint.unpack(train(task, fewer))
    return replace(end, step=end.step + 1).pack()


def errors_of(segment: Segment, rerun: bytes) -> dict[str, float]:
    """Group of arrays → relative error of a re-run."""
    begin, end, again = (checkpoint_groups(data)[0] for data in (segment.begin, segment.end, rerun))
    return relative_errors(begin, end, again)


@contextlib.contextmanager
def trainer(manifest: RunManifest, hardware: HardwareClass, model: str | None) -> Iterator[Callable[[Segment], bytes]]:
    """Train segments in a process of another class; yields a function that returns the packed end.

    Raises:
        LocalError: the process ended.
    """
    arguments = (manifest.canonical(), hardware.device, hardware.threads, model)
    try:
        with _environment("ATEN_CPU_CAPABILITY", hardware.capability):
            pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, arguments)
            pool.submit(int).result()  # the process starts with its first piece of work
        with pool:
            yield lambda segment: pool.submit(_train, segment).result()
    except BrokenProcessPool as error:
        raise LocalError(f"the process of the class {hardware.name!r} ended, perhaps for want of memory") from error


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a calibration comes to.

    Attributes:
        close: what `verify.close` should be; None where all classes gave the same bits.
        far: what `verify.far` should be.
        cheat: the smallest error of a control.
        cheat_name: which one's.
        most_far: the most that `verify.far` may be, below which no part of a cheat can hide.
        refused: classes whose errors leave too little room below `far` and the control.
    """

    close: float | None
    far: float
    cheat: float
    cheat_name: str
    most_far: float
    refused: tuple[str, ...]


def judge(measured: Sequence[Measured], far: float, coarse: bool = False) -> Verdict:
    """Propose `verify.close` and `verify.far` from honest errors and those of the controls.

    Args:
        far: the manifest's `verify.far`.
        coarse: whether the task computes in fewer bits than float32. Small cheats hide behind its rounding anyway, and
            honest errors alone decide.
    """
    cheat, cheat_name = min((max(item.errors.values()), item.name) for item in measured if item.name in CONTROLS)
    worst: dict[str, float] = {}
    for item in measured:
        if item.name not in CONTROLS:
            worst[item.name] = max(worst.get(item.name, 0.0), *item.errors.values())
    limit = far if coarse else min(far, cheat) / ROOM
    refused = tuple(name for name, error in worst.items() if MARGIN * error > limit)
    largest = max((error for name, error in worst.items() if coarse or name not in refused), default=0.0)
    if coarse:
        close, far = max(COARSE_CLOSE, largest), max(COARSE_FAR, MARGIN * largest)
    else:
        close, far = MARGIN * largest, min(far, cheat / ROOM)
    name = cheat_name.removeprefix("control: ")
    return Verdict(close if largest else None, far, cheat, name, cheat / ROOM, refused)


_task: Task
"""Of a process that :func:`trainer` started."""


def _prepare(packed: bytes, device: str, threads: int | None, model: str | None) -> None:
    import torch

    from p2pasr.speech.pretrained import quiet_libraries

    global _task
    quiet_libraries()
    if threads is not None:
        torch.set_num_threads(threads)
    _task = runs.build_task(parse_manifest(packed), device, model)


def _train(segment: Segment) -> bytes:
    return train(_task, segment)


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif value is not None:
            del os.environ[name]
