"""The blob store: bytes on disk, named by their BLAKE3 digest, never there in part."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, get_args

from blake3 import blake3

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import blob_digest

Kind = Literal["manifest", "state", "shard", "checkpoint", "delta", "average", "record", "proof", "undo"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

EVICTABLE: Final[tuple[Kind, ...]] = ("average", "checkpoint", "shard")
"""What may go when the budget is used up, in this order, oldest first; all of it can be had again."""

GIBIBYTE: Final = 1 << 30


class BlobStore:
    """Content-addressed files under one folder; safe to use from two processes at once.

    A blob is written to a temporary name, synced and renamed, so a file under its final name is
    always whole. Files that lie elsewhere (a folder of prepared shards) can be lent to the store:
    they are served from where they are and never deleted.

    Args:
        root: the store's folder.
        budget_bytes: the most that the store keeps on disk; lent files do not count.
    """

    def __init__(self, root: Path, budget_bytes: int = 50 * GIBIBYTE) -> None:
        self.root = root
        self.budget_bytes = budget_bytes
        self._lent: dict[bytes, Path] = {}
        for kind in KINDS:
            (root / kind).mkdir(parents=True, exist_ok=True)
        (root / "partial").mkdir(exist_ok=True)

    def put(self, kind: Kind, *pieces: bytes | memoryview, durable: bool = True) -> bytes:
        """Store bytes, given whole or in pieces, and return their digest.

        Args:
            durable: sync the file, so that it also survives a power cut.

        Raises:
            LocalError: the disk or the budget is full.
        """
        digest = blob_digest(*pieces)
        if self.find(digest) is None:
            self.make_room(sum(map(len, pieces)))
            with self._writing(digest, kind, durable) as part, part.open("wb") as file:
                file.writelines(pieces)
        return digest

    @contextlib.contextmanager
    def _writing(self, digest: bytes, kind: Kind, durable: bool) -> Iterator[Path]:
        """A temporary path to write a blob to; it becomes the blob when the block ends without error."""
        part = self.scratch(digest.hex()[:16])
        try:
            with disk_errors(self.root):
                yield part
                self.commit(part, digest, kind, durable=durable)
        finally:
            part.unlink(missing_ok=True)

    def commit(self, part: Path, digest: bytes, kind: Kind, *, durable: bool = True) -> None:
        """Sync a finished file and give it its final name; the caller vouches for the digest."""
        if durable:
            sync(part)
        part.replace(self.root / kind / digest.hex())
        if durable:
            sync(self.root / kind)

    def lend(self, path: Path, digest: bytes, *, check: bool = True) -> None:
        """Serve a file that lies elsewhere.

        Args:
            check: compare its bytes with the digest; only a process that was told so may skip it.

        Raises:
            LocalError: it is missing, or its bytes do not have that digest.
        """
        if not path.is_file():
            raise LocalError(f"{path} is missing")
        if check and file_digest(path) != digest:
            raise LocalError(f"{path} is corrupt: its bytes do not have the digest {digest.hex()[:12]}…")
        self._lent[digest] = path

    def find(self, digest: bytes, only: Kind | None = None) -> Path | None:
        """Where a blob lies, or None.

        Args:
            only: the kind that is meant, of what the store owns; None for all of these and for lent files.
        """
        if only is None and (lent := self._lent.get(digest)) is not None and lent.is_file():
            return lent
        name = digest.hex()
        for kind in KINDS if only is None else (only,):
            path = self.root / kind / name
            if path.is_file():
                return path
        return None

    def get(self, digest: bytes) -> bytes:
        """A blob's bytes.

        Raises:
            LocalError: it is not here, or it is damaged: then it is deleted, or if it was lent, no longer used.
        """
        path = self.find(digest)
        if path is None:
            raise LocalError(f"the blob {digest.hex()[:12]}… is not in {self.root}")
        data = path.read_bytes()
        if blob_digest(data) == digest:
            return data
        self.discard(digest)
        if self._owns(path):
            raise LocalError(f"{path} was damaged on disk and has been removed; it will be fetched again")
        raise LocalError(f"{path} has changed since it was prepared and is no longer used; restore it")

    def touch(self, path: Path) -> None:
        """Note that a blob was asked for, so that others are evicted before it; lent files are left as they are."""
        if self._owns(path):
            os.utime(path)

    def discard(self, digest: bytes) -> None:
        """Forget a blob; lent files stay where they are."""
        self._lent.pop(digest, None)
        for kind in KINDS:
            (self.root / kind / digest.hex()).unlink(missing_ok=True)

    def retain(self, kind: Kind, keep: Collection[bytes]) -> int:
        """Delete blobs of a kind that are not in `keep`; returns how many went."""
        names = {digest.hex() for digest in keep}
        gone = [path for path in self._files(kind) if path.name not in names]
        _delete(gone)
        return len(gone)

    def holds(self, kind: Kind) -> list[bytes]:
        """Digests of the stored blobs of a kind."""
        return [bytes.fromhex(path.name) for path in self._files(kind)]

    def make_room(self, size: int) -> None:
        """See that `size` bytes fit, deleting the oldest evictable blobs if need be.

        Raises:
            LocalError: they cannot fit; nothing was deleted.
        """
        stored = {kind: self._by_age(kind) for kind in KINDS}
        excess = size - self.budget_bytes + sum(status.st_size for blobs in stored.values() for status, _ in blobs)
        going = []
        for status, path in itertools.chain.from_iterable(stored[kind] for kind in EVICTABLE):
            if excess <= 0:
                break
            excess -= status.st_size
            going.append(path)
        if excess > 0:
            raise LocalError(
                f"the disk budget of {self.budget_bytes / GIBIBYTE:.1f} GiB for {self.root} is used up; raise it with "
                f"--disk-gib"
            )
        _delete(going)
        statistics = os.statvfs(self.root)
        if statistics.f_bavail * statistics.f_frsize < size:
            raise disk_full(self.root, size)

    def tidy(self) -> None:
        """Remove what a killed writer left; unfinished downloads stay, to be resumed."""
        for path in (self.root / "partial").iterdir():
            if "-" in path.name:
                path.unlink(missing_ok=True)

    def scratch(self, label: str) -> Path:
        """A new, empty file that :meth:`commit` can make a blob; what is left of it :meth:`tidy` removes."""
        descriptor, name = tempfile.mkstemp(dir=self.root / "partial", prefix=label + "-")
        os.close(descriptor)
        return Path(name)

    def partial(self, digest: bytes, label: str) -> Path:
        """Where an unfinished download of a blob is kept, apart from others of the same blob."""
        return self.root / "partial" / f"{digest.hex()}.{label}"

    def drop_partials(self, digest: bytes) -> None:
        """Remove all unfinished downloads of a blob."""
        _delete((self.root / "partial").glob(f"{digest.hex()}*"))

    def _files(self, kind: Kind) -> list[Path]:
        return [path for path in (self.root / kind).iterdir() if len(path.name) == 64]

    def _by_age(self, kind: Kind) -> list[tuple[os.stat_result, Path]]:
        """The blobs of a kind, what was not asked for the longest first."""
        found = []
        for path in self._files(kind):
            with contextlib.suppress(FileNotFoundError):  # the other process has just deleted it
                found.append((path.stat(), path))
        return sorted(found, key=lambda blob: blob[0].st_mtime)

    def _owns(self, path: Path) -> bool:
        """Whether a file is the store's own, not a lent one."""
        return path.is_relative_to(self.root)


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def file_digest(path: Path) -> bytes:
    """BLAKE3 of a file, read in pieces: 32 bytes."""
    hasher = blake3()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.digest()


def sync(path: Path) -> None:
    """See that what is in a file survives a power cut; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk into one sentence; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(where, None) from error
        raise


def disk_full(where: Path, size: int | None) -> LocalError:
    """The error for a disk that holds no more."""
    wanted = "" if size is None else f": {size / (1 << 20):.1f} MiB more are needed"
    return LocalError(f"the disk that holds {where} is full{wanted}; free some space and start again")
