"""How far AdamW can move one coordinate, whatever its gradients are.

Write gₖ for the gradient k steps ago, so that step t of a fresh optimizer has seen g₀ … gₜ₋₁, and let all sums run
over these. Without ε, which only makes a step smaller, the step is the learning rate times

    m̂ / √v̂    with    m̂ = (1 − β₁) Σ β₁ᵏ gₖ / (1 − β₁ᵗ)    and    v̂ = (1 − β₂) Σ β₂ᵏ gₖ² / (1 − β₂ᵗ).

β₁ᵏ gₖ is the product of β₁ᵏ β₂^(−k/2) and β₂^(k/2) gₖ, so that the Cauchy–Schwarz inequality gives
(Σ β₁ᵏ gₖ)² ≤ Σ (β₁²/β₂)ᵏ · Σ β₂ᵏ gₖ². The last factor is that of v̂, and what is left is

    |m̂| / √v̂  ≤  Rₜ  =  (1 − β₁) / (1 − β₁ᵗ) · √( (1 − β₂ᵗ) / (1 − β₂) · Σ (β₁²/β₂)ᵏ ).

R₁ is 1. For β₁² < β₂ it tends to (1 − β₁) / √( (1 − β₂)(1 − β₁²/β₂) ), which is 7.27 at 0.9 and 0.999; otherwise it
grows without end. Both sides are equal where gₖ ∝ (β₁/β₂)ᵏ: gradients of one sign that change by β₂/β₁ from step to
step reach every Rₜ one after the other, so that the bound of a whole round cannot be made smaller either. What Kingma
and Ba (2015, section 2.1) give, (1 − β₁) / √(1 − β₂) or 3.16 there, is the step of one gradient after many zeros;
gradients that grow exceed it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

ROUNDING: Final = 2.0**-22
"""What float32 can add to a parameter in one step, relative to it: the factor of the decay, its product and the
difference are each rounded, by at most 2⁻²⁴."""


def largest_ratios(beta1: float, beta2: float) -> Iterator[float]:
    """R₁, R₂, …: the most that a fresh AdamW can move a coordinate in each step, in learning rates.

    Args:
        beta1, beta2: decay of the moments, at least 0 and below 1. Where `beta2` is 0 and `beta1` is not, nothing
            bounds a step after the first.
    """
    shrink = beta1**2 / beta2 if beta2 > 0 else math.inf if beta1 > 0 else 0.0
    decay1 = decay2 = term = 1.0
    total = 0.0
    while True:
        decay1 *= beta1
        decay2 *= beta2
        total += term
        term *= shrink
        yield (1 - beta1) / (1 - decay1) * math.sqrt((1 - decay2) / (1 - beta2) * total)


def adamw_reach(rates: Iterable[float], beta1: float, beta2: float, weight_decay: float, largest: float) -> float:
    """The most that any coordinate can be from where it was after these steps of a fresh AdamW, in float32.

    Decoupled decay (Loshchilov and Hutter 2019) takes θ to (1 − lr · wd) θ before each step, and so a coordinate that
    has moved by d from θ₀ to (1 − lr · wd) d − lr · wd · θ₀.

    Args:
        rates: the learning rate of each step; times `weight_decay` at most 1.
        beta1, beta2: as for :func:`largest_ratios`.
        weight_decay: AdamW's.
        largest: the largest magnitude among the parameters before the first step.

    Returns:
        A distance, infinite where there is no bound. The rounding of the parameters is in it, that of the moments
        is not.
    """
    moved = 0.0
    for rate, ratio in zip(rates, largest_ratios(beta1, beta2), strict=False):
        if math.isinf(ratio):
            return math.inf
        shrink = rate * weight_decay
        moved = (1 - shrink) * moved + shrink * largest + rate * ratio
        moved += ROUNDING * (largest + moved)
    return moved
