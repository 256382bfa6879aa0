"""Streams: sizes are looked at before anything is read, and what goes wrong names the peer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from p2pasr.errors import Reject, TransportError
from p2pasr.peers.streams import MAX_MESSAGE_BYTES, Pacer, Stream, field
from p2pasr.protocol.encoding import pack

from .builders import LocalNetwork

PEER = "12D3KooWfriend"


def converse(folder: Path, talk: Callable[[Stream, Stream], Awaitable[None]], timeout: float = 10.0) -> None:
    """Run both sides of a stream."""

    async def main() -> None:
        async with LocalNetwork(folder, bytes(32)) as network:
            await talk(*await network.stream(PEER, timeout))

    asyncio.run(main())


def test_frames_arrive_whole_and_in_order(tmp_path: Path) -> None:
    frames = [b"", b"x", bytes(100_000), b"last"]

    async def talk(ours: Stream, theirs: Stream) -> None:
        async def send() -> None:
            for frame in frames:
                await ours.send_frame(memoryview(frame))

        sending = asyncio.create_task(send())
        assert [await theirs.receive_frame(100_000) for _ in frames] == frames
        await sending

    converse(tmp_path, talk)


def test_messages_arrive_as_they_were(tmp_path: Path) -> None:
    message = {"digest": bytes(32), "offset": None, "list": (1, 2)}

    async def talk(ours: Stream, theirs: Stream) -> None:
        await ours.send(message)
        assert await theirs.receive() == message

    converse(tmp_path, talk)


def test_a_frame_of_exactly_the_limit_passes_and_one_more_byte_does_not(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        await ours.send_frame(b"12345678")
        assert await theirs.receive_frame(8) == b"12345678"
        await ours.send_frame(b"123456789")
        with pytest.raises(Reject, match="…friend announces 9 bytes where at most 8 belong"):
            await theirs.receive_frame(8)

    converse(tmp_path, talk)


@pytest.mark.parametrize("announced", [101, 1 << 31, (1 << 32) - 1])
def test_a_frame_that_announces_too_much_is_refused_before_its_bytes_are_there(tmp_path: Path, announced: int) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        ours._writer.write(announced.to_bytes(4, "big"))
        with pytest.raises(Reject, match=f"announces {announced} bytes where at most 100 belong"):
            await theirs.receive_frame(100)

    converse(tmp_path, talk)


def test_a_message_has_a_limit_of_its_own(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        ours._writer.write((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
        with pytest.raises(Reject, match="announces"):
            await theirs.receive()

    converse(tmp_path, talk)


@pytest.mark.parametrize("body", [pack(None), pack((1, 2)), pack("text"), b"", b"\xc1", b"\x82\xa1b\x01\xa1a\x01"])
def test_what_is_no_canonical_map_is_no_message(tmp_path: Path, body: bytes) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        await ours.send_frame(body)
        with pytest.raises(Reject):
            await theirs.receive()

    converse(tmp_path, talk)


def test_a_refusal_of_the_other_side_is_told_and_cut_short(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        await ours.send({"error": "no such blob here"})
        with pytest.raises(TransportError, match="…friend refuses: no such blob here"):
            await theirs.receive()
        await ours.send({"error": "x" * 5000})
        with pytest.raises(TransportError) as caught:
            await theirs.receive()
        assert len(str(caught.value)) < 250

    converse(tmp_path, talk)


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", b"\x00\x00\x00\x05abc"])
def test_a_stream_that_ends_early_is_nobodys_fault(tmp_path: Path, sent: bytes) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        ours._writer.write(sent)
        ours.close()
        with pytest.raises(TransportError, match=r"…friend sends nothing \(the stream was closed\)"):
            await theirs.receive_frame(100)
        await theirs.closed()

    converse(tmp_path, talk)


@pytest.mark.parametrize("sent", [b"", b"\x00\x00\x00\x05abc"])
def test_silence_is_a_transport_error_after_its_time(tmp_path: Path, sent: bytes) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        ours._writer.write(sent)
        with pytest.raises(TransportError, match=r"…friend sends nothing \(waited 0 s\)"):
            await theirs.receive_frame(100, timeout=0.01)

    converse(tmp_path, talk)


async def send_for_ever(stream: Stream) -> None:
    while True:
        await stream.send_frame(bytes(1 << 18))


def test_a_peer_that_reads_nothing_is_given_up(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        theirs._reader._transport.pause_reading()
        with pytest.raises(TransportError, match=r"…friend takes no data \(waited 0 s\)"):
            await send_for_ever(ours)

    converse(tmp_path, talk, timeout=0.05)


def test_a_peer_that_is_gone_takes_no_data(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        theirs.close()
        await theirs._writer.wait_closed()
        with pytest.raises(TransportError, match="…friend takes no data"):
            await send_for_ever(ours)

    converse(tmp_path, talk)


def test_bytes_are_counted_on_both_sides(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        await ours.send_frame(b"12345")
        await theirs.receive_frame(5)
        assert (ours._pacer.sent, ours._pacer.received) == (9, 0)
        assert (theirs._pacer.sent, theirs._pacer.received) == (0, 9)

    converse(tmp_path, talk)


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        ours.close()
        ours.close()
        await theirs.closed()

    converse(tmp_path, talk)


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("p2pasr.peers.streams.time.monotonic", lambda: self.now)
        monkeypatch.setattr("p2pasr.peers.streams.asyncio.sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.mark.parametrize("size", [1000, 10_000, 250_000])
def test_uploads_keep_to_their_cap_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    clock = Clock(monkeypatch)
    pacer = Pacer(100_000)

    async def spend() -> None:
        for _ in range(1_000_000 // size):
            await pacer.spend(size)

    asyncio.run(spend())
    assert pacer.sent == 1_000_000
    assert clock.now - 1000.0 == pytest.approx(10.0, abs=0.11)


def test_silence_saves_up_no_more_than_a_tenth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pacer = Pacer(100_000)
    clock.now += 3600.0
    asyncio.run(pacer.spend(100_000))
    assert clock.now - 4600.0 == pytest.approx(0.9)


def test_without_a_cap_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pacer = Pacer(None)
    asyncio.run(pacer.spend(1 << 40))
    assert clock.now == 1000.0
    assert pacer.sent == 1 << 40


@pytest.mark.parametrize(
    ("message", "kind"),
    [({}, int), ({"x": None}, int), ({"x": True}, int), ({"x": 1}, bytes), ({"x": 1.0}, int), ({"y": 1}, int)],
)
def test_a_field_that_is_missing_or_of_another_type_is_refused(message: dict[str, Any], kind: type) -> None:
    with pytest.raises(Reject, match=f"a message's x is not {kind.__name__}"):
        field(message, "x", kind)


def test_a_field_of_the_right_type_is_returned() -> None:
    assert field({"x": b"1", "y": 2}, "x", bytes) == b"1"


def test_data_of_a_known_length_arrives_or_the_error_in_its_place(tmp_path: Path) -> None:
    async def talk(ours: Stream, theirs: Stream) -> None:
        for size in (0, 1, 100):
            await ours.send_frame(bytes(size))
            assert await theirs.receive_data(size) == bytes(size)
        await ours.send({"error": "the disk is full"})
        with pytest.raises(TransportError, match="…friend refuses: the disk is full"):
            await theirs.receive_data(100)
        for other in (b"", bytes(99), pack({"no": "error"}), pack("text")):
            await ours.send_frame(other)
            with pytest.raises(Reject, match=f"…friend sends {len(other)} bytes where 100 belong"):
                await theirs.receive_data(100)
        await ours.send_frame(bytes(101))
        with pytest.raises(Reject, match="announces 101 bytes where at most 100 belong"):
            await theirs.receive_data(100)

    converse(tmp_path, talk)
