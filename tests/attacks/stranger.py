"""Checks a proof with the manifest and the shards alone: `python -m tests.attacks.stranger MANIFEST SHARDS PROOF`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from p2pasr.private import require_probed
from p2pasr.protocol.manifest import RunManifest, read_manifest
from p2pasr.protocol.messages import Claim
from p2pasr.protocol.state import State
from p2pasr.protocol.tensors import Tensors
from p2pasr.rerunning import train_segment
from p2pasr.runs import build_task
from p2pasr.speech.prepare import read_index
from p2pasr.tasks.base import Task
from p2pasr.verify.evidence import Judge, unpack_proof


def verdict(manifest: RunManifest, task: Task, shards: Mapping[bytes, Path], packed: bytes) -> str:
    """What a proof proves; its own bytes hold all that its accused signed and committed to.

    Raises:
        P2pasrError: nothing.
    """

    def rerun(claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
        paths = [shards[shard] for shard in claim.shards]
        return train_segment(task, manifest, claim, segment, before, start, paths, None)

    def probe_loss(params: Tensors) -> float:
        paths = [shards[bytes.fromhex(shard.digest)] for shard in manifest.shards]
        return require_probed(task).probe_loss(params, paths)

    return unpack_proof(packed).check(Judge(manifest, task.initial_params(), rerun, probe_loss))


if __name__ == "__main__":
    run, folder = read_manifest(Path(sys.argv[1])), Path(sys.argv[2])
    files = {bytes.fromhex(shard.digest): folder / shard.file for shard in read_index(folder).shards}
    print(verdict(run, build_task(run), files, Path(sys.argv[3]).read_bytes()))
