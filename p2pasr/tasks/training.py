"""Gradient descent as a pure function of parameters, moments, examples and a seed: what most tasks are made of.

A task that trains a torch module by AdamW says what its examples are and what each of them loses;
batches, accumulation, clipping, the schedule, moments and their place in checkpoints are here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from p2pasr.errors import LocalError, NonFiniteStep
from p2pasr.protocol.tensors import Tensors
from p2pasr.tasks.base import Checkpoint, OnStep, SegmentPlan, SegmentReport
from p2pasr.tasks.determinism import hardware_class, reproducible, sample_batches, uniform
from p2pasr.tasks.envelope import adamw_reach

E = TypeVar("E")

PROBE_EXAMPLES = 16
"""Examples of a probe that go through the model at once, at most."""

_log = logging.getLogger(__name__)


class TrainingConfig(BaseModel):
    """What the `task.config` sections of all such tasks share."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """AdamW's, at its highest: it falls from there to zero by a cosine over the run."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps over which the learning rate grows from zero at the run's beginning."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decoupled, for all that is trained."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the mean squared gradient."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm to which longer gradients are cut."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """With moments in float32, or in 8 bits through bitsandbytes."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of what autocast computes; weights and moments stay float32."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Examples that go through the model at once; gradients of a step are summed over them."""


class GradientTask(Generic[E]):
    """The training half of :class:`p2pasr.tasks.base.Task`, and its `Bounded` and `Probed`.

    Whoever inherits sets the attributes and implements :meth:`examples`, :meth:`weight` and :meth:`loss`.

    Attributes:
        config: the task's section of the manifest.
        seed: the run's seed.
        device: where it trains.
        model: the module, in float32 where it is trained.
        trained: name → parameter, ascending: what checkpoints hold and peers average.
        draws: whether :meth:`loss` draws random numbers, besides those by which torch's own layers drop out.
        most_at_once: examples that memory had room for when it ran out; None while it never did.
    """

    config: TrainingConfig
    seed: int
    device: torch.device
    model: Any
    trained: dict[str, torch.nn.Parameter]
    draws: bool = False
    most_at_once: int | None = None

    def initial_params(self) -> Tensors:
        """See :meth:`p2pasr.tasks.base.Task.initial_params`."""
        raise NotImplementedError

    def examples(self, shards: Sequence[Path]) -> Sequence[E]:
        """What the shards hold for this task, in an order that follows from them.

        Raises:
            LocalError: a shard is none of this task's.
        """
        raise NotImplementedError

    def weight(self, example: E) -> float:
        """What an example counts for in a step's mean loss, such as its number of tokens."""
        raise NotImplementedError

    def loss(self, examples: Sequence[E]) -> torch.Tensor:
        """Summed loss of some examples, a float32 scalar; random numbers are torch's, seeded for the segment."""
        raise NotImplementedError

    def example_of(self, seconds: float) -> E | None:  # noqa: ARG002 (tasks that override it use it)
        """A silent example with a clip of this length, by whose cost memory is planned.

        None where it does not follow from the clip's length, as in models that pad all clips alike.
        """
        return None

    def before_step(self, step: int, total: int) -> None:
        """Set what else follows from where a step stands in the run, as the learning rate does; nothing here.

        Args:
            step, total: as for :func:`learning_rate`.
        """

    @property
    def hardware_class(self) -> str:
        """See :attr:`p2pasr.tasks.base.Task.hardware_class`."""
        return hardware_class(self.device, self.config.precision)

    def segment(
        self, start: Checkpoint, shards: Sequence[Path], plan: SegmentPlan, on_step: OnStep | None = None
    ) -> tuple[Checkpoint, SegmentReport]:
        """See :meth:`p2pasr.tasks.base.Task.segment`."""
        examples = self.examples(shards)
        batches = sample_batches(len(examples), plan.samples_per_step, plan.seed)
        losses: list[float] = []
        with reproducible(plan.seed, self.device):
            self.set_params(start.params)
            optimizer = self._optimizer(start)
            self.model.train()
            for index in range(plan.steps):
                rate = learning_rate(self.config, plan.first_step + index, plan.total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                self.before_step(plan.first_step + index, plan.total_steps)
                losses.append(self._step(optimizer, [examples[i] for i in next(batches)]))
                if on_step is not None:
                    on_step(index + 1, losses[-1])
        end = Checkpoint(self.get_params(), _moments(optimizer, self.trained), start.step + plan.steps)
        if not all(np.isfinite(value).all() for value in end.params.values()):
            raise NonFiniteStep(f"parameters became NaN or infinite by step {end.step} of the round")
        return end, SegmentReport(float(np.mean(losses)), plan.steps * plan.samples_per_step)

    def largest_move(self, params: Tensors, first_step: int, steps: int, total_steps: int) -> float:
        """See :meth:`p2pasr.tasks.base.Bounded.largest_move`.

        `adamw8bit` has no bound: a second moment that it rounds to zero leaves only ε below the first.
        """
        config = self.config
        if config.optimizer == "adamw8bit":
            return math.inf
        rates = (learning_rate(config, first_step + index, total_steps) for index in range(steps))
        largest = max(float(np.abs(value).max()) for value in params.values())
        return adamw_reach(rates, config.beta1, config.beta2, config.weight_decay, largest)

    def probe_loss(self, params: Tensors, shards: Sequence[Path]) -> float:
        """See :meth:`p2pasr.tasks.base.Probed.probe_loss`: summed loss by summed weight, such as nats a token."""
        examples = self.examples(shards)
        size = self._at_once(PROBE_EXAMPLES)
        total = 0.0
        with reproducible(bytes(32), self.device):
            self.set_params(params)
            self.model.eval()
            for start in range(0, len(examples), size):
                with torch.inference_mode(), self.autocast():
                    total += float(self.loss(examples[start : start + size]))
        return total / sum(map(self.weight, examples))

    def set_params(self, params: Tensors) -> None:
        """Put parameters into the model."""
        with torch.no_grad():
            for name, value in params.items():
                self.trained[name].copy_(torch.from_numpy(np.array(value)))

    def get_params(self) -> Tensors:
        """A copy of the trained parameters, float32; of those on the meta device there is none."""
        valued = {name: p.detach() for name, p in self.trained.items() if not p.is_meta}
        return {name: p.to("cpu", torch.float32).numpy().copy() for name, p in valued.items()}

    def autocast(self) -> Any:
        """The context in which the model computes, by the configured precision."""
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _step(self, optimizer: torch.optim.Optimizer, examples: list[E]) -> float:
        drawn = torch.get_rng_state()
        try:
            total = self._accumulate(optimizer, examples)
        except torch.OutOfMemoryError as error:
            self._take_fewer(len(examples), error)
            torch.set_rng_state(drawn)  # of what SpecAugment hides, one example after another
            return self._step(optimizer, examples)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm)
        loss = total / sum(map(self.weight, examples))
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            raise NonFiniteStep(f"the loss is {loss} and the gradient's norm {float(norm)}: nothing of it is published")
        optimizer.step()
        return loss

    def _accumulate(self, optimizer: torch.optim.Optimizer, examples: list[E]) -> float:
        """Sum gradients over pieces of a batch; returns its summed loss."""
        size = self._at_once(len(examples))
        weight = sum(map(self.weight, examples))
        total = 0.0
        optimizer.zero_grad(set_to_none=True)  # first, for a step that failed may have left some
        for start in range(0, len(examples), size):
            with self.autocast():
                summed = self.loss(examples[start : start + size])
            torch.autograd.backward(summed / weight)
            total += float(summed.detach())
        return total

    def _at_once(self, examples: int) -> int:
        """How many examples of a batch go through the model together."""
        return min(limit for limit in (examples, self.config.micro_batch, self.most_at_once) if limit is not None)

    def drops_out(self) -> bool:
        """Whether the model or its loss draws for what goes through them together."""
        drops = self.draws or any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.model.modules())
        return drops or float(getattr(getattr(self.model, "config", None), "dropout", 0.0)) > 0

    def _take_fewer(self, examples: int, error: Exception) -> None:
        """Memory ran out: let half as many examples through the model at once from now on.

        Gradients are summed over the pieces, so that nothing else changes and audits find the step
        `close`. Not where the model drops out or its loss draws: what is drawn follows from the pieces.

        Raises:
            LocalError: it does, or one example is too many.
        """
        size = self._at_once(examples)
        if size == 1:
            raise LocalError("not even one example fits this device's memory; p2pasr plan says what does") from error
        if self.drops_out():
            raise LocalError(
                f"{size} examples at once do not fit the memory of this device, and what is drawn at random "
                f"would be other in smaller pieces: start the run with task.config.micro_batch: {size // 2}"
            ) from error
        self.most_at_once = size // 2
        _log.warning("%d examples at once do not fit the memory of this device; %d do from now on", size, size // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _optimizer(self, start: Checkpoint) -> torch.optim.Optimizer:
        config = self.config
        betas = (config.beta1, config.beta2)
        options: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "weight_decay": config.weight_decay}
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            optimizer = AdamW8bit(list(self.trained.values()), **options)
        else:
            optimizer = torch.optim.AdamW(list(self.trained.values()), fused=True, **options)
        _restore_moments(optimizer, self.trained, start)
        return optimizer


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to zero at the run's last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a module that take gradients, by name, ascending; those that are tied once."""
    return dict(sorted((name, p) for name, p in model.named_parameters() if p.requires_grad))


