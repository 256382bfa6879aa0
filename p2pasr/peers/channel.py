"""The one wire between a peer's training process and its network process.

Frames of canonical msgpack over a socket pair: calls {id, call, args}, answers {id, result} or
{id, error}, and events {event, …} from the network process. Tensors never pass here; they go by
digest through the blob store that both processes see.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Final

from p2pasr.errors import (
    Ignore,
    LinkDown,
    LocalError,
    NonFiniteStep,
    P2pasrError,
    Reject,
    RoundFailed,
    TransportError,
)
from p2pasr.protocol.encoding import MEBIBYTE, pack, unpack

MAX_FRAME_BYTES: Final = 64 * MEBIBYTE
"""Longest frame; the largest in practice is the ledger of a run with 100,000 shards."""

HEADER: Final = struct.Struct(">I")

_OUT_OF_STEP: Final = "the network process's channel is out of step"

ERRORS: Final[dict[str, type[P2pasrError]]] = {
    kind.__name__: kind for kind in (LocalError, NonFiniteStep, Ignore, Reject, TransportError, LinkDown, RoundFailed)
}


def encode_frame(message: dict[str, Any]) -> bytes:
    """A message as it is written to the socket."""
    body = pack(message)
    if len(body) > MAX_FRAME_BYTES:
        raise LocalError(f"a message of {len(body)} bytes is too long for the network process's channel")
    return HEADER.pack(len(body)) + body


def read_frame(source: socket.socket) -> dict[str, Any] | None:
    """Read one message, blocking; None at the end of the stream.

    Raises:
        LocalError, Reject: what comes is no message of ours.
    """
    header = _read_exactly(source, HEADER.size)
    if header is None:
        return None
    body = _read_exactly(source, body_bytes(header))
    return None if body is None else decode_body(body)


def body_bytes(header: bytes) -> int:
    """The length of the body that a header announces.

    Raises:
        LocalError: no message is that long.
    """
    size: int = HEADER.unpack(header)[0]
    if size > MAX_FRAME_BYTES:
        raise LocalError(_OUT_OF_STEP)
    return size


def decode_body(body: bytes) -> dict[str, Any]:
    """The message in a frame.

    Raises:
        LocalError, Reject: it is none.
    """
    message = unpack(body, MAX_FRAME_BYTES)
    if not isinstance(message, dict):
        raise LocalError(_OUT_OF_STEP)
    return message


def error_to_wire(error: BaseException) -> tuple[str, str]:
    """An error as it crosses the channel: the name of its kind, and its sentence."""
    if isinstance(error, P2pasrError):
        kind = type(error).__name__
        return (kind if kind in ERRORS else "TransportError"), str(error)
    return "TransportError", f"the network process failed ({type(error).__name__}: {error})"


def error_from_wire(wire: tuple[str, str]) -> P2pasrError:
    """The inverse of :func:`error_to_wire`."""
    kind, message = wire
    return ERRORS.get(kind, TransportError)(message)


def _read_exactly(source: socket.socket, size: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < size:
        try:
            piece = source.recv(min(size - len(pieces), MEBIBYTE))
        except (ConnectionError, OSError):
            return None
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)
