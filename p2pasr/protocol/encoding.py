"""One way to write a value, one way to name it. Bytes that differ anywhere are another value.

Records are canonical msgpack: maps with string keys in ascending order, the shortest integer forms,
64-bit floats. :func:`unpack` refuses anything that :func:`pack` would not have written, so that a
value has exactly one encoding and its digest is unambiguous.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgpack
from blake3 import blake3

from p2pasr.errors import Reject

DOMAIN: Final = b"p2pasr/1/"
"""Prefix of every digest and signature; the digit is the protocol's version."""

DIGEST_BYTES: Final = 32
MAX_DEPTH: Final = 16
"""Levels of nesting that a record may have."""

KIBIBYTE: Final = 1 << 10
MEBIBYTE: Final = 1 << 20


def pack(value: Any) -> bytes:
    """Canonical msgpack of None, bool, int, float, str, bytes, lists or tuples, and string-keyed dicts.

    Raises:
        ValueError: a float is NaN or infinite, an integer is beyond 64 bits, a key is no string, or it nests too deep.
        TypeError: a value of another type.
    """
    return msgpack.packb(_ordered(value, 0), use_bin_type=True, strict_types=True)  # type: ignore[no-any-return]


def unpack(data: bytes, max_bytes: int) -> Any:
    """Read a canonical record; sequences come back as tuples.

    Args:
        data: bytes from anywhere.
        max_bytes: refuse anything longer before looking at it.

    Raises:
        Reject: too long, not msgpack, or not the canonical form of what it holds.
    """
    if len(data) > max_bytes:
        raise Reject(f"a record of {len(data)} bytes exceeds the limit of {max_bytes}")
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True, use_list=False)
        canonical = pack(value)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise Reject(f"a record is not canonical msgpack ({error or type(error).__name__})") from None
    if canonical != data:
        raise Reject("a record is not in canonical form")
    return value


def digest(kind: str, data: bytes) -> bytes:
    """BLAKE3 of `data` in the domain of `kind`: 32 bytes that no other kind of value can share."""
    return blake3(DOMAIN + kind.encode() + b"\x00" + data).digest()


def blob_digest(*pieces: bytes | memoryview) -> bytes:
    """BLAKE3 of a blob, given whole or in pieces: its name, 32 bytes. Blobs are named without a domain."""
    hasher = blake3()
    for piece in pieces:
        hasher.update(piece)
    return hasher.digest()


def keyed_bytes(key: bytes, count: int) -> bytes:
    """The first `count` bytes of the stream that BLAKE3 expands from `key` – the protocol's only dice."""
    return blake3(key).digest(length=count)


def _ordered(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"a record may nest {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool | str | bytes):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError("a record may not hold integers beyond 64 bits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a record may not hold NaN or infinity")
        return value
    if isinstance(value, list | tuple):
        return [_ordered(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("the keys of a map are strings")
        return {key: _ordered(value[key], depth + 1) for key in sorted(value)}
    raise TypeError(f"a record cannot hold {type(value).__name__}")
