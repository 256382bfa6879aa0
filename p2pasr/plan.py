"""What this machine can train: the tasks and models that fit, how to set them, and how long a round takes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RoundSection
from p2pasr.tasks.base import Checkpoint, SegmentPlan
from p2pasr.tasks.cost import Cost, kept_by, trace
from p2pasr.tasks.training import GradientTask
from p2pasr.tasks.whisper import Batch, summed_loss

if TYPE_CHECKING:
    from transformers import WhisperConfig

Traceable = tuple[torch.nn.Module, Callable[[int], torch.Tensor]]
Made = Callable[[], Traceable]

GIB: Final = 1 << 30
RESERVE: Final = 0.9
"""Share of a device's memory that is planned with; the rest goes to its context and to fragments."""

SYSTEM_GIB: Final = 4.0
"""What the system and its programs keep of a PC's main memory."""

EFFICIENCY: Final = 0.5
"""Share of the speed of large matrix products that training reaches, before it was measured."""

CLIP_TOKENS: Final = 40
"""Tokens of a transcript, for planning."""

BATCHES: Final = (64, 32, 16, 8, 4, 2, 1)
"""What is tried for `micro_batch`, the largest first."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to train with.

    Attributes:
        device: as torch names it.
        name: for people.
        memory: bytes that training may fill.
        speed: floating-point operations a second in large products of float32 matrices, as measured now.
    """

    device: str
    name: str
    memory: float
    speed: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A task that could be trained, and one way of setting it.

    Attributes:
        kind, model: `task.kind`, and the model as people call it.
        settings: of `task.config`, besides the model.
        make: a module on the meta device, and the loss of so many examples.
    """

    kind: str
    model: str
    settings: dict[str, Any]
    make: Made


@dataclass(frozen=True, slots=True)
class Plan:
    """How a choice would be trained here.

    Attributes:
        cost: of one example.
        micro_batch: examples at once; None where not one fits.
        memory: bytes that it takes, with that many examples or with one.
        minutes: of a round.
    """

    choice: Choice
    cost: Cost
    micro_batch: int | None
    memory: float
    minutes: float


def look() -> Machine:
    """The accelerator with the most memory, or the processor."""
    if torch.cuda.is_available():
        device = max(range(torch.cuda.device_count()), key=lambda index: _free(index))
        free, name = _free(device), torch.cuda.get_device_name(device)
        return Machine(f"cuda:{device}", name, RESERVE * free, measure_speed(f"cuda:{device}"))
    import psutil

    threads = torch.get_num_threads()
    memory = room(torch.device("cpu"))
    name = (
        f"{threads} threads of {torch.backends.cpu.get_cpu_capability()}, {psutil.virtual_memory().total / GIB:.0f} GiB"
    )
    return Machine("cpu", name, memory, measure_speed("cpu"))


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


def measure_speed(device: str, size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second in products of float32 matrices."""
    one = torch.ones(size, size, device=device)
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
    """
    for ways in choices:
        found = None
        for choice in ways:
            module, loss = choice.make()
            cost = trace(module, loss, examples=1, recompute="gradient_checkpointing" in choice.settings)
            found = plan(choice, cost, machine, rounds)
            if found.micro_batch is not None:
                break
        if found is not None:
            yield found


def plan(choice: Choice, cost: Cost, machine: Machine, rounds: RoundSection) -> Plan:
    """The largest batch that fits, and how long a round takes with it."""
    quantise = str(choice.settings.get("quantise", "none"))
    step = rounds.samples_per_step
    fitting = [size for size in BATCHES if size <= step and cost.memory(size, quantise) <= machine.memory]
    samples = rounds.segments * rounds.steps_per_segment * step
    minutes = cost.flops * samples / (EFFICIENCY * machine.speed) / 60
    micro_batch = fitting[0] if fitting else None
    return Plan(choice, cost, micro_batch, cost.memory(micro_batch or 1, quantise), minutes)


# --- what a task takes in truth ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """A step of a run's own task, as it was planned and as it was.

    Attributes:
        examples: in the step.
        planned, taken: bytes of weights, gradients, moments and what autograd keeps.
        step_seconds: the fastest of the steps.
        minutes: of a round at this pace.
    """

    examples: int
    planned: float
    taken: float
    step_seconds: float
    minutes: float


def measure(task: GradientTask[Any], shards: Sequence[Path], rounds: RoundSection, steps: int = 3) -> Measured:
    """Take a few steps and compare them with what was planned for them.

    Args:
        shards: files to train on.
        rounds: how much a round trains.
    """
    examples = list(task.examples(shards))
    size = min(task.config.micro_batch or rounds.samples_per_step, len(examples))
    foreseen = planned(task, examples[:size])
    plan_of_step = SegmentPlan(blob_digest(b"plan"), 1, rounds.samples_per_step, 0, 1)
    start = Checkpoint(task.initial_params())
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        end, _ = task.segment(start, shards, plan_of_step)
        seconds.append(time.perf_counter() - began)
    moments = sum(value.nbytes for value in end.moments.values())
    weights = sum(parameter.nbytes for parameter in task.model.parameters())
    gradients = sum(parameter.nbytes for parameter in task.trained.values())
    task.model.train()
    kept = kept_by(lambda: task.loss(examples[:size]), task.model)
    samples = rounds.segments * rounds.steps_per_segment
    return Measured(size, foreseen, weights + gradients + moments + kept, min(seconds), min(seconds) * samples / 60)


def planned(task: GradientTask[Any], examples: Sequence[Any]) -> float:
    """Bytes that a step takes, traced from a copy of the task without values."""
    real, device = task.model, task.device
    values = {id(tensor): tensor.to("meta") for tensor in real.buffers()}
    values |= {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in real.parameters()}
    task.model, task.device = copy.deepcopy(real, values), torch.device("meta")
    try:
        cost = trace(task.model, lambda _: task.loss(examples), 1)
    finally:
        task.model, task.device = real, device
    return cost.memory(1, optimizer=task.config.optimizer)


# --- what can be planned ------------------------------------------------------------------------

WHISPERS: Final = {
    "whisper-tiny": (384, 4, 6, 80, 51_865),
    "whisper-base": (512, 6, 8, 80, 51_865),
    "whisper-small": (768, 12, 12, 80, 51_865),
    "whisper-medium": (1024, 24, 16, 80, 51_865),
    "whisper-large-v3": (1280, 32, 20, 128, 51_866),
}
"""Width, layers of encoder and decoder, heads, mel bands and tokens (Radford et al. 2022, and their model cards)."""

FULL: Final = ("whisper-tiny", "whisper-base", "whisper-small")
"""Those whose whole deltas still travel from home."""


def catalogue(machine: Machine) -> Iterator[list[Choice]]:
    """Tasks of this package at their published sizes, the smallest first, each in several settings."""
    for name in WHISPERS:
        yield [_whisper_choice("lora", name, settings) for settings in _ways(machine, adapters=True)]
    for name in FULL:
        yield [_whisper_choice("full", name, settings) for settings in _ways(machine, adapters=False)]


def _ways(machine: Machine, *, adapters: bool) -> list[dict[str, Any]]:
    """Settings that save ever more memory."""
    checkpointing = {"gradient_checkpointing": True}
    ways: list[dict[str, Any]] = [{}, checkpointing]
    if machine.device != "cpu" and adapters:
        ways.append({"quantise": "4bit", **checkpointing})
    return ways


def _whisper_choice(kind: str, name: str, settings: dict[str, Any]) -> Choice:
    width, layers, heads, mels, tokens = WHISPERS[name]
    config = whisper_config(width, layers, heads, mels, tokens)
    return Choice(kind, name, settings, partial(whisper, config, kind == "lora", "gradient_checkpointing" in settings))


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


def whisper(config: WhisperConfig, adapters: bool, checkpointing: bool, device: str = "meta") -> Traceable:
    """A Whisper with adapters of rank 16 in its attention, or trained whole, and its loss on so many examples."""
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperForConditionalGeneration

    frames = 2 * config.max_source_positions
    with torch.device(device):
        model: Any = WhisperForConditionalGeneration(config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if adapters:
            model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))

    def loss(examples: int) -> torch.Tensor:
        with torch.device(device):
            ids = torch.zeros(examples, CLIP_TOKENS, dtype=torch.int64)
            batch = Batch(torch.zeros(examples, config.num_mel_bins, frames), ids, ids)
        return summed_loss(model, batch)

    return model, loss
