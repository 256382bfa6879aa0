"""The grey zone, settled in the canonical class: one CPU thread, float32, the plainest instructions.

A re-run between `verify.close` and `verify.far` can be honest rounding or a small cheat. Whatever its hardware, a peer
can train the segment once more in this class, which leaves out most of what honest results differ by. What comes of it
can clear a claim, and never proves anything against one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from p2pasr import runs, tasks
from p2pasr.calibration import HardwareClass
from p2pasr.errors import LocalError, P2pasrError
from p2pasr.having import shard_path
from p2pasr.protocol.encoding import pack, unpack
from p2pasr.protocol.manifest import RunManifest, parse_manifest
from p2pasr.protocol.messages import Claim
from p2pasr.protocol.signing import short
from p2pasr.protocol.state import State
from p2pasr.tasks.base import Checkpoint, SegmentPlan
from p2pasr.verify.compare import Comparison
from p2pasr.verify.evidence import compare_ends

if TYPE_CHECKING:
    from p2pasr.member import Member

CANONICAL: Final = HardwareClass("canonical", "cpu", threads=1, capability="default")
OURS: Final = "cpu/DEFAULT/1t/"
"""How the hardware class of a peer that trains in the canonical class begins."""


def settle(
    member: Member,
    before: State,
    claim: Claim,
    segment: int,
    start: bytes | None,
    claimed: bytes,
    rerun: bytes,
    found: Comparison,
) -> Comparison:
    """Train a segment of which the re-run is `unclear` in the canonical class, and report what comes of it.

    Args:
        before: the state that the claim starts from.
        start, claimed: packed checkpoints before and after the segment, as the claim's author committed to them;
            no start for the first segment.
        rerun: the packed checkpoint that was trained here.
        found: what comparing the two came to.

    Returns:
        `close`, with the error against the canonical result, or what was found before. Never `different`.
    """
    name = f"segment {segment + 1} of {short(claim.peer)}"
    began = time.monotonic()
    try:
        check_settles(member)
        begin = Checkpoint(before.params).pack() if start is None else start
        plan = SegmentPlan.of(member.manifest.rounds, claim.round, claim.state, claim.peer, segment)
        paths = [shard_path(member, shard) for shard in claim.shards]
        canonical = train_canonically(member.manifest, member.model, begin, paths, plan)
    except TimeoutError as error:
        member.settles = False
        member.report.warn(f"{name} stays unclear (relative error {found.error:.2e}): {error}")
        return found
    except LocalError as error:
        member.report.warn(f"{name} stays unclear (relative error {found.error:.2e}): {error}")
        return found
    theirs = compare_ends(before, start, claimed, canonical, member.manifest)
    ours = compare_ends(before, start, canonical, rerun, member.manifest)
    if theirs.finding in ("same", "close"):
        outcome, result = "the claim is close to it", Comparison("close", theirs.error)
    elif ours.finding in ("same", "close"):
        outcome, result = "this machine is close to it and the claim is not; nobody is blamed for so little", found
    else:
        outcome, result = "neither the claim nor this machine is close to it", found
    member.report.emit(
        "grey",
        f"{name}, trained again in the canonical class: {outcome} (relative errors {theirs.error:.2e} of the claim, "
        f"{ours.error:.2e} of this machine)",
        peer=claim.peer,
        item=segment,
        finding=result.finding,
        error=found.error,
        canonical_error=theirs.error,
        own_error=ours.error,
        seconds=round(time.monotonic() - began, 2),
    )
    return result


def check_settles(member: Member) -> None:
    """Can this peer train segments of its run in the canonical class, and would it learn anything by that?

    Raises:
        LocalError: no, and why.
    """
    task = member.manifest.task
    if task.kind not in tasks.KINDS:
        raise LocalError(f"a task of the kind {task.kind!r} cannot be built in a process of the canonical class")
    if task.config.get("precision") != "fp32" or task.config.get("quantise", "none") != "none":
        raise LocalError("only tasks in fp32 are trained again in the canonical class")
    if task.config.get("optimizer") == "adamw8bit":
        raise LocalError("adamw8bit needs a GPU, and the canonical class is a CPU")
    if member.task.hardware_class.startswith(OURS):
        raise LocalError("this machine trains in the canonical class already")
    if not member.settles:
        raise LocalError("segments of this size are trained on GPUs only: one took too long in the canonical class")


def train_canonically(
    manifest: RunManifest, model: str | None, begin: bytes, shards: Sequence[Path], plan: SegmentPlan
) -> bytes:
    """Train one segment in a process of the canonical class.

    Args:
        model: a local folder to load a pretrained base from, in place of the one that the manifest names.
        begin: packed checkpoint.

    Returns:
        The packed checkpoint at its end.

    Raises:
        TimeoutError: it takes longer than a round may.
        LocalError: the process failed.
    """
    request = {
        "manifest": manifest.canonical(),
        "model": model,
        "begin": begin,
        "shards": [str(path.resolve()) for path in shards],
        "plan": asdict(plan),
    }
    seconds = manifest.rounds.max_seconds
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": CANONICAL.capability or ""}
    with tempfile.TemporaryDirectory(prefix="p2pasr-canonical-") as name:
        asked, answered = Path(name) / "request", Path(name) / "end"
        command = [sys.executable, "-m", "p2pasr.canonical", str(asked), str(answered)]
        try:
            asked.write_bytes(pack(request))
            subprocess.run(command, env=environment, capture_output=True, timeout=seconds, check=True)
            return answered.read_bytes()
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"training it in the canonical class takes longer than {seconds:.0f} s") from None
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
            raise LocalError(f"its process of the canonical class ended ({words[-1]:.200})") from error
        except OSError as error:
            raise LocalError(f"a process of the canonical class cannot be started ({error.strerror})") from error


def main(asked: str, answered: str) -> None:
    """Train the segment of a request file, and write the packed checkpoint at its end."""
    import torch

    from p2pasr.speech.pretrained import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(CANONICAL.threads or 1)
    packed = Path(asked).read_bytes()
    request = unpack(packed, len(packed))
    task = runs.build_task(parse_manifest(request["manifest"]), CANONICAL.device, request["model"])
    shards = [Path(shard) for shard in request["shards"]]
    end, _ = task.segment(Checkpoint.unpack(request["begin"]), shards, SegmentPlan(**request["plan"]))
    Path(answered).write_bytes(end.pack())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except P2pasrError as error:
        sys.exit(str(error))
