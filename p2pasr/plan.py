"""What this machine can train: the tasks and models that fit, how to set them, and how long a round takes."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from p2pasr import tasks
from p2pasr.catalogue import DIALECTS, Choice
from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RoundSection
from p2pasr.speech.labels import Labelling, SoftLabels
from p2pasr.speech.shards import Clip, Features, pack_shard
from p2pasr.tasks.base import Checkpoint, SegmentPlan
from p2pasr.tasks.cost import Cost, stored, take, trace
from p2pasr.tasks.training import GradientTask
from p2pasr.tasks.whisper import FRAMES_A_SECOND, PREFIX_TOKENS

GIB: Final = 1 << 30
RESERVE: Final = 0.9
"""Share of a device's memory that is planned with; the rest goes to its context and to fragments."""

BF16_CAPABILITY: Final = 8
"""From which compute capability on accelerators multiply in bfloat16."""

SYSTEM_GIB: Final = 4.0
"""What the system and its programs keep of a PC's main memory."""

EFFICIENCY: Final = 0.5
"""Share of the speed of large matrix products that training reaches, before it was measured."""

ERROR: Final = 0.15
"""Share by which a step may take more than was planned."""

BATCHES: Final = (64, 32, 16, 8, 4, 2, 1)
"""What is tried for `micro_batch`, the largest first."""

TEXT_TOKENS: Final = 40
"""Tokens of a transcript, for planning."""

FIRST_TOKEN: Final = 33
"""A token of every byte-level vocabulary; those behind it are characters too."""

TEACHER_TOKENS: Final = 64
"""Tokens that a teacher's labels name, as `p2pasr distill label` does."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to train with.

    Attributes:
        device: as torch names it.
        name: for people.
        memory: bytes that training may fill.
        precision: what it computes best in, a value of `task.config.precision`.
        speeds: precision → floating-point operations a second in large products of matrices.
    """

    device: str
    name: str
    memory: float
    precision: str
    speeds: Mapping[str, float]

    @property
    def accelerated(self) -> bool:
        """Whether it is more than a processor."""
        return self.device != "cpu"

    def minutes(self, flops: float, precision: str) -> float:
        """How long training takes so many floating-point operations.

        Args:
            precision: computed in float32's time where its speed is not known.
        """
        return flops / (EFFICIENCY * self.speeds.get(precision, self.speeds["fp32"])) / 60

    def whole(self, room: float) -> float:
        """Bytes that such a machine must have for training to fill some of them."""
        return room / RESERVE if self.accelerated else room + SYSTEM_GIB * GIB


@dataclass(frozen=True, slots=True)
class Plan:
    """How a choice would be trained.

    Attributes:
        cost: of one example.
        micro_batch: examples at once; None where not one fits.
        memory: bytes that it takes, with that many examples or with one.
        room: bytes that training must be free to fill for it.
        minutes: of a round.
    """

    choice: Choice
    cost: Cost
    micro_batch: int | None
    memory: float
    room: float
    minutes: float


def look() -> Machine:
    """The accelerator with the most memory, or the processor."""
    if torch.cuda.is_available():
        index = max(range(torch.cuda.device_count()), key=_free)
        device, name = f"cuda:{index}", torch.cuda.get_device_name(index)
        brief = torch.cuda.get_device_properties(index).major >= BF16_CAPABILITY
        dtypes = {"fp32": torch.float32, **({"bf16": torch.bfloat16} if brief else {})}
        speeds = {precision: measure_speed(device, dtype) for precision, dtype in dtypes.items()}
        memory = room(torch.device(device))
        return Machine(device, name, memory, "bf16" if brief else "fp32", speeds)
    import psutil

    threads, total = torch.get_num_threads(), psutil.virtual_memory().total
    name = f"{threads} threads of {torch.backends.cpu.get_cpu_capability()}, {total / GIB:.0f} GiB"
    return Machine("cpu", name, room(torch.device("cpu")), "fp32", {"fp32": measure_speed("cpu")})


