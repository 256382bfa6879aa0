"""The probe: what a claim's delta alone does to the loss on recordings that everybody has.

Where shards are private nobody can train a segment again. What can be seen is what came of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Final, Literal

from p2pasr.averaging.codec import Decoded, Layout
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.state import State
from p2pasr.protocol.tensors import Tensors

ProbeLoss = Callable[[Tensors], float]
"""The task's mean loss of parameters on the run's probe."""

SLACK: Final = 1e-3
"""How far other hardware may be from this in a loss, relative to the loss and one."""

LEAST_LOSS: Final = 0.1
"""The margin is a share of the loss, and of this where the loss is smaller: little may not become nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A delta on the probe.

    Attributes:
        before: the loss of the state that it starts from.
        after: the loss with the whole of the delta added, as no average would.
        limit: the most that the manifest allows.
    """

    before: float
    after: float
    limit: float

    @property
    def is_proof(self) -> bool:
        """Whether the loss with the delta is beyond the limit; a loss that is no number is."""
        return isfinite(self.before) and not self.after <= self.limit

    @property
    def finding(self) -> Literal["close", "unclear", "different"]:
        """What an auditor makes of it: beyond the limit, but no further than others may measure less, it is unclear."""
        if not self.is_proof:
            return "close"
        return "unclear" if self.after <= self.limit + SLACK * (1 + self.before) else "different"

    @property
    def rise(self) -> float:
        """By what share of it the loss has risen; negative where it has fallen."""
        return self.after / self.before - 1 if self.before > 0 else float("inf")

    def __str__(self) -> str:
        return f"takes the loss on the probe from {self.before:.4f} to {self.after:.4f}, the limit is {self.limit:.4f}"


def measure(state: State, delta: bytes, manifest: RunManifest, loss: ProbeLoss) -> Measured:
    """What a delta does on the probe.

    Args:
        state: the one that it starts from.
        delta: encoded, all parts in order.

    Raises:
        Reject: it cannot be decoded.
    """
    decoded = Decoded(delta, Layout.of(manifest.parameters, manifest.averaging), state.params)
    after = {name: value + decoded[name] for name, value in state.params.items()}
    before = loss(state.params)
    return Measured(before, loss(after), before + manifest.data.probe_margin * max(before, LEAST_LOSS))
