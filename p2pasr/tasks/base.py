"""What a task is: the four things a peer asks of whatever it trains.

Training is a pure function. A segment takes the parameters, the inner optimizer's moments, the
shards and a seed, and returns the next parameters and moments; the same inputs on the same hardware
give the same bits, so that another peer can re-run it. Nothing is remembered between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from p2pasr.errors import Reject
from p2pasr.protocol.assignment import segment_seed
from p2pasr.protocol.manifest import RoundSection
from p2pasr.protocol.tensors import Tensors, tensor_pieces, unpack_tensors

CHECKPOINT_FORMAT = "p2pasr-checkpoint/1"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that training continues from.

    Attributes:
        params: name → float32, the trained parameters.
        moments: name → array, the inner optimizer's state; empty at the start of a round.
        step: optimizer steps taken since the start of the round.
    """

    params: Tensors
    moments: Tensors = field(default_factory=dict)
    step: int = 0

    @property
    def pieces(self) -> tuple[bytes | memoryview, ...]:
        """The canonical bytes, whose digest a trace commits to, in pieces, without a copy of the arrays."""
        tensors = {f"param/{name}": value for name, value in self.params.items()}
        tensors |= {f"moment/{name}": value for name, value in self.moments.items()}
        return tensor_pieces(tensors, {"format": CHECKPOINT_FORMAT, "step": self.step})

    def pack(self) -> bytes:
        """The canonical bytes."""
        return b"".join(self.pieces)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Checkpoint:
        """Read what :meth:`pack` wrote.

        Raises:
            Reject: the bytes are no canonical checkpoint.
        """
        tensors, meta = unpack_tensors(data)
        step = meta.get("step")
        if meta != {"format": CHECKPOINT_FORMAT, "step": step} or type(step) is not int or step < 0:
            raise Reject("a checkpoint's description is malformed")
        if not all(name.startswith(("param/", "moment/")) for name in tensors):
            raise Reject("a checkpoint holds arrays that are neither parameters nor moments")
        return cls(
            params={k.removeprefix("param/"): v for k, v in tensors.items() if k.startswith("param/")},
            moments={k.removeprefix("moment/"): v for k, v in tensors.items() if k.startswith("moment/")},
            step=step,
        )


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """How one segment is trained.

    Attributes:
        seed: 32 bytes from which every random number of the segment follows.
        steps: optimizer steps.
        samples_per_step: examples in each step.
        first_step: where the segment stands in the run, for the learning rate's schedule.
        total_steps: steps of the whole run.
    """

    seed: bytes
    steps: int
    samples_per_step: int
    first_step: int
    total_steps: int

    @classmethod
    def of(cls, rounds: RoundSection, round_number: int, state: bytes, peer: str, segment: int) -> SegmentPlan:
        """How a peer trains one segment of a round, and how anybody trains it again.

        Args:
            state: digest of the state that the round starts from.
        """
        return cls(
            seed=segment_seed(state, peer, segment),
            steps=rounds.steps_per_segment,
            samples_per_step=rounds.samples_per_step,
            first_step=(round_number * rounds.segments + segment) * rounds.steps_per_segment,
            total_steps=rounds.rounds * rounds.segments * rounds.steps_per_segment,
        )


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """What a segment did: mean loss over its steps, examples seen."""

    loss: float
    samples: int


OnStep = Callable[[int, float], None]
"""Called after every step with (steps done in the segment, loss)."""


OnProgress = Callable[[int, int], None]
"""Called with (items done, items in all)."""


@runtime_checkable
class Task(Protocol):
    """What a peer can train. `build` in this package makes one from a manifest."""

    def initial_params(self) -> Tensors:
        """The parameters before round 0: a pure function of configuration and seed, equal bits everywhere."""

    def segment(
        self, start: Checkpoint, shards: Sequence[Path], plan: SegmentPlan, on_step: OnStep | None = None
    ) -> tuple[Checkpoint, SegmentReport]:
        """Train one segment.

        Raises:
            NonFiniteStep: a loss or gradient was NaN or infinite.
        """

    def evaluate(
        self, params: Tensors | None, shards: Sequence[Path], on_progress: OnProgress | None = None
    ) -> Mapping[str, Any]:
        """Score parameters on held-out shards in the task's own metric; None scores the untrained base."""

    def export(self, params: Tensors, out: Path, about: Mapping[str, Any]) -> None:
        """Write the trained model for others to load, with `about` (run, round, …) beside it."""

    @property
    def hardware_class(self) -> str:
        """Device, library builds, instruction set, precision and threads: equal classes give equal bits."""


@runtime_checkable
class Bounded(Protocol):
    """What a task may offer besides: how far its optimizer can move a value. Peers refuse parts that went further."""

    def largest_move(self, params: Tensors, first_step: int, steps: int, total_steps: int) -> float:
        """The most that any value can be from where it was after the first steps of a round.

        A function of its arguments and the task's configuration only, for all peers compute it.

        Args:
            params: the parameters before the round.
            first_step, total_steps: as in :class:`SegmentPlan`, of the round's first segment.
            steps: optimizer steps since the start of the round.

        Returns:
            A distance, with what rounding the parameters adds to it; infinity where there is no bound.
        """


@runtime_checkable
class Probed(Protocol):
    """What a task may offer besides, and must where shards are private: the loss that it trains, of any parameters."""

    def probe_loss(self, params: Tensors, shards: Sequence[Path]) -> float:
        """The mean training loss of parameters on shards that are not trained on, without dropout or any other chance.

        Nothing is learned from it, so that equal inputs give equal bits on equal hardware, and nearly so on other.

        Args:
            params: name → float32, finite; a stranger's.

        Returns:
            At least 0; infinite or NaN where the parameters are of no use.
        """
