"""Doing again what a claim says was done: training a segment, computing a loss on the probe."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Final

from p2pasr.averaging.codec import Layout
from p2pasr.errors import LocalError, NonFiniteStep, Reject
from p2pasr.having import fetch_shards, shard_path
from p2pasr.peers.blobs import Kind
from p2pasr.private import require_probed
from p2pasr.protocol.encoding import MEBIBYTE
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import Claim
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State, max_state_bytes
from p2pasr.protocol.tensors import Tensors, forms
from p2pasr.tasks.base import Checkpoint, OnStep, SegmentPlan, Task
from p2pasr.verify.evidence import MAX_PROOF_BYTES, Judge
from p2pasr.waits import within

if TYPE_CHECKING:
    from p2pasr.member import Member

BLOB_SECONDS: Final = 600.0
"""How long a checkpoint or a proof may take."""


def train_again(
    member: Member, claim: Claim, segment: int, before: State, start: bytes | None, until: float = inf
) -> bytes:
    """One segment of a claim, trained here.

    Args:
        before: the state that the claim starts from.
        start: the packed checkpoint before it; None for the first.
        until: when waiting for its shards ends at the latest, as `time.monotonic` counts.

    Returns:
        The packed checkpoint at its end.

    Raises:
        LocalError: this peer's memory is not enough for its shards.
    """
    if not member.can_train(claim):
        raise LocalError(f"the shards of {short(claim.peer)} have clips of more than {member.tier} s")
    fetch_shards(member, claim.shards, until)
    paths = [shard_path(member, shard) for shard in claim.shards]
    return train_segment(member.task, member.manifest, claim, segment, before, start, paths, None)


def train_segment(
    task: Task,
    manifest: RunManifest,
    claim: Claim,
    segment: int,
    before: State,
    start: bytes | None,
    shards: Sequence[Any],
    on_step: OnStep | None,
) -> bytes:
    """The packed checkpoint at the end of one segment of a claim, by the task itself.

    Raises:
        Reject: the task cannot go on from the checkpoint that the claim's author committed to, or a step was not
            finite, after which nobody claims anything.
    """
    begin = Checkpoint(before.params) if start is None else Checkpoint.unpack(start)
    if forms(begin.params) != forms(before.params):
        raise Reject(f"the checkpoint before segment {segment + 1} holds other parameters than this run trains")
    plan = SegmentPlan.of(manifest.rounds, claim.round, claim.state, claim.peer, segment)
    try:
        end, _ = task.segment(begin, shards, plan, on_step)
    except NonFiniteStep as error:
        raise Reject(f"segment {segment + 1}, trained again, comes to no end: {error}") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if start is None:
            raise
        raise Reject(
            f"segment {segment + 1} cannot be trained from the checkpoint before it ({type(error).__name__})"
        ) from error  # its moments are a stranger's
    return end.pack()


def judge_of(member: Member, until: float = inf) -> Judge:
    """What this peer checks proofs with.

    Args:
        until: when waiting for shards ends at the latest, as `time.monotonic` counts.
    """

    def rerun(claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
        return train_again(member, claim, segment, before, start, until)

    return Judge(member.manifest, member.like, rerun, lambda params: probe_loss(member, params, until))


def probe_loss(member: Member, params: Tensors, until: float = inf) -> float:
    """The task's loss of parameters on the run's probe.

    Args:
        until: when waiting for the probe's shards ends at the latest, as `time.monotonic` counts.

    Raises:
        LocalError: the task has none.
    """
    shards = [bytes.fromhex(shard.digest) for shard in member.manifest.shards]
    fetch_shards(member, shards, until)
    return require_probed(member.task).probe_loss(params, [shard_path(member, shard) for shard in shards])


def fetch(member: Member, kind: Kind, digest: bytes, most: int, peer: str, until: float = inf) -> bytes:
    """A blob, from a peer that is said to have it."""
    member.link.call("fetch", within(BLOB_SECONDS, until), digest=digest, kind=kind, max_bytes=most, peers=[peer])
    return member.store.get(digest)


def max_checkpoint_bytes(manifest: RunManifest) -> int:
    """The longest blob that can be a checkpoint: parameters, at most three moments of four bytes, and a header."""
    return 4 * 4 * manifest.parameters + 16 * MEBIBYTE


def max_proof_bytes(manifest: RunManifest) -> int:
    """The longest blob that can be a proof: a state, two checkpoints or a part of each member, and statements."""
    layout = Layout.of(manifest.parameters, manifest.averaging)
    parts = manifest.averaging.max_group * layout.part_bytes(0)
    rest = max(2 * max_checkpoint_bytes(manifest), parts) + 4 * MEBIBYTE
    return min(MAX_PROOF_BYTES, max_state_bytes(manifest) + rest)
