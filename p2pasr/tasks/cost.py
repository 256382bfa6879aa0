"""What a step costs, told before it is taken: memory and arithmetic of a module, traced without any data.

On torch's meta device tensors have shapes and no values, so that a model of any size is traced in
seconds on any machine: what autograd would keep is counted, and so are multiplications.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

BASE_BYTES: Final = {"none": 4.0, "8bit": 1.06, "4bit": 0.56}
"""Bytes that a frozen value takes, with its share of the scales (LLM.int8 by rows; NF4 by blocks of 64)."""

ADAM_BYTES: Final = {"adamw": 8.0, "adamw8bit": 2.1}
"""Bytes of moments for a trained value."""

TRAINED_BYTES: Final = 8.0
"""A float32 and its gradient."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What training a module takes.

    Attributes:
        frozen, trained: numbers of values.
        activations: bytes that autograd keeps for one example.
        flops: floating-point operations of a step, forward and backward, for one example.
    """

    frozen: int
    trained: int
    activations: float
    flops: float

    def memory(self, examples: int, quantise: str = "none", optimizer: str = "adamw") -> float:
        """Bytes while so many examples go through the module at once.

        Args:
            quantise: how the frozen values are stored, a key of :data:`BASE_BYTES`.
            optimizer: a key of :data:`ADAM_BYTES`.
        """
        fixed = self.frozen * BASE_BYTES[quantise] + self.trained * (TRAINED_BYTES + ADAM_BYTES[optimizer])
        return fixed + examples * self.activations


def kept_by(forward: Callable[[], torch.Tensor], module: torch.nn.Module) -> int:
    """Bytes that autograd keeps from a forward pass until its backward pass, parameters aside.

    Args:
        forward: computes the loss.
    """
    sizes: dict[int, int] = {}
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    held = []  # a storage that is let go could lend its address to the next

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def trace(
    module: torch.nn.Module, loss: Callable[[int], torch.Tensor], examples: int = 4, *, recompute: bool = False
) -> Cost:
    """The cost of training a module, by example.

    A backward pass takes as much arithmetic as the forward one for what went in, as much again for the
    weights that are trained, and in attention twice as much.

    Args:
        module: on the meta device.
        loss: makes that many examples on the meta device and computes their loss.
        examples: how many are traced, so that what does not depend on their number weighs little.
        recompute: whether the forward pass is done again during the backward one.
    """
    module.train()
    counter = FlopCounterMode(display=False)
    with _Fused() as fused, counter:
        kept = kept_by(lambda: loss(examples), module)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in module.parameters())
    forward = counter.get_total_flops()
    flops = forward * (2 + trained / total + recompute) + fused.flops * (3 + recompute)
    return Cost(total - trained, trained, kept / examples, flops / examples)


class _Attention(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: its inputs, its output and a number for every query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], device=query.device))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # noqa: ARG004 (their shapes are known)
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Fused(TorchFunctionMode):
    """What the meta device lacks: attention as fused kernels do it, and the values that models branch on."""

    flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return True  # transformers asks whether nothing was packed
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3] if len(args) > 2 else (kwargs[name] for name in ("query", "key", "value"))
        self.flops += 4 * query.numel() * key.shape[-2]
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
