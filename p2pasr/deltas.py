"""What training changed, encoded for others, and whether they would take it."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Final

import numpy as np

from p2pasr.averaging.codec import Layout
from p2pasr.averaging.partfile import PartFile
from p2pasr.averaging.rules import norm
from p2pasr.errors import LocalError
from p2pasr.member import Member
from p2pasr.peers.blobs import file_digest
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.tensors import Tensors
from p2pasr.rerunning import probe_loss
from p2pasr.tasks.base import Bounded
from p2pasr.verify.probe import measure

SLACK: Final = 1.01
"""How much further than the task's bound a value may have moved: the optimizer's own arithmetic is rounded too."""

MAX_HALVINGS: Final = 8
"""How often a delta of private shards is made shorter before its peer gives up."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A delta in the blob store.

    Attributes:
        digest: the blob's.
        parts: digests of its parts.
        norm: L2 norm of the delta before it was encoded.
        largest: the largest magnitude in it, likewise.
    """

    digest: bytes
    parts: tuple[bytes, ...]
    norm: float
    largest: float


def write_delta(member: Member, start: Tensors, end: Tensors) -> Encoded:
    """Encode what training changed into a blob, part by part."""
    layout = Layout.of(member.manifest.parameters, member.manifest.averaging)
    digests: list[bytes] = []
    squares = largest = 0.0
    member.store.make_room(layout.total_bytes)
    path = member.store.scratch("delta")
    try:
        with PartFile(path, layout) as file:
            for index, vector in enumerate(layout.differences(start, end)):
                encoded = layout.codec.encode(vector)
                file.write(index, encoded)
                digests.append(blob_digest(encoded))
                squares += norm(vector) ** 2
                largest = max(largest, float(np.abs(vector).max()))
        delta = file_digest(path)
        member.store.commit(path, delta, "delta")
    finally:
        path.unlink(missing_ok=True)
    return Encoded(delta, tuple(digests), sqrt(squares), largest)


def write_private_delta(member: Member, start: Tensors, end: Tensors) -> Encoded:
    """The same for private shards: what others would take for poison on the probe is halved until they do not.

    An honest delta can go too far, for what one home records is not what the probe holds.

    Raises:
        LocalError: however short it is, it makes the loss on the probe too large.
    """
    for _ in range(MAX_HALVINGS):
        encoded = write_delta(member, start, end)
        delta = member.store.get(encoded.digest)
        measured = measure(member.state, delta, member.manifest, lambda params: probe_loss(member, params))
        if not measured.is_proof:
            return encoded
        member.report.warn(f"round {member.state.round}: the delta {measured}, so half of it is claimed")
        end = {name: start[name] + np.float32(0.5) * (end[name] - start[name]) for name in start}
    raise LocalError(
        f"round {member.state.round} was not claimed: even a small part of what was trained here makes the loss on the "
        f"probe too large; see whether transcripts fit their recordings, and whether the run's probe is of such speech"
    )


def check_moves(member: Member, largest: float, segments: int) -> None:
    """Would others take a delta whose largest magnitude is this?

    Raises:
        LocalError: a value moved further than the task says that its optimizer can move one.
    """
    limits = largest_values(member)
    if limits is not None and largest > limits[segments - 1]:
        raise LocalError(
            f"round {member.state.round} was trained wrongly: a value moved by {largest:.4g}, and by the task's "
            f"largest_move {segments} segments cannot move one by more than {limits[segments - 1]:.4g}, so that others "
            f"would refuse it; correct the task's segment or its largest_move"
        )


def largest_values(member: Member) -> tuple[float, ...] | None:
    """The most that a value of a decoded delta can be after 1, 2, … segments of the round.

    It follows from the state and the manifest, so that all peers have the same. None if the task states no bound.
    """
    task, rounds = member.task, member.manifest.rounds
    if not isinstance(task, Bounded):
        return None
    in_round = rounds.segments * rounds.steps_per_segment
    first, total = member.state.round * in_round, rounds.rounds * in_round
    counts = range(rounds.steps_per_segment, in_round + 1, rounds.steps_per_segment)
    moves = [task.largest_move(member.state.params, first, steps, total) for steps in counts]
    codec = Layout.of(member.manifest.parameters, member.manifest.averaging).codec
    return tuple(codec.ceiling(SLACK * move) for move in moves)
