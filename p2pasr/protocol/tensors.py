"""Named arrays as safetensors files with exactly one encoding.

The safetensors library writes a valid file, but which of several valid ones may change between its
versions. States and checkpoints are agreed on by digest, so here the layout is fixed: the header's
keys ascend, the data lies without gaps, wider elements first (so that each array is aligned) and by
name among equals, one metadata entry holds JSON with sorted keys, and spaces pad the header to a
multiple of eight. Any safetensors reader loads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from p2pasr.errors import Reject

Tensors = dict[str, npt.NDArray[Any]]
"""Name → C-contiguous array."""

METADATA_KEY: Final = "p2pasr"
MAX_HEADER_BYTES: Final = 16 << 20
"""Longest header that is parsed; a shard of 10,000 clips needs a few kilobytes."""

_TO_NAME: Final[dict[np.dtype[Any], str]] = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}
_FROM_NAME: Final[dict[str, np.dtype[Any]]] = {name: dtype for dtype, name in _TO_NAME.items()}


def forms(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Name → shape and dtype: what two sets of arrays have in common that can be compared."""
    return {name: (array.shape, array.dtype) for name, array in tensors.items()}


def pack_tensors(tensors: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> bytes:
    """The canonical safetensors bytes of named arrays and a JSON-able description.

    Raises:
        TypeError: an array's dtype is not float32, float16, int64, int32, int8 or uint8.
    """
    return b"".join(tensor_pieces(tensors, meta))


def tensor_pieces(tensors: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> tuple[bytes | memoryview, ...]:
    """The bytes of :func:`pack_tensors` in pieces, which are views of the arrays where these lie in one run.

    Raises:
        TypeError: as :func:`pack_tensors`.
    """
    for name, array in tensors.items():
        if array.dtype not in _TO_NAME:
            raise TypeError(f"tensor {name!r} has dtype {array.dtype}, which has no canonical encoding")
    arrays = (np.ascontiguousarray(tensors[name]).reshape(-1) for name in _order(tensors))
    return (_head(tensors, meta), *(array.view(np.uint8).data for array in arrays))


def unpack_tensors(data: bytes | memoryview) -> tuple[Tensors, dict[str, Any]]:
    """Read bytes that :func:`pack_tensors` wrote.

    Every length is checked against the bytes that are there before an array is made; the arrays are
    read-only views of `data`.

    Raises:
        Reject: the bytes are not the canonical layout.
    """
    view = memoryview(data)
    if len(view) < 8:
        raise Reject("a tensor file is shorter than its own header")
    length = int.from_bytes(view[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(view) - 8):
        raise Reject(f"a tensor file announces a header of {length} bytes")
    try:
        header = json.loads(bytes(view[8 : 8 + length]))
        meta = json.loads(header.pop("__metadata__")[METADATA_KEY])
        tensors = _arrays(header, view[8 + length :])
        canonical = _head(tensors, meta)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Reject(f"a tensor file has a malformed header ({type(error).__name__}: {error})") from None
    if not isinstance(meta, dict):
        raise Reject("a tensor file's description is not a map")
    if view[: 8 + length] != canonical:
        raise Reject("a tensor file's header is not in canonical form")
    return tensors, meta


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Map a file that :func:`pack_tensors` wrote; arrays are read from disk as they are touched."""
    return unpack_tensors(np.memmap(path, dtype=np.uint8, mode="r").data)


def _head(tensors: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> bytes:
    """Everything before the data: the header's length, the header, and the spaces that pad it."""
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: _json(meta)}}
    offset = 0
    for name in _order(tensors):
        array = tensors[name]
        header[name] = {
            "dtype": _TO_NAME[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    head = _json(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _order(tensors: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """In which order the arrays lie: wider elements first, by name among equals."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _arrays(header: dict[str, Any], body: memoryview) -> Tensors:
    dtypes: dict[str, np.dtype[Any]] = {name: _FROM_NAME[entry["dtype"]] for name, entry in header.items()}
    tensors: Tensors = {}
    offset = 0
    for name in sorted(header, key=lambda name: (-dtypes[name].itemsize, name)):
        shape = tuple(header[name]["shape"])
        if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
            raise ValueError(f"{name!r} has the shape {shape}")
        end = offset + math.prod(shape) * dtypes[name].itemsize
        if header[name]["data_offsets"] != [offset, end] or end > len(body):
            raise ValueError(f"{name!r} does not lie where its shape says")
        tensors[name] = np.frombuffer(body[offset:end], dtype=dtypes[name]).reshape(shape)
        offset = end
    if offset != len(body):
        raise ValueError(f"{len(body) - offset} bytes follow the last array")
    return tensors


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
