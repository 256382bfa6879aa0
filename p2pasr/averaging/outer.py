"""The outer optimizer: how the averaged delta moves the shared parameters.

Element-wise numpy in float32, one operation at a time: IEEE multiplication and addition round once
and give the same bits on every machine, which fused operations and reordered reductions do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from p2pasr.protocol.manifest import OuterSection
from p2pasr.protocol.tensors import Tensors

Array = npt.NDArray[Any]


def step(
    params: Tensors, moments: Tensors, delta: Mapping[str, Array], outer: OuterSection, round_number: int
) -> tuple[Tensors, Tensors]:
    """One outer step, with the pseudo-gradient g = −Δ.

    * `fedavg` (McMahan et al. 2017): θ ← θ + lr · Δ.
    * `fedavgm` (Hsu et al. 2019): m ← μ m + g; θ ← θ − lr · m, as `torch.optim.SGD(momentum=μ)`.
    * `nesterov` (DiLoCo, Douillard et al. 2023): m ← μ m + g; θ ← θ − lr · (g + μ m), as
      `torch.optim.SGD(momentum=μ, nesterov=True)`.
    * `fedadam` (Reddi et al. 2021) with Adam's bias correction, as `torch.optim.Adam(betas=(μ, β₂))`.

    Args:
        params: θ before the round, name → float32.
        moments: what the last step returned, empty before the first; a reference among them is left out.
        delta: the averaged delta, same names and shapes as `params`; each array is asked for once.
        round_number: how many outer steps were made before.

    Returns:
        New parameters and moments; the inputs are not touched.
    """
    if outer.restarts(round_number, round_number):
        moments = {}
    if outer.restart_rounds is not None:
        round_number %= outer.restart_rounds
    if outer.kind == "fedavg":
        rate = np.float32(outer.learning_rate)
        return {name: _moved(params[name], rate, delta[name]) for name in params}, {}
    moved: Tensors = {}
    kept: Tensors = {}
    for name, theta in params.items():
        gradient = np.negative(delta[name])
        if outer.kind == "fedadam":
            change, first, second = _adam(
                gradient, moments.get(f"first/{name}"), moments.get(f"second/{name}"), outer, round_number
            )
            kept[f"first/{name}"], kept[f"second/{name}"] = first, second
        else:
            change, kept[name] = _momentum(gradient, moments.get(name), outer)
        moved[name] = theta - change
    return moved, kept


def _moved(theta: Array, rate: np.float32, delta: Array) -> Array:
    change: Array = np.asarray(np.multiply(rate, delta))
    np.add(theta, change, out=change)  # a large student's arrays are not copied more often than need be
    return change


def _momentum(gradient: Array, previous: Array | None, outer: OuterSection) -> tuple[Array, Array]:
    rate, momentum = np.float32(outer.learning_rate), np.float32(outer.momentum)
    buffer = gradient if previous is None else np.multiply(momentum, previous) + gradient
    ahead = buffer if outer.kind == "fedavgm" else gradient + np.multiply(momentum, buffer)
    return np.multiply(rate, ahead), buffer


def _adam(
    gradient: Array, first: Array | None, second: Array | None, outer: OuterSection, steps: int
) -> tuple[Array, Array, Array]:
    beta1, beta2 = outer.momentum, outer.beta2
    fresh1 = np.multiply(np.float32(1 - beta1), gradient)
    fresh2 = np.multiply(np.float32(1 - beta2), np.square(gradient))
    first = fresh1 if first is None else np.multiply(np.float32(beta1), first) + fresh1
    second = fresh2 if second is None else np.multiply(np.float32(beta2), second) + fresh2
    correction1, correction2 = 1 - _power(beta1, steps + 1), 1 - _power(beta2, steps + 1)
    scale = np.float32(sqrt(correction2))
    denominator = np.divide(np.sqrt(second), scale) + np.float32(outer.epsilon)
    change = np.multiply(np.float32(outer.learning_rate / correction1), np.divide(first, denominator))
    return change, first, second


def _power(base: float, exponent: int) -> float:
    """By multiplication: `pow` may differ in its last bit from one C library to the next."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
