"""Blobs between peers: asked for by digest, in bounded chunks, from several providers, checked before use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from p2pasr.errors import P2pasrError, Reject, TransportError
from p2pasr.peers.blobs import Kind, disk_errors, file_digest
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream, field
from p2pasr.protocol.encoding import DIGEST_BYTES, MEBIBYTE
from p2pasr.protocol.signing import short

CHUNK_BYTES: Final = MEBIBYTE // 4
"""What is asked for, and kept in memory, at once."""

PARALLEL_PROVIDERS: Final = 4
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
        await host.serve("blob", self._give)
        host.calls["fetch"] = self._call_fetch
        host.calls["provide"] = self._call_provide

    async def _give(self, stream: Stream) -> None:
        """Answer requests for a blob's size (offset None) or one of its chunks until the other side closes."""
        while True:
            try:
                request = await stream.receive()
            except TransportError:
                return
            digest, offset = field(request, "digest", bytes), request.get("offset")
            path = self._host.store.find(digest) if len(digest) == DIGEST_BYTES else None
            if path is None:
                raise TransportError("no such blob here")
            size = path.stat().st_size
            if offset is None:
                await stream.send({"size": size})
                continue
            if type(offset) is not int or not 0 <= offset < max(size, 1):
                raise Reject(f"{short(stream.peer)} asks for byte {offset!r} of {size}")
            os.utime(path)  # what is asked for is evicted last
            await stream.send_frame(_read_chunk(path, offset))

    async def _call_provide(self, args: dict[str, Any]) -> dict[str, Any]:
        """Tell the directory, now and from then on, that these blobs can be had here."""
        if self._providing is not None:
            self._providing.cancel()
        self._providing = asyncio.create_task(self._provide(tuple(args["digests"])))
        return {}

    async def _provide(self, digests: tuple[bytes, ...]) -> None:
        while True:
            for digest in digests:
                if (path := self._host.store.find(digest)) is not None:
                    size = path.stat().st_size.to_bytes(SIZE_BYTES, "big")
                    await self._host.directory.put("provider", digest.hex(), size, PROVIDER_TTL_SECONDS)
            await asyncio.sleep(PROVIDER_TTL_SECONDS / 3)

    async def _call_fetch(self, args: dict[str, Any]) -> dict[str, Any]:
        digest: bytes = args["digest"]
        if (path := self._host.store.find(digest)) is not None:
            return {"size": path.stat().st_size}
        if (running := self._fetching.get(digest)) is None:
            running = asyncio.create_task(self._fetch(digest, args["kind"], args["max_bytes"], args["peers"]))
            self._fetching[digest] = running
            running.add_done_callback(lambda _: self._fetching.pop(digest, None))
        return {"size": await running}

    async def _fetch(self, digest: bytes, kind: Kind, max_bytes: int, hints: Iterable[str]) -> int:
        providers = await self._providers(digest, hints)
        if not providers:
            raise TransportError(f"nobody on the network offers the {kind} {digest.hex()[:12]}…")
        size, holders = await self._measure(digest, providers, max_bytes)
        if size is None:
            raise TransportError(f"none of {len(providers)} peers gives the {kind} {digest.hex()[:12]}…: {holders[0]}")
        self._host.store.make_room(size)
        try:
            await self._download(digest, kind, size, holders[:PARALLEL_PROVIDERS])
        except Reject:  # somebody sent wrong bytes; alone, each provider answers for its own
            for holder in holders:
                with contextlib.suppress(P2pasrError):
                    await self._download(digest, kind, size, [holder])
                    return size
            raise
        return size

    async def _providers(self, digest: bytes, hints: Iterable[str]) -> list[str]:
        records = await self._host.directory.get("provider", digest.hex())
        others = {peer for peer, _ in records} | set(hints)
        others.discard(self._host.peer)
        return random.sample(sorted(others), len(others))

    async def _measure(self, digest: bytes, providers: list[str], max_bytes: int) -> tuple[int | None, list[str]]:
        """The blob's size and who has it; if nobody does, None and the reasons."""
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

        await asyncio.gather(*map(ask, providers[: 2 * PARALLEL_PROVIDERS]))
        if not sizes:
            return None, reasons
        counted = list(sizes.values())
        size = max(set(counted), key=counted.count)
        return size, [peer for peer in sizes if sizes[peer] == size]

    async def _download(self, digest: bytes, kind: Kind, size: int, holders: list[str]) -> None:
        """Fetch the missing chunks from all holders at once, check the whole, and store it.

        Raises:
            Reject: the bytes do not have the digest.
            TransportError: chunks are missing when no holder is left; they are kept for the next try.
        """
        part = self._host.store.partial(digest)
        chunks = _Chunks(part, size)
        reasons: list[str] = []
        shown = time.monotonic()

        async def worker(peer: str) -> None:
            nonlocal shown
            try:
                async with self._host.open(peer, "blob") as stream:
                    while (index := chunks.take()) is not None:
                        try:
                            await stream.send({"digest": digest, "offset": index * CHUNK_BYTES})
                            chunks.write(index, await stream.receive_frame(CHUNK_BYTES))
                        except BaseException:
                            chunks.give_back(index)
                            raise
                        if time.monotonic() - shown > PROGRESS_SECONDS:
                            shown = time.monotonic()
                            done = chunks.done * CHUNK_BYTES
                            self._host.emit({"event": "fetch", "kind": kind, "done": min(done, size), "size": size})
            except P2pasrError as error:
                reasons.append(str(error))

        with disk_errors(self._host.store.root):
            chunks.open()
            try:
                await asyncio.gather(*map(worker, holders))
            finally:
                chunks.close()
            if not chunks.complete:
                raise TransportError(f"the {kind} {digest.hex()[:12]}… came in part only: {reasons[0]}")
            actual = await asyncio.get_running_loop().run_in_executor(None, file_digest, part)
            if actual != digest:
                chunks.forget()
                raise Reject(
                    f"the {kind} {digest.hex()[:12]}… came with other bytes from {', '.join(map(short, holders))}"
                )
            self._host.store.commit(part, digest, kind)
            chunks.forget()


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

    def open(self) -> None:
        self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.truncate(self._descriptor, self._size)

    def close(self) -> None:
        os.close(self._descriptor)

    def take(self) -> int | None:
        return self._todo.pop() if self._todo else None

    def give_back(self, index: int) -> None:
        if not self._flags[index]:
            self._todo.append(index)

    def write(self, index: int, data: bytes) -> None:
        wanted = min(CHUNK_BYTES, self._size - index * CHUNK_BYTES)
        if len(data) != wanted:
            raise Reject(f"a chunk has {len(data)} bytes where {wanted} belong")
        os.pwrite(self._descriptor, data, index * CHUNK_BYTES)
        self._flags[index] = 1
        self._map.write_bytes(self._flags)

    def forget(self) -> None:
        self._part.unlink(missing_ok=True)
        self._map.unlink(missing_ok=True)


def _read_chunk(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)
