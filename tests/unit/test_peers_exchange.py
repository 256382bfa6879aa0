"""Fetching blobs: from several peers at once, resumed, and never believed before they were hashed."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from p2pasr.errors import LocalError, P2pasrError, Reject, TransportError
from p2pasr.peers.exchange import CHUNK_BYTES, MAX_PROVIDERS, BlobExchange, _Chunks
from p2pasr.peers.host import Handler, Host
from p2pasr.peers.streams import Stream
from p2pasr.protocol.encoding import blob_digest

from .builders import LocalNetwork, digest_of

RUN = digest_of("run")
BLOB = bytes(range(256)) * (10 * CHUNK_BYTES // 1024) + b"the end"
"""Two and a half chunks and a little."""

DIGEST = blob_digest(BLOB)


class World:
    """One peer that wants blobs, and others that have them."""

    def __init__(self, network: LocalNetwork, me: Host) -> None:
        self.network = network
        self.me = me
        self._count = 1

    async def helper(self, blob: bytes = BLOB) -> Host:
        """An honest peer that has a blob."""
        host = await self.liar(None)
        host.store.put("shard", blob)
        await BlobExchange().start(host)
        return host

    async def liar(self, handler: Handler | None) -> Host:
        """A peer that answers requests in its own way."""
        self._count += 1
        host = self.network.host(self._count)
        if handler is not None:
            await host.serve("blob", handler)
        return host

    async def fetch(self, *hosts: Host, digest: bytes = DIGEST, max_bytes: int = len(BLOB)) -> int:
        peers = tuple(host.peer for host in hosts)
        answer = await self.me.calls["fetch"](
            {"digest": digest, "kind": "shard", "max_bytes": max_bytes, "peers": peers}
        )
        return answer["size"]

    def partial_files(self) -> list[str]:
        return [path.name for path in (self.me.store.root / "partial").iterdir()]


def within(folder: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LocalNetwork(folder, RUN) as network:
            me = network.host(1)
            await BlobExchange().start(me)
            await story(World(network, me))

    asyncio.run(main())


def serving(blob: bytes, *, size: int | None = None, chunks: int = 1 << 20, asked: list[int] | None = None) -> Handler:
    """A handler that states a size and gives so many chunks of a blob before it hangs up."""

    async def handler(stream: Stream) -> None:
        left = chunks
        while True:
            try:
                offset = (await stream.receive())["offset"]
            except TransportError:
                return
            if offset is None:
                await stream.send({"size": len(blob) if size is None else size})
                continue
            if asked is not None:
                asked.append(offset)
            if left == 0:
                raise TransportError("no more")
            left -= 1
            await stream.send_frame(blob[offset : offset + CHUNK_BYTES])

    return handler


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_blob_comes_from_all_who_have_it(tmp_path: Path, count: int) -> None:
    async def story(world: World) -> None:
        helpers = [await world.helper() for _ in range(count)]
        assert await world.fetch(*helpers) == len(BLOB)
        assert world.me.store.get(DIGEST) == BLOB
        assert world.partial_files() == []

    within(tmp_path, story)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_blobs_of_every_length_arrive(tmp_path: Path, size: int) -> None:
    async def story(world: World) -> None:
        blob = BLOB[:size]
        helper = await world.helper(blob)
        assert await world.fetch(helper, digest=blob_digest(blob)) == size
        assert world.me.store.get(blob_digest(blob)) == blob

    within(tmp_path, story)


def test_those_who_said_so_in_the_directory_are_asked(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        helper = await world.helper()
        await helper.calls["provide"]({"digests": (DIGEST, digest_of("not here"))})
        while ("provider", DIGEST.hex()) not in world.network.records:
            await asyncio.sleep(0)
        assert ("provider", digest_of("not here").hex()) not in world.network.records
        assert await world.fetch() == len(BLOB)

    within(tmp_path, story)


def test_what_is_here_is_not_asked_for(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.me.store.put("shard", BLOB)
        assert await world.fetch() == len(BLOB)

    within(tmp_path, story)


def test_two_who_want_the_same_blob_fetch_it_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        asked: list[int] = []
        liar = await world.liar(serving(BLOB, asked=asked))
        assert await asyncio.gather(world.fetch(liar), world.fetch(liar)) == [len(BLOB)] * 2
        assert sorted(asked) == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]

    within(tmp_path, story)


def test_a_blob_that_nobody_offers_is_said_to_be_so(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        with pytest.raises(TransportError, match="nobody on the network offers the shard"):
            await world.fetch()
        other = await world.helper(b"another blob")
        away = await world.liar(None)
        with pytest.raises(TransportError, match=r"none of 1 peers gives the shard .*: …\w{6} refuses: no such blob"):
            await world.fetch(other)
        with pytest.raises(TransportError, match=r"none of 1 peers gives the shard .*: …\w{6} cannot be reached"):
            await world.fetch(away)

    within(tmp_path, story)


@pytest.mark.parametrize("size", [len(BLOB) + 1, 1 << 60, -1])
def test_an_offer_of_more_than_belongs_is_not_taken(tmp_path: Path, size: int) -> None:
    async def story(world: World) -> None:
        liar = await world.liar(serving(BLOB, size=size))
        with pytest.raises(TransportError, match=f"offers {size} bytes where at most {len(BLOB)} belong"):
            await world.fetch(liar)
        assert world.partial_files() == []

    within(tmp_path, story)


def test_wrong_bytes_are_refused_and_forgotten(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        wrong = BLOB[:-1] + b"!"
        liar = await world.liar(serving(wrong))
        with pytest.raises(Reject, match="came with other bytes from"):
            await world.fetch(liar)
        assert world.me.store.find(DIGEST) is None
        assert world.me.store.find(blob_digest(wrong)) is None
        assert world.partial_files() == []

    within(tmp_path, story)


@pytest.mark.parametrize("liars", [1, 2, 3])
def test_wrong_bytes_of_some_do_not_keep_the_right_ones_of_another_away(tmp_path: Path, liars: int) -> None:
    async def story(world: World) -> None:
        wrong = [await world.liar(serving(b"!" + BLOB[1:-1] + b"!")) for _ in range(liars)]
        assert await world.fetch(*wrong, await world.helper()) == len(BLOB)
        assert world.me.store.get(DIGEST) == BLOB

    within(tmp_path, story)


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_BYTES, len(BLOB) - 1, len(BLOB) - 7])
def test_a_wrong_size_of_one_does_not_keep_the_right_one_of_another_away(tmp_path: Path, size: int) -> None:
    async def story(world: World) -> None:
        liar = await world.liar(serving(BLOB, size=size))
        assert await world.fetch(liar, await world.helper()) == len(BLOB)

    within(tmp_path, story)


def test_many_with_a_wrong_size_do_not_keep_the_right_one_of_another_away(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        liars = [await world.liar(serving(BLOB, size=1000)) for _ in range(3)]
        assert await world.fetch(*liars, await world.helper()) == len(BLOB)

    within(tmp_path, story)


@pytest.mark.parametrize("cut", [0, 100, CHUNK_BYTES - 1])
def test_a_chunk_of_another_length_is_refused(tmp_path: Path, cut: int) -> None:
    async def story(world: World) -> None:
        liar = await world.liar(serving(BLOB[:cut], size=len(BLOB)))
        with pytest.raises(TransportError, match=rf"came in part only: …\w{{6}} sends {cut} bytes where \d+ belong"):
            await world.fetch(liar)

    within(tmp_path, story)


def test_a_chunk_that_is_too_long_is_refused_by_its_announcement(tmp_path: Path) -> None:
    async def handler(stream: Stream) -> None:
        while (await stream.receive())["offset"] is None:
            await stream.send({"size": len(BLOB)})
        await stream.send_frame(bytes(CHUNK_BYTES + 1))

    async def story(world: World) -> None:
        with pytest.raises(TransportError, match=f"came in part only: .* announces {CHUNK_BYTES + 1} bytes"):
            await world.fetch(await world.liar(handler))

    within(tmp_path, story)


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        short = await world.liar(serving(BLOB, chunks=1))
        with pytest.raises(TransportError, match="came in part only"):
            await world.fetch(short)
        assert world.me.store.find(DIGEST) is None
        assert len(world.partial_files()) == 2
        asked: list[int] = []
        assert await world.fetch(await world.liar(serving(BLOB, asked=asked))) == len(BLOB)
        assert sorted(asked) == [CHUNK_BYTES, 2 * CHUNK_BYTES]
        assert world.me.store.get(DIGEST) == BLOB
        assert world.partial_files() == []

    within(tmp_path, story)


def test_whoever_stays_finishes_what_another_left(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        short = await world.liar(serving(BLOB, chunks=0))
        assert await world.fetch(short, await world.helper()) == len(BLOB)

    within(tmp_path, story)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"digest": "text", "offset": None},
        {"digest": b"short", "offset": None},
        {"digest": digest_of("unknown"), "offset": None},
        {"digest": DIGEST, "offset": -1},
        {"digest": DIGEST, "offset": len(BLOB)},
        {"digest": DIGEST, "offset": 1 << 62},
        {"digest": DIGEST, "offset": True},
        {"digest": DIGEST, "offset": 0.0},
        {"digest": DIGEST, "offset": "0"},
    ],
)
def test_a_request_that_cannot_be_served_is_answered_with_an_error(tmp_path: Path, request_: dict[str, object]) -> None:
    async def story(world: World) -> None:
        helper = await world.helper()
        async with world.me.open(helper.peer, "blob") as stream:
            await stream.send(request_)
            with pytest.raises(TransportError, match="refuses"):
                await stream.receive()

    within(tmp_path, story)


def test_a_chunk_is_served_from_any_offset(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        helper = await world.helper()
        async with world.me.open(helper.peer, "blob") as stream:
            for offset in (0, 1, 12345, len(BLOB) - 1):
                await stream.send({"digest": DIGEST, "offset": offset})
                assert await stream.receive_frame(CHUNK_BYTES) == BLOB[offset : offset + CHUNK_BYTES]

    within(tmp_path, story)


def test_a_liar_that_dawdles_does_not_hold_up_the_right_one(tmp_path: Path) -> None:
    async def dawdle(stream: Stream) -> None:
        await stream.receive()
        await stream.send({"size": 1000})
        await stream.closed()

    async def forever(stream: Stream) -> None:
        while (await stream.receive())["offset"] is None:
            await stream.send({"size": 1000})
        await asyncio.sleep(3600)

    async def story(world: World) -> None:
        liars = [await world.liar(handler) for handler in (dawdle, forever, forever)]
        async with asyncio.timeout(10):
            assert await world.fetch(*liars, await world.helper()) == len(BLOB)
        assert world.partial_files() == []
        for serving in world.network.serving:
            serving.cancel()

    within(tmp_path, story)


def test_wrong_bytes_do_not_spoil_the_download_from_another(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        wrong = [await world.liar(serving(b"!" * len(BLOB), chunks=1)) for _ in range(3)]
        with pytest.raises(TransportError, match="came in part only"):
            await world.fetch(*wrong)
        assert await world.fetch(*wrong, await world.helper()) == len(BLOB)
        assert world.me.store.get(DIGEST) == BLOB

    within(tmp_path, story)


def test_all_holders_are_tried_not_only_the_first_few(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        away = [await world.liar(serving(BLOB, chunks=0)) for _ in range(MAX_PROVIDERS - 1)]
        assert await world.fetch(*away, await world.helper()) == len(BLOB)

    within(tmp_path, story)


def test_a_damaged_file_that_was_lent_is_fetched_from_others(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        path = tmp_path / "shard.safetensors"
        path.write_bytes(BLOB)
        world.me.store.lend(path, DIGEST)
        assert await world.fetch() == len(BLOB)
        path.write_bytes(b"!" + BLOB[1:])
        assert await world.fetch(await world.helper()) == len(BLOB)
        assert world.me.store.get(DIGEST) == BLOB
        assert path.read_bytes() == b"!" + BLOB[1:]

    within(tmp_path, story)


def test_a_folder_that_only_others_may_write_to_can_be_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_path: Path) -> None:
        raise PermissionError

    async def story(world: World) -> None:
        path = tmp_path / "shard.safetensors"
        path.write_bytes(BLOB)
        lender = await world.liar(None)
        lender.store.lend(path, DIGEST)
        await BlobExchange().start(lender)
        monkeypatch.setattr("p2pasr.peers.blobs.os.utime", forbidden)
        assert await world.fetch(lender) == len(BLOB)

    within(tmp_path, story)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.ENOSPC, r"the disk that holds .* is full"), (errno.EIO, r"cannot be written to .*Input/output error")],
)
def test_a_disk_that_takes_no_more_ends_the_whole_download_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    async def story(world: World) -> None:
        helpers = [await world.helper() for _ in range(3)]
        before = asyncio.all_tasks()
        monkeypatch.setattr("p2pasr.peers.exchange.os.pwrite", broken)
        with pytest.raises(LocalError, match=sentence):
            await world.fetch(*helpers)
        assert asyncio.all_tasks() - before <= world.network.serving, "no worker goes on alone"

    within(tmp_path, story)


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        asked: list[int] = []
        liar = await world.liar(serving(BLOB, asked=asked))
        world.me.store.budget_bytes = len(BLOB) - 1
        with pytest.raises(P2pasrError, match="disk budget"):
            await world.fetch(liar)
        assert asked == []

    within(tmp_path, story)


SIZE = 2 * CHUNK_BYTES + 100


def opened(path: Path, size: int = SIZE) -> _Chunks:
    chunks = _Chunks(path, size)
    chunks.__enter__()
    return chunks


def test_chunks_are_handed_out_once_and_in_order(tmp_path: Path) -> None:
    chunks = _Chunks(tmp_path / "part", SIZE)
    assert [chunks.take() for _ in range(4)] == [0, 1, 2, None]


def test_a_chunk_that_is_given_back_is_handed_out_again(tmp_path: Path) -> None:
    chunks = opened(tmp_path / "part")
    assert (chunks.take(), chunks.take()) == (0, 1)
    chunks.give_back(0)
    assert chunks.take() == 0
    chunks.write(1, bytes(CHUNK_BYTES))
    chunks.give_back(1)
    assert [chunks.take(), chunks.take()] == [2, None], "what is on disk is not fetched again"
    chunks.__exit__()


def test_chunks_survive_the_process(tmp_path: Path) -> None:
    chunks = opened(tmp_path / "part")
    chunks.write(1, b"x" * CHUNK_BYTES)
    chunks.__exit__()
    again = opened(tmp_path / "part")
    assert again.done == 1
    assert not again.complete
    assert [again.take() for _ in range(3)] == [0, 2, None]
    again.write(2, b"y" * 100)
    again.write(0, b"w" * CHUNK_BYTES)
    again.__exit__()
    assert again.complete
    assert (tmp_path / "part").read_bytes() == b"w" * CHUNK_BYTES + b"x" * CHUNK_BYTES + b"y" * 100
    again.forget()
    assert list(tmp_path.iterdir()) == []


def test_the_last_chunk_may_be_shorter(tmp_path: Path) -> None:
    chunks = _Chunks(tmp_path / "part", SIZE)
    assert [chunks.length(index) for index in range(3)] == [CHUNK_BYTES, CHUNK_BYTES, 100]
    assert _Chunks(tmp_path / "part", 0).length(0) == 0


def test_nothing_is_written_to_a_file_that_is_closed(tmp_path: Path) -> None:
    chunks = _Chunks(tmp_path / "part", SIZE)
    with chunks:
        chunks.write(0, bytes(CHUNK_BYTES))
    with pytest.raises(OSError, match="Bad file descriptor"):
        chunks.write(1, bytes(CHUNK_BYTES))
    assert chunks.done == 1


def test_notes_without_a_file_or_about_another_number_of_chunks_are_not_believed(tmp_path: Path) -> None:
    (tmp_path / "part.map").write_bytes(b"\x01\x01\x01")
    assert _Chunks(tmp_path / "part", SIZE).done == 0
    (tmp_path / "part").write_bytes(bytes(SIZE))
    assert _Chunks(tmp_path / "part", SIZE).done == 3
    (tmp_path / "part.map").write_bytes(b"\x01\x01")
    assert _Chunks(tmp_path / "part", SIZE).done == 0


def test_notes_that_are_wrong_cost_one_more_download_only(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        part = world.me.store.partial(DIGEST, str(len(BLOB)))
        part.write_bytes(bytes(len(BLOB)))
        part.with_name(part.name + ".map").write_bytes(b"\x01\x00\x00")
        assert await world.fetch(await world.helper()) == len(BLOB)
        assert world.me.store.get(DIGEST) == BLOB

    within(tmp_path, story)