def imagine(gib: float, tflops: float | None) -> Machine:
    """An accelerator with so much memory that computes in bfloat16.

    Args:
        tflops: its speed in that, in 10¹² operations a second, and in float32 half of it; this machine's if None.
    """
    if tflops is None:
        speed = max(look().speeds.values())
        speeds, told = {"fp32": speed, "bf16": speed}, "with this machine's speed"
    else:
        speeds, told = {"fp32": tflops * 1e12 / 2, "bf16": tflops * 1e12}, f"with {tflops:g} TFLOP/s"
    return Machine("cuda", f"an accelerator of {gib:g} GiB {told}", RESERVE * gib * GIB, "bf16", speeds)


def room(device: torch.device) -> float:
    """Bytes that training may fill on a device, with those that this process has taken there already."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return RESERVE * (_free(index) + torch.cuda.memory_reserved(index))
    import psutil

    return float(max(psutil.virtual_memory().total - SYSTEM_GIB * GIB, GIB))


def _free(index: int) -> float:
    """Free bytes of an accelerator, asked of its driver where that can be done without taking any."""
    try:
        import pynvml
    except ImportError:
        return float(torch.cuda.mem_get_info(index)[0])
    pynvml.nvmlInit()
    try:
        identifier = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(identifier)).free)
    finally:
        pynvml.nvmlShutdown()


def measure_speed(device: str, dtype: torch.dtype = torch.float32, size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second in products of matrices."""
    one = torch.ones(size, size, device=device, dtype=dtype)
    _finish(one @ one)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        _finish(one @ one)
        done += 1
    return 2.0 * size**3 * done / (time.perf_counter() - began)


def _finish(product: torch.Tensor) -> None:
    float(product[0, 0])  # waits for the device


def plans(choices: Iterable[Sequence[Choice]], machine: Machine, rounds: RoundSection) -> Iterator[Plan]:
    """How each task would be trained on a machine.

    Args:
        choices: for each, the ways of setting it, the plainest first; the first that fits is taken, or the last.

    Raises:
        LocalError: a choice is no configuration of its task.
    """
    for ways in choices:
        found = None
        for choice in ways:
            task = sketch(choice.kind, {**choice.config, **choice.settings})
            cost = _trace(task, [_example(task)] * min(max(rounds.samples_per_step, 2), BATCHES[0]))
            found = plan(choice, cost, machine, rounds, drops_out=task.drops_out())
            if found.micro_batch is not None:
                break
        if found is not None:
            yield found


def plan(choice: Choice, cost: Cost, machine: Machine, rounds: RoundSection, *, drops_out: bool) -> Plan:
    """The largest batch that fits, and how long a round takes with it.

    Args:
        drops_out: whether a batch that does not fit after all cannot be halved, so that it must fit with some to spare.
    """
    spare = 1 + ERROR if drops_out else 1.0
    sizes = [size for size in BATCHES if size <= rounds.samples_per_step]
    micro_batch = next((size for size in sizes if spare * cost.memory(size) <= machine.memory), None)
    memory = cost.memory(micro_batch or 1)
    minutes = machine.minutes(_flops(cost.flops, rounds), str(choice.settings.get("precision", "fp32")))
    return Plan(choice, cost, micro_batch, memory, spare * memory, minutes)


def _flops(each: float, rounds: RoundSection) -> float:
    """Those of a round, by those of one example."""
    return each * rounds.segments * rounds.steps_per_segment * rounds.samples_per_step


def sketch(kind: str, config: Mapping[str, Any]) -> GradientTask[Any]:
    """A task whose model has shapes and no values; of the models that it names no weights are needed.

    Raises:
        LocalError: as :func:`p2pasr.tasks.build`, or a step of this kind of task cannot be traced.
    """
    with torch.device("meta"):
        task = tasks.build(kind, config, seed=0, device="meta")
    if not isinstance(task, GradientTask):
        raise LocalError(f"a task of the kind {kind!r} does not say what a step of it takes")
    return task


def modules(task: GradientTask[Any]) -> torch.nn.ModuleList:
    """All that a task holds: the model, and a teacher if there is one."""
    return torch.nn.ModuleList(value for value in vars(task).values() if isinstance(value, torch.nn.Module))


