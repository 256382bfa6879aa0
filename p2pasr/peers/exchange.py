"""Blobs between peers: asked for by digest, in bounded chunks, from several providers, checked before use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from p2pasr.errors import LocalError, P2pasrError, Reject, TransportError
from p2pasr.peers.blobs import Kind, disk_errors, file_digest
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream, field
from p2pasr.protocol.encoding import DIGEST_BYTES, MEBIBYTE
from p2pasr.protocol.signing import short

CHUNK_BYTES: Final = MEBIBYTE // 4
"""What is asked for, and kept in memory, at once."""

PARALLEL_PROVIDERS: Final = 4
"""How many give chunks of one download at once."""

MAX_PROVIDERS: Final = 8
"""How many are asked at all."""

PROVIDER_TTL_SECONDS: Final = 900.0
PROGRESS_SECONDS: Final = 1.0
SIZE_BYTES: Final = 8


class BlobExchange:
    """Serves the store to other peers and fetches from theirs.

    Calls: `fetch` {digest, kind, max_bytes, peers} → {size}; `provide` {digests}.
    """

    def __init__(self) -> None:
        self._host: Host
        self._fetching: dict[bytes, asyncio.Task[int]] = {}
        self._providing: asyncio.Task[None] | None = None

    async def start(self, host: Host) -> None:
        """Register on a host."""
        self._host = host
        await host.serve("blob", self._give, to_banned=True)
        host.calls["fetch"] = self._call_fetch
        host.calls["provide"] = self._call_provide

    async def _give(self, stream: Stream) -> None:
        """Answer requests for a blob's size (offset None) or one of its chunks until the other side closes.

        A banned peer gets states only: the one that bans it is how it learns of that.
        """
        while True:
            try:
                request = await stream.receive()
            except TransportError:
                return
            digest, offset = field(request, "digest", bytes), request.get("offset")
            only: Kind | None = "state" if stream.peer in self._host.banned else None
            path = self._host.store.find(digest, only) if len(digest) == DIGEST_BYTES else None
            if path is None:
                raise TransportError("no such blob here")
            size = path.stat().st_size
            if offset is None:
                await stream.send({"size": size})
                continue
            if type(offset) is not int or not 0 <= offset < max(size, 1):
                raise Reject(f"{short(stream.peer)} asks for byte {offset!r} of {size}")
            self._host.store.touch(path)
            await stream.send_frame(_read_chunk(path, offset))

    async def _call_provide(self, args: dict[str, Any]) -> dict[str, Any]:
        """Tell the directory, now and from then on, that these blobs can be had here."""
        if self._providing is not None:
            self._providing.cancel()
        self._providing = asyncio.create_task(self._provide(tuple(args["digests"])))
        return {}

    async def _provide(self, digests: tuple[bytes, ...]) -> None:
        while True:
            try:
                await self._provide_once(digests)
            except Exception as error:  # noqa: BLE001 (whatever it was, it is tried again)
                self._host.warn(f"not all blobs were offered to others ({str(error) or type(error).__name__})")
            await asyncio.sleep(PROVIDER_TTL_SECONDS / 3)

    async def _provide_once(self, digests: tuple[bytes, ...]) -> None:
        for digest in digests:
            if (path := self._host.store.find(digest)) is not None:
                size = path.stat().st_size.to_bytes(SIZE_BYTES, "big")
                await self._host.directory.put("provider", digest.hex(), size, PROVIDER_TTL_SECONDS)

    async def _call_fetch(self, args: dict[str, Any]) -> dict[str, Any]:
        digest: bytes = args["digest"]
        if (running := self._fetching.get(digest)) is None:
            running = asyncio.create_task(self._fetch(digest, args["kind"], args["max_bytes"], args["peers"]))
            self._fetching[digest] = running
            running.add_done_callback(lambda _: self._fetching.pop(digest, None))
        return {"size": await running}

    async def _fetch(self, digest: bytes, kind: Kind, max_bytes: int, hints: Iterable[str]) -> int:
        """Get a blob; whoever states a wrong size or sends wrong bytes does not keep the right ones away."""
        if (size := await self._size_here(digest)) is not None:
            return size
        providers = await self._providers(digest, hints)
        if not providers:
            raise TransportError(f"nobody on the network offers the {kind} {digest.hex()[:12]}…")
        offers = await self._measure(digest, kind, providers, max_bytes)
        together = [
            _Source(str(size), size, tuple(peer for peer in offers if offers[peer] == size))
            for size in set(offers.values())
        ]
        alone = [_Source(f"{size}.{peer}", size, (peer,)) for peer, size in offers.items()]
        try:
            size = await self._first_of(together, digest, kind)
        except (Reject, LocalError):  # somebody sent wrong bytes or states too large a size: now each alone
            self._host.store.drop_partials(digest)
            size = await self._first_of(alone, digest, kind)
        self._host.store.drop_partials(digest)
        return size

    async def _size_here(self, digest: bytes) -> int | None:
        """The size of a blob that is here and whole; a damaged one is forgotten."""
        path = self._host.store.find(digest)
        if path is None:
            return None
        if await asyncio.get_running_loop().run_in_executor(None, file_digest, path) == digest:
            return path.stat().st_size
        self._host.store.discard(digest)
        return None

    async def _first_of(self, sources: list[_Source], digest: bytes, kind: Kind) -> int:
        """Download from several sources at once until one has given the whole blob; returns its size.

        Raises:
            LocalError: it cannot be written here.
            Reject: it came with other bytes.
            TransportError: it did not come, or in part.
        """
        downloads = [asyncio.create_task(self._download(digest, kind, source)) for source in sources]
        errors: list[P2pasrError] = []
        try:
            for download in asyncio.as_completed(downloads):
                try:
                    return await download
                except P2pasrError as error:
                    errors.append(error)
        finally:
            await _cancel(downloads)
        raise min(errors, key=_urgency)

    async def _providers(self, digest: bytes, hints: Iterable[str]) -> list[str]:
        records = await self._host.directory.get("provider", digest.hex())
        others = {peer for peer, _ in records} | set(hints)
        others.discard(self._host.peer)
        return random.sample(sorted(others), len(others))

    async def _measure(self, digest: bytes, kind: Kind, providers: list[str], max_bytes: int) -> dict[str, int]:
        """The size that each provider states, of those that state one.

        Raises:
            TransportError: nobody does.
        """
        sizes: dict[str, int] = {}
        reasons: list[str] = []

        async def ask(peer: str) -> None:
            try:
                async with self._host.open(peer, "blob") as stream:
                    await stream.send({"digest": digest, "offset": None})
                    size = field(await stream.receive(), "size", int)
                if not 0 <= size <= max_bytes:
                    raise Reject(f"{short(peer)} offers {size} bytes where at most {max_bytes} belong")
                sizes[peer] = size
            except P2pasrError as error:
                reasons.append(str(error))

        await asyncio.gather(*map(ask, providers[:MAX_PROVIDERS]))
        if not sizes:
            raise TransportError(f"none of {len(providers)} peers gives the {kind} {digest.hex()[:12]}…: {reasons[0]}")
        return sizes

    async def _download(self, digest: bytes, kind: Kind, source: _Source) -> int:
        """Fetch the missing chunks from a source's holders at once, check the whole, and store it.

        Returns:
            The blob's size.

        Raises:
            LocalError: it cannot be written here.
            Reject: the bytes do not have the digest.
            TransportError: chunks are missing when no holder is left; they are kept for the next try.
        """
        store = self._host.store
        store.make_room(source.size)
        part = store.partial(digest, source.label)
        chunks = _Chunks(part, source.size)
        what = f"the {kind} {digest.hex()[:12]}…"
        with _writing_errors(store.root):
            reasons = await self._fill(chunks, digest, kind, source)
            if not chunks.complete:
                raise TransportError(f"{what} came in part only: {reasons[0]}")
            actual = await asyncio.get_running_loop().run_in_executor(None, file_digest, part)
            if actual != digest:
                chunks.forget()
                raise Reject(f"{what} came with other bytes from {', '.join(map(short, source.holders))}")
            store.commit(part, digest, kind)
            chunks.forget()
        return source.size

    async def _fill(self, chunks: _Chunks, digest: bytes, kind: Kind, source: _Source) -> list[str]:
        """Fetch what is missing until it is there or every holder has failed; returns why they did."""
        left = list(source.holders)
        reasons: list[str] = []
        shown = time.monotonic()

        async def work(peer: str) -> None:
            try:
                async with self._host.open(peer, "blob") as stream:
                    while (index := chunks.take()) is not None:
                        try:
                            await stream.send({"digest": digest, "offset": index * CHUNK_BYTES})
                            chunks.write(index, await stream.receive_data(chunks.length(index)))
                        finally:
                            chunks.give_back(index)
                        show()
            except P2pasrError as error:
                left.remove(peer)
                reasons.append(str(error))

        def show() -> None:
            nonlocal shown
            if time.monotonic() - shown > PROGRESS_SECONDS:
                shown = time.monotonic()
                done = min(chunks.done * CHUNK_BYTES, source.size)
                self._host.emit({"event": "fetch", "kind": kind, "done": done, "size": source.size})

        with chunks:
            while left and not chunks.complete:
                workers = [asyncio.create_task(work(peer)) for peer in left[:PARALLEL_PROVIDERS]]
                try:
                    await asyncio.gather(*workers)
                finally:  # one that cannot write ends the others before the file is closed
                    await _cancel(workers)
        return reasons


@dataclass(frozen=True, slots=True)
class _Source:
    """Peers that state the same size of a blob.

    Attributes:
        label: tells its unfinished download from those of other sources.
    """

    label: str
    size: int
    holders: tuple[str, ...]


class _Chunks:
    """An unfinished download: a sparse file, and beside it which of its chunks are there."""

    def __init__(self, part: Path, size: int) -> None:
        self._part = part
        self._map = part.with_name(part.name + ".map")
        self._size = size
        count = max(1, -(-size // CHUNK_BYTES))
        flags = self._map.read_bytes() if self._map.is_file() and part.is_file() else b""
        self._flags = bytearray(flags if len(flags) == count else bytes(count))
        self._todo = [index for index in reversed(range(count)) if not self._flags[index]]
        self._descriptor = -1

    @property
    def done(self) -> int:
        """Chunks on disk."""
        return sum(self._flags)

    @property
    def complete(self) -> bool:
        """Whether all of them are."""
        return all(self._flags)

    def __enter__(self) -> None:
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.truncate(self._descriptor, self._size)

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def length(self, index: int) -> int:
        """Bytes of a chunk."""
        return min(CHUNK_BYTES, self._size - index * CHUNK_BYTES)

    def take(self) -> int | None:
        return self._todo.pop() if self._todo else None

    def give_back(self, index: int) -> None:
        if not self._flags[index]:
            self._todo.append(index)

    def write(self, index: int, data: bytes) -> None:
        os.pwrite(self._descriptor, data, index * CHUNK_BYTES)
        self._flags[index] = 1
        self._map.write_bytes(self._flags)

    def forget(self) -> None:
        self._part.unlink(missing_ok=True)
        self._map.unlink(missing_ok=True)


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _urgency(error: P2pasrError) -> int:
    """Which of several reasons is told: what a person here can mend, then who lied, then who was not there."""
    return next(rank for rank, kind in enumerate((LocalError, Reject, P2pasrError)) if isinstance(error, kind))


@contextlib.contextmanager
def _writing_errors(where: Path) -> Iterator[None]:
    """Turn whatever the disk refuses into one sentence."""
    try:
        with disk_errors(where):
            yield
    except OSError as error:
        raise LocalError(f"a download cannot be written to {where} ({error.strerror}); check the disk") from error


def _read_chunk(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)