def fresh_params(trained: Mapping[str, torch.nn.Parameter], key: bytes) -> Tensors:
    """Parameters to start from where nothing was trained yet: equal bits on every machine.

    Matrices and kernels are uniform with the variance 1/fan-in (LeCun et al. 1998); of the vectors,
    weights scale and start at one, all others shift and start at zero.

    Args:
        trained: name → parameter of a module that was just made; those on the meta device are left out.
        key: what the draw follows from.
    """
    out: Tensors = {}
    for name, parameter in trained.items():
        if parameter.is_meta:
            continue
        shape = tuple(parameter.shape)
        if len(shape) > 1:
            out[name] = uniform(shape, math.sqrt(3 / math.prod(shape[1:])), key + name.encode())
        else:
            out[name] = np.full(shape, 1 if name.endswith("weight") else 0, dtype=np.float32)
    return out


def _moments(optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """The optimizer's state as named arrays; the step count is in the checkpoint already."""
    out: Tensors = {}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            if key != "step":
                out[f"{name}/{key}"] = value.detach().cpu().numpy().copy()
    return out


def _restore_moments(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.nn.Parameter], start: Checkpoint
) -> None:
    eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    by_parameter: dict[str, dict[str, Any]] = {}
    for full, value in start.moments.items():
        name, key = full.rsplit("/", 1)
        tensor = torch.from_numpy(np.array(value)).to(trained[name].device)
        by_parameter.setdefault(name, {})[key] = tensor
    for name, state in by_parameter.items():
        step = start.step if eight_bit else torch.tensor(float(start.step))
        optimizer.state[trained[name]] = {"step": step, **state}
