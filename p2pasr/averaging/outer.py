"""The outer optimizer: how the averaged delta moves the shared parameters.

Element-wise numpy in float32, one operation at a time: IEEE multiplication and addition round once
and give the same bits on every machine, which fused operations and reordered reductions do not.
"""

from __future__ import annotations

import numpy as np

from p2pasr.protocol.manifest import OuterSection
from p2pasr.protocol.tensors import Tensors


def step(params: Tensors, moments: Tensors, delta: Tensors, outer: OuterSection) -> tuple[Tensors, Tensors]:
    """One outer step.

    `fedavg` (McMahan et al. 2017): θ ← θ + lr · Δ.

    `nesterov` (DiLoCo, Douillard et al. 2023): with the pseudo-gradient g = −Δ,
    m ← μ m + g; θ ← θ − lr · (g + μ m), as `torch.optim.SGD(nesterov=True)` computes it.

    Args:
        params: θ before the round, name → float32.
        moments: what the last step returned; empty before the first.
        delta: the averaged delta, same names and shapes as `params`.

    Returns:
        New parameters and moments; the inputs are not touched.
    """
    rate = np.float32(outer.learning_rate)
    if outer.kind == "fedavg":
        return {name: params[name] + np.multiply(rate, delta[name]) for name in params}, {}
    momentum = np.float32(outer.momentum)
    moved: Tensors = {}
    buffers: Tensors = {}
    for name, theta in params.items():
        gradient = np.negative(delta[name])
        previous = moments.get(name)
        buffer = gradient if previous is None else np.multiply(momentum, previous) + gradient
        ahead = gradient + np.multiply(momentum, buffer)
        moved[name] = theta - np.multiply(rate, ahead)
        buffers[name] = buffer
    return moved, buffers
