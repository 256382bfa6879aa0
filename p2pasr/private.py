"""A peer's own shards: read from where they lie, in no blob store, named to nobody.

What leaves this machine of them is what training makes of them, the delta, and a claim that hides their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2pasr.errors import LocalError
from p2pasr.peers.blobs import BlobStore
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.tiers import trains
from p2pasr.speech.prepare import read_index, salt_of
from p2pasr.speech.shards import check_digest
from p2pasr.tasks.base import Probed, Task


@dataclass(frozen=True, slots=True)
class PrivateShards:
    """Prepared shards that stay here.

    Attributes:
        paths: digest of a shard → its file.
        seconds: digest of a shard → seconds of audio in it.
        longest: digest of a shard → seconds of its longest clip, of those that have clips.
        secret: 32 bytes that hide their names from others.
    """

    paths: Mapping[bytes, Path]
    seconds: Mapping[bytes, float]
    secret: bytes
    longest: Mapping[bytes, float] = field(default_factory=dict)


def open_private(folder: Path, store: BlobStore) -> PrivateShards:
    """A folder of prepared shards, each compared with its digest.

    Args:
        store: what others are served from.

    Raises:
        LocalError: there are no shards, one is missing or corrupt, or one lies in the store already.
    """
    index = read_index(folder)
    if not index.shards:
        raise LocalError(f"{folder} holds no shards: make them with p2pasr data prepare IN --out {folder}")
    paths = {bytes.fromhex(shard.digest): (folder / shard.file).resolve() for shard in index.shards}
    for digest, path in paths.items():
        check_digest(path, digest.hex())
        if store.find(digest) is not None:
            raise LocalError(
                f"the private shard {path} is given to others too: it is in --seed-data or in {store.root}; leave it "
                f"out there, or name another --state-dir"
            )
    seconds = {bytes.fromhex(shard.digest): shard.seconds for shard in index.shards}
    longest = {bytes.fromhex(shard.digest): shard.longest for shard in index.shards if shard.longest is not None}
    return PrivateShards(paths, seconds, salt_of(folder), longest)


def within(private: PrivateShards, tier: int) -> PrivateShards:
    """Those shards that a peer of a tier trains."""
    kept = {shard: path for shard, path in private.paths.items() if trains(tier, private.longest.get(shard))}
    return replace(private, paths=kept)


def check_use(private: PrivateShards | None, manifest: RunManifest) -> None:
    """Does the run train on private shards such as these, if there are any?

    Raises:
        LocalError: no.
    """
    if private is None:
        return
    if manifest.data.policy != "private":
        raise LocalError(
            "this run trains on shards that everybody can fetch and would not use --private-shards; leave it out, or "
            "start a run with data.policy: private"
        )
    for shard in manifest.shards:
        if (path := private.paths.get(bytes.fromhex(shard.digest))) is not None:
            raise LocalError(
                f"the private shard {path} belongs to the run's probe, which nobody trains on; leave its recordings "
                f"out of --private-shards"
            )


def require_shards(private: PrivateShards | None, manifest: RunManifest) -> None:
    """Is there something to train on?

    Raises:
        LocalError: the run trains on private shards, and none are named.
    """
    if manifest.data.policy == "private" and private is None:
        raise LocalError(
            "this run trains on recordings that stay at home; prepare yours with p2pasr data prepare and name the "
            "folder with --private-shards"
        )


def require_probed(task: Task) -> Probed:
    """The task, if it can say what a run with private shards needs.

    Raises:
        LocalError: it cannot.
    """
    if not isinstance(task, Probed):
        raise LocalError(
            f"a run with data.policy: private needs a task that says its loss on the probe, and "
            f"{type(task).__name__} has no probe_loss; see p2pasr.Probed"
        )
    return task
