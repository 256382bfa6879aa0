"""Frames over a libp2p stream: lengths are checked before a byte is allocated, uploads are paced."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, Final

from p2pasr.errors import Reject, TransportError
from p2pasr.protocol.encoding import pack, unpack

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Longest structured message on a stream; bulk data goes in raw frames of announced size."""

SLOWEST_BYTES_PER_SECOND: Final = 64 * 1024
"""A link that is slower than 0.5 Mbit/s is given up; one that was never measured may be as slow."""

PATIENCE_SECONDS: Final = 15.0
"""How long any answer may take, however short."""

_SLACK: Final = 4

_LENGTH_BYTES: Final = 4


def patience(size: int, bytes_per_second: float | None = None) -> float:
    """Seconds that a peer may take to send something of a size.

    Args:
        bytes_per_second: how fast its link was before; None where that is not known.
    """
    rate = max(bytes_per_second or SLOWEST_BYTES_PER_SECOND, SLOWEST_BYTES_PER_SECOND)
    return PATIENCE_SECONDS + _SLACK * size / rate


class Pacer:
    """A token bucket over all uploads of a process.

    Args:
        bytes_per_second: the cap; None for none.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = time.monotonic()
        self.sent = 0
        self.received = 0

    async def spend(self, size: int) -> None:
        """Wait until `size` more bytes may be sent."""
        self.sent += size
        if self.bytes_per_second is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 0.1) + size / self.bytes_per_second
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class Stream:
    """One bidirectional stream to a peer.

    Args:
        peer: the remote peer's ID, authenticated by libp2p.
        pacer: counts bytes and paces what is sent.
        timeout: seconds that any single read or write may take.
    """

    def __init__(
        self,
        peer: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pacer: Pacer,
        timeout: float,
    ) -> None:
        self.peer = peer
        self.timeout = timeout
        self._reader = reader
        self._writer = writer
        self._pacer = pacer

    async def send_frame(self, data: bytes | memoryview) -> None:
        """Send raw bytes as one frame.

        Raises:
            TransportError: the peer does not take them in time.
        """
        await self._pacer.spend(len(data) + _LENGTH_BYTES)
        try:
            async with asyncio.timeout(self.timeout):
                self._writer.writelines([len(data).to_bytes(_LENGTH_BYTES, "big"), data])
                await self._writer.drain()
        except (TimeoutError, OSError) as error:
            raise TransportError(f"{_tail(self.peer)} takes no data ({_reason(error, self.timeout)})") from error

    async def receive_frame(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Receive one frame of at most `max_bytes`.

        Raises:
            Reject: the peer announces more.
            TransportError: it sends nothing in time, or closes.
        """
        limit = self.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                size = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
                if size > max_bytes:
                    raise Reject(f"{_tail(self.peer)} announces {size} bytes where at most {max_bytes} belong")
                data = await self._reader.readexactly(size)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            raise TransportError(f"{_tail(self.peer)} sends nothing ({_reason(error, limit)})") from error
        self._pacer.received += size + _LENGTH_BYTES
        return data

    async def receive_data(self, size: int, timeout: float | None = None) -> bytes:
        """Receive raw bytes of a known length, or the error that the peer sends in their place.

        Raises:
            Reject: they have another length.
            TransportError: they do not come in time, or the peer answers with an error.
        """
        data = await self.receive_frame(size, timeout)
        if len(data) != size:
            with contextlib.suppress(Reject):
                self._parse(data)
            raise Reject(f"{_tail(self.peer)} sends {len(data)} bytes where {size} belong")
        return data

    async def send(self, message: Any) -> None:
        """Send a structured message as canonical msgpack."""
        await self.send_frame(pack(message))

    async def receive(self, max_bytes: int = MAX_MESSAGE_BYTES, timeout: float | None = None) -> dict[str, Any]:
        """Receive a structured message.

        Raises:
            Reject: too long, not canonical, or no map.
            TransportError: it does not come in time, or the peer answers with an error.
        """
        return self._parse(await self.receive_frame(max_bytes, timeout))

    def _parse(self, data: bytes) -> dict[str, Any]:
        message = unpack(data, MAX_MESSAGE_BYTES)
        if not isinstance(message, dict):
            raise Reject(f"{_tail(self.peer)} sends something that is no message")
        if isinstance(error := message.get("error"), str):
            raise TransportError(f"{_tail(self.peer)} refuses: {error[:200]}")
        return message

    async def closed(self) -> None:
        """Return when the peer closes its side (or sends something it should not)."""
        with contextlib.suppress(OSError):
            await self._reader.read(1)

    def close(self) -> None:
        """Close both sides; closing twice is harmless."""
        self._writer.close()


def field(message: dict[str, Any], name: str, kind: type) -> Any:
    """A field of a structured message.

    Raises:
        Reject: it is missing or of another type.
    """
    value = message.get(name)
    if type(value) is not kind:
        raise Reject(f"a message's {name} is not {kind.__name__}")
    return value


def _tail(peer: str) -> str:
    return f"…{peer[-6:]}"


def _reason(error: BaseException, seconds: float) -> str:
    if isinstance(error, TimeoutError):
        return f"waited {seconds:.0f} s"
    if isinstance(error, asyncio.IncompleteReadError):
        return "the stream was closed"
    return str(error) or type(error).__name__
