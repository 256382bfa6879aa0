"""What a step costs, told before it is taken: memory and arithmetic of a module, traced without any data.

On torch's meta device tensors have shapes and no values, so that a step of a model of any size is
taken in seconds on any machine: what is held at once is counted, and so are multiplications.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from p2pasr.speech.pretrained import BITS

NF4_BLOCK: Final = 64
"""Values that share a scale, a float32, where a frozen base is stored in 4 bits (Dettmers et al. 2023)."""

ADAM_BYTES: Final = {"adamw": 8.0, "adamw8bit": 2.1}
"""Bytes of moments for a trained value."""

GRADIENT_BYTES: Final = 4.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What training a module takes.

    Attributes:
        weights: bytes of all parameters and buffers, as they are stored.
        trained: number of values that are trained.
        fixed, activations: bytes that a step holds besides at once, whatever it is given and for each example.
        flops: floating-point operations of a step, forward and backward, for one example.
    """

    weights: float
    trained: int
    fixed: float
    activations: float
    flops: float

    def memory(self, examples: int, optimizer: str = "adamw") -> float:
        """Bytes while so many examples go through the module at once: weights, gradients, moments and activations.

        Args:
            optimizer: a key of :data:`ADAM_BYTES`.
        """
        state = self.trained * (GRADIENT_BYTES + ADAM_BYTES[optimizer])
        return self.weights + state + self.fixed + examples * self.activations


@dataclass(frozen=True, slots=True)
class Step:
    """What one step took: bytes that were held at once, and floating-point operations in products and convolutions."""

    held: int
    flops: int


def trace(module: torch.nn.Module, loss: Callable[[int], torch.Tensor], most: int, precision: str = "fp32") -> Cost:
    """The cost of training a module, by example.

    A step of one example is traced and one of the most. What is held at once is the largest of sums that grow with the
    number of examples, so that between the two it is less than on the straight line that is returned.

    Args:
        module: on the meta device, in training mode.
        loss: makes that many examples and computes their loss.
        most: examples of the largest step.
        precision: "bf16" computes as torch's autocast does on accelerators.
    """
    taken = []
    for examples in sorted({1, most}):
        with torch.random.fork_rng(devices=[]), _Meta(precision) as meta:
            torch.default_generator.manual_seed(0)  # some losses draw how much a model hears
            step = take(module, partial(loss, examples))
        taken.append(Step(step.held, step.flops + meta.flops))
    slope = (taken[-1].held - taken[0].held) / max(most - 1, 1)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Cost(stored(module), trained, taken[0].held - slope, slope, taken[-1].flops / most)


def take(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    """Compute a loss and its gradients, and tell what they took besides what the module holds itself and its gradients.

    Args:
        module: all that the loss is computed with; its parameters have no gradients afterwards.
        loss: computes it.
    """
    hooks = [
        parameter.register_post_accumulate_grad_hook(_let_go)  # type: ignore[no-untyped-call]
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    try:
        with _Ledger(module) as ledger:
            torch.autograd.backward(loss())
    finally:
        for hook in hooks:
            hook.remove()
    return Step(ledger.most, ledger.flops)


def _let_go(parameter: torch.Tensor) -> None:
    parameter.grad = None


def stored(module: torch.nn.Module) -> float:
    """Bytes of parameters and buffers, with the scales of those in few bits; those that are tied count once."""
    return sum(map(_bytes, [*module.parameters(), *module.buffers()]))


def _bytes(tensor: torch.Tensor) -> float:
    scales = getattr(getattr(tensor, "quant_state", None), "absmax", getattr(tensor, "SCB", None))
    if scales is not None:
        return float(tensor.nbytes + scales.nbytes)
    bits = getattr(tensor, BITS, None)
    if bits == 4:
        return tensor.numel() * (0.5 + 4 / NF4_BLOCK)
    if bits == 8:
        return tensor.numel() + 4 * len(tensor)
    return float(tensor.nbytes)


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors from when they are made until nobody holds them, and arithmetic.

    Attributes:
        now, most: bytes that live, and that lived at once.
        flops: of products and convolutions.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.flops = 0
        self._device = next(module.parameters()).device
        own = [*module.parameters(), *module.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for value in (*args, out):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                    self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


class _Attention(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: its inputs, its output and a number for every query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, meta: _Meta) -> torch.Tensor:
        meta.attend(query, key, 1)
        ctx.meta = meta
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], device=query.device))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # noqa: ARG004 (their shapes are known)
        query, key, value = ctx.saved_tensors[:3]
        ctx.meta.attend(query, key, 2)
        return *(torch.empty_like(tensor) for tensor in (query, key, value)), None


class _Meta(TorchFunctionMode):
    """What the meta device lacks: fused attention, autocast, and the values that models branch on.

    Attributes:
        flops: of attention.
    """

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.flops = 0
        self._lower = precision == "bf16"

    def attend(self, query: torch.Tensor, key: torch.Tensor, passes: int) -> None:
        """Count attention; its backward pass takes as much arithmetic as two forward ones."""
        self.flops += passes * 4 * query.numel() * key.shape[-2]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return True  # transformers asks whether nothing was packed
        if func is torch.autograd.backward:
            return self._backward(*args[0])
        attends = func is functional.scaled_dot_product_attention
        if self._lower and (attends or func in _LOWER or func in _FULL):
            dtype = torch.float32 if func in _FULL else torch.bfloat16
            args, kwargs = _cast(args, dtype), _cast(kwargs or {}, dtype)
        if not attends:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3] if len(args) > 2 else (kwargs[name] for name in ("query", "key", "value"))
        return _Attention.apply(query, key, value, self)  # type: ignore[no-untyped-call]

    def _backward(self, loss: torch.Tensor) -> None:
        """The backward pass with this mode on, for what is computed again in it: torch turns it off in its own."""
        engine: Any = torch.autograd.Variable._execution_engine
        with self:
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)


_LOWER: Final = {
    *(functional.linear, functional.conv1d, functional.conv2d, torch.conv1d, torch.conv2d),
    *(torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm),
}
"""What autocast computes in bfloat16; how much of the list our models need."""

_FULL: Final = {
    *(functional.softmax, torch.softmax, torch.Tensor.softmax, functional.layer_norm, functional.cross_entropy),
    *(functional.log_softmax, torch.log_softmax, torch.Tensor.log_softmax, functional.kl_div, functional.nll_loss),
}
"""What it computes in float32, likewise."""


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another precision."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(cast, values)