def _trace(task: GradientTask[Any], examples: Sequence[Any]) -> Cost:
    task.model.train()
    return trace(modules(task), lambda count: task.loss(examples[:count]), len(examples), task.config.precision)


def _example(task: Any) -> Any:
    """The longest clip that a task takes, with a transcript and a teacher's labels."""
    features: Features = task.features
    mel = np.zeros((features.n_mels, round(features.window_seconds * FRAMES_A_SECOND)), dtype=np.float16)
    tokens = tuple(range(FIRST_TOKEN, FIRST_TOKEN + PREFIX_TOKENS + TEXT_TOKENS + 1))
    named = np.tile(np.arange(TEACHER_TOKENS, dtype=np.int32), (len(tokens) - 1, 1))
    labels = SoftLabels(named, np.zeros(named.shape, dtype=np.float16), np.zeros(len(named), dtype=np.float32))
    clip = Clip(mel, tokens, features.window_seconds, labels=labels)
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard"
        shard.write_bytes(pack_shard([clip], DIALECTS[0], features, Labelling("", "", "", 1.0, 1.0, "")))
        (example,) = task.examples([shard])
    return example


# --- what a task takes in truth ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """A step of a run's own task, as it was planned and as it was.

    Attributes:
        examples: in the step.
        planned, taken: bytes of weights, gradients, moments and what else is held at once.
        flops: floating-point operations of a round, as planned.
        step_seconds: the fastest of the steps.
        minutes: of a round at this pace.
    """

    examples: int
    planned: float
    taken: float
    flops: float
    step_seconds: float
    minutes: float


def measure(
    task: GradientTask[Any], sketched: GradientTask[Any], shards: Sequence[Path], rounds: RoundSection, steps: int = 3
) -> Measured:
    """Take a few steps and compare them with what was planned for them.

    Args:
        sketched: the same task without values.
        shards: files to train on.
        rounds: how much a round trains.
    """
    examples = list(task.examples(shards))
    size = min(task.config.micro_batch or rounds.samples_per_step, len(examples))
    foreseen = _cost_together(sketched, examples[:size])
    plan_of_step = SegmentPlan(blob_digest(b"plan"), 1, rounds.samples_per_step, 0, 1)
    start = Checkpoint(task.initial_params())
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        end, _ = task.segment(start, shards, plan_of_step)
        seconds.append(time.perf_counter() - began)
    moments = sum(value.nbytes for value in end.moments.values())
    gradients = sum(parameter.nbytes for parameter in task.trained.values())
    taken = stored(modules(task)) + gradients + moments + _held(task, examples[:size])
    memory = foreseen.memory(1, task.config.optimizer)
    minutes = min(seconds) * rounds.segments * rounds.steps_per_segment / 60
    return Measured(size, memory, taken, _flops(foreseen.flops / size, rounds), min(seconds), minutes)


def planned(task: GradientTask[Any], examples: Sequence[Any]) -> float:
    """Bytes that a step takes with some examples at once, by a step of the task without values.

    Args:
        task: a sketch, or one of which a copy without values can be made: its base is not quantised.
    """
    return _cost_together(task, examples).memory(1, task.config.optimizer)


def _cost_together(task: GradientTask[Any], examples: Sequence[Any]) -> Cost:
    """Of some examples as if they were one."""
    bare = task if task.device.type == "meta" else _without_values(task)
    bare.model.train()
    return trace(modules(bare), lambda _: bare.loss(examples), 1, bare.config.precision)


def _without_values(task: GradientTask[Any]) -> GradientTask[Any]:
    """A copy that shares nothing of the task's modules but their code."""
    held = modules(task)
    memo: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in held.buffers()}
    memo |= {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in held.parameters()}
    bare = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, torch.nn.Module):
            setattr(bare, name, copy.deepcopy(value, memo))
    bare.device = torch.device("meta")
    return bare


def _held(task: GradientTask[Any], examples: Sequence[Any]) -> int:
    def loss() -> torch.Tensor:
        with task.autocast():
            return task.loss(examples)

    task.model.train()
    return take(modules(task), loss).held
