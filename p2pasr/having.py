"""Having shards: fetching those that are missing, and offering to others those that are here."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Final

from p2pasr.errors import TransportError
from p2pasr.peers.blobs import file_digest
from p2pasr.waits import within

if TYPE_CHECKING:
    from p2pasr.member import Member

SHARD_SECONDS: Final = 600.0
"""How long one shard may take."""


def fetch_shards(member: Member, shards: Sequence[bytes], until: float = inf) -> None:
    """Get the shards that are not here, and offer them to others from then on.

    Args:
        until: when waiting for them ends at the latest, as `time.monotonic` counts.
    """
    sizes = {ref.digest: ref.bytes for ref in member.manifest.shards}
    missing = [shard for shard in shards if not is_whole(member, shard)]
    for done, shard in enumerate(missing):
        member.report.progress("fetching shards", done, len(missing))
        size = sizes[shard.hex()]
        seconds = within(SHARD_SECONDS, until)
        member.link.call("fetch", seconds, digest=shard, kind="shard", max_bytes=size, peers=())
    if missing:
        member.report.progress("fetching shards", len(missing), len(missing))
        provide(member)


def is_whole(member: Member, shard: bytes) -> bool:
    """Whether a shard is here and undamaged; its bytes are read once a process."""
    path = member.store.find(shard)
    if path is not None and shard not in member.whole and file_digest(path) != shard:
        member.report.warn(f"{path} was damaged on disk and is fetched again")
        member.store.discard(shard)
        path = None
    if path is not None:
        member.whole.add(shard)
    return path is not None


def provide(member: Member) -> None:
    """Tell the directory which blobs of general interest can be had here."""
    held = [bytes.fromhex(ref.digest) for ref in member.manifest.shards]
    held = [shard for shard in held if member.store.find(shard) is not None]
    member.link.call("provide", 10.0, digests=[member.state.run, *held])


def shard_path(member: Member, shard: bytes) -> Path:
    """Where a shard to train or measure on lies.

    Raises:
        TransportError: it was there and is gone; the next attempt fetches it again.
    """
    if member.private is not None and shard in member.private.paths:
        return member.private.paths[shard]
    path = member.store.find(shard)
    if path is None:
        raise TransportError(f"shard {shard.hex()[:12]}… has vanished from {member.store.root}")
    return path
