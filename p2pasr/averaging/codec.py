"""How a delta becomes bytes: deterministic codecs whose decoding gives the same bits everywhere.

A delta is one flat float32 vector, the parameters in ascending order of their names, cut into parts
of `part_values`. Each part is encoded by itself, so it can be hashed, sent and reduced by itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from p2pasr.errors import Reject
from p2pasr.protocol.manifest import AveragingSection

Vector = npt.NDArray[np.float32]
"""Shape (values,), float32, C-contiguous."""

CodecName = Literal["float32", "float16", "int8", "int4"]

INT8_LIMIT: Final = np.float32(127)
INT4_LIMIT: Final = np.float32(7)
FLOAT16_LIMIT: Final = np.float32(65_504)
FLOAT32_LIMIT: Final = float(np.finfo(np.float32).max)
LARGEST: Final = np.float32(2.0**32)
"""No value is encoded as a larger one. Sums, differences and squares of such values are far from what float32 holds, so
that every rule has a result and every outer optimizer a step, whatever the members of a group send."""

CEILING: Final = float(2 * LARGEST)
"""No larger value is decoded; the rounding of scales cannot lead so far."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One of the wire formats. Values beyond ±:data:`LARGEST`, or float16's largest, are encoded as that.

    ========  =====================================================  ====================
    name      encoding of a part of n values                         bytes
    ========  =====================================================  ====================
    float32   little-endian                                          4 n
    float16   little-endian, rounded to nearest even                 2 n
    int8      float32 absmax / 127 of each block, then the quotients n + 4 ⌈n / block⌉
    int4      float32 absmax / 7 of each block, then the quotients   ⌈n / 2⌉ + 4 ⌈n / block⌉
              plus 8, two in a byte, the lower half first
    ========  =====================================================  ====================

    Args:
        name: which.
        block: values that share a scale in `int8` and `int4`.
    """

    name: CodecName
    block: int = 256

    def encoded_bytes(self, values: int) -> int:
        """Exact length of an encoded part; anything else is refused before it is read."""
        if self.name == "float32":
            return 4 * values
        if self.name == "float16":
            return 2 * values
        scales = 4 * -(-values // self.block)
        return scales + (values if self.name == "int8" else -(-values // 2))

    def encode(self, part: Vector) -> bytes:
        """Encode finite values.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        if not np.isfinite(part).all():
            raise ValueError("a delta with values that are not finite has no encoding")
        part = np.clip(part, -LARGEST, LARGEST)
        if self.name == "float32":
            return bytes(part.astype("<f4").tobytes())
        if self.name == "float16":
            return bytes(np.clip(part, -FLOAT16_LIMIT, FLOAT16_LIMIT).astype("<f2").tobytes())
        limit = INT8_LIMIT if self.name == "int8" else INT4_LIMIT
        blocks = _padded(part, self.block)
        scales = np.abs(blocks).max(axis=1) / limit
        divisors = np.where(scales > 0, scales, np.float32(1))
        rounded = np.clip(np.rint(blocks / divisors[:, None]), -limit, limit).astype(np.int8)
        quotients = rounded.reshape(-1)[: len(part)]
        packed = quotients if self.name == "int8" else _pack_halves(quotients)
        return bytes(scales.astype("<f4").tobytes() + packed.tobytes())

    def ceiling(self, largest: float) -> float:
        """No decoded value is larger in magnitude where no encoded one was larger than `largest`.

        float16 rounds by a part in 2¹¹, and by 2⁻²⁵ below 6e-5, where its steps are equal; the others by less. For
        infinity it is the largest value that there is.
        """
        return min(largest * (1 + 2.0**-11) + 2.0**-25, FLOAT32_LIMIT)

    def decode(self, data: bytes | memoryview, values: int) -> Vector:
        """Decode a part; the same bytes give the same bits on every machine.

        Raises:
            Reject: the length does not fit, or a value is not finite or beyond ±:data:`CEILING`.
        """
        if len(data) != self.encoded_bytes(values):
            raise Reject(f"a part of {values} values has {self.encoded_bytes(values)} bytes, not {len(data)}")
        if self.name == "float32":
            part = np.frombuffer(data, dtype="<f4").astype(np.float32)
        elif self.name == "float16":
            part = np.frombuffer(data, dtype="<f2").astype(np.float32)
        else:
            part = self._decode_blocks(data, values)
        if not (np.abs(part) <= CEILING).all():
            raise Reject(f"a part holds values that are not finite or beyond ±{CEILING:.1e}")
        return part

    def _decode_blocks(self, data: bytes | memoryview, values: int) -> Vector:
        scales = np.frombuffer(data, dtype="<f4", count=-(-values // self.block))
        packed = np.frombuffer(data, dtype=np.int8, offset=4 * len(scales))
        quotients = packed if self.name == "int8" else _unpack_halves(packed)[:values]
        with np.errstate(over="ignore", invalid="ignore"):  # `decode` refuses what is not finite
            products: Vector = np.multiply(_padded(quotients, self.block), scales[:, None], dtype=np.float32)
        return products.reshape(-1)[:values]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the delta of a run is cut up: known to everybody before a byte is sent.

    Args:
        values: trained values in the run.
        part_values: values in a part; the last one may hold fewer.
        codec: how parts are encoded.
    """

    values: int
    part_values: int
    codec: Codec

    @classmethod
    def of(cls, parameters: int, section: AveragingSection) -> Layout:
        """The layout that a manifest prescribes."""
        return cls(parameters, section.part_values, Codec(section.codec, section.block))

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.values // self.part_values)

    def part_size(self, index: int) -> int:
        """Values in one part."""
        return min(self.part_values, self.values - index * self.part_values)

    def part_bytes(self, index: int) -> int:
        """Encoded bytes of one part."""
        return self.codec.encoded_bytes(self.part_size(index))

    def offset(self, index: int) -> int:
        """Where a part begins in the encoded delta."""
        return index * self.codec.encoded_bytes(self.part_values)

    @property
    def total_bytes(self) -> int:
        """Bytes of an encoded delta."""
        return self.offset(self.parts - 1) + self.part_bytes(self.parts - 1)

    def cuts(self) -> Iterator[slice]:
        """Which values each part holds."""
        return (slice(at, min(at + self.part_values, self.values)) for at in range(0, self.values, self.part_values))

    def differences(
        self, start: Mapping[str, npt.NDArray[Any]], end: Mapping[str, npt.NDArray[Any]]
    ) -> Iterator[Vector]:
        """What leads from one set of parameters to another, part by part, before it is encoded."""
        before, after = Flat(start), Flat(end)
        return (after[cut] - before[cut] for cut in self.cuts())

    def encode(self, vector: Vector) -> list[bytes]:
        """The encoded parts of a delta."""
        if vector.shape != (self.values,):
            raise ValueError(f"a delta of {self.values} values has the shape {vector.shape}")
        return [self.codec.encode(vector[cut]) for cut in self.cuts()]

    def cut(self, data: bytes | memoryview) -> list[memoryview]:
        """The encoded parts of an encoded delta.

        Raises:
            Reject: it has another length than this layout's.
        """
        view = memoryview(data)
        if len(view) != self.total_bytes:
            raise Reject(f"an encoded delta has {self.total_bytes} bytes, not {len(view)}")
        return [view[self.offset(i) : self.offset(i) + self.part_bytes(i)] for i in range(self.parts)]

    def decode(self, data: bytes | memoryview) -> Vector:
        """The delta that encoded bytes stand for.

        Raises:
            Reject: the length does not fit, or a value is none that may be sent, see :meth:`Codec.decode`.
        """
        parts = self.cut(data)
        return np.concatenate([self.codec.decode(part, self.part_size(i)) for i, part in enumerate(parts)])


class Flat:
    """Named float32 arrays as one vector, in ascending order of their names; only what is sliced is copied.

    Args:
        params: the arrays.
    """

    def __init__(self, params: Mapping[str, npt.NDArray[Any]]) -> None:
        self._arrays = [np.asarray(params[name], dtype=np.float32).reshape(-1) for name in sorted(params)]
        self._starts = [0, *accumulate(map(len, self._arrays))]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, cut: slice) -> Vector:
        """A slice of step 1, as a new array."""
        start, stop, _ = cut.indices(len(self))
        first = max(0, bisect_right(self._starts, start) - 1)
        pieces = []
        for array, offset in zip(self._arrays[first:], self._starts[first:], strict=False):
            if offset >= stop:
                break
            pieces.append(array[max(0, start - offset) : stop - offset])
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)


class Decoded(Mapping[str, npt.NDArray[np.float32]]):
    """An encoded delta as named arrays, each decoded when it is asked for; the inverse of :class:`Flat`.

    Args:
        data: the encoded delta.
        layout: how it is cut up.
        like: arrays with the names and shapes of the parameters.

    Raises:
        Reject: the length does not fit.
        ValueError: `like` has another number of values than the layout.
    """

    def __init__(self, data: bytes | memoryview, layout: Layout, like: Mapping[str, npt.NDArray[Any]]) -> None:
        self._parts = layout.cut(data)
        self._layout = layout
        self._shapes = {name: like[name].shape for name in like}
        self._starts: dict[str, int] = {}
        offset = 0
        for name in sorted(like):
            self._starts[name] = offset
            offset += like[name].size
        if offset != layout.values:
            raise ValueError(f"{layout.values} values do not fit parameters of {offset}")

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        """One array.

        Raises:
            KeyError: there is none of that name.
            Reject: a value in the parts that hold it is none that may be sent, see :meth:`Codec.decode`.
        """
        start, shape = self._starts[name], self._shapes[name]
        out = np.empty(prod(shape), dtype=np.float32)
        size, stop = self._layout.part_values, start + len(out)
        for index in range(start // size, -(-stop // size)):
            part = self._layout.codec.decode(self._parts[index], self._layout.part_size(index))
            first, last = max(start, index * size), min(stop, index * size + len(part))
            out[first - start : last - start] = part[first - index * size : last - index * size]
        return out.reshape(shape)


def _pack_halves(quotients: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Two values of -7…7 in a byte, each plus 8, the first in the lower half; an odd one beside a zero."""
    shifted = np.full(-(-len(quotients) // 2) * 2, 8, dtype=np.uint8)
    shifted[: len(quotients)] = (quotients + 8).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = np.bitwise_or(shifted[::2], np.left_shift(shifted[1::2], np.uint8(4)))
    return packed


def _unpack_halves(packed: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """The inverse of :func:`_pack_halves`, as many values as halves."""
    halves = packed.view(np.uint8)
    out = np.empty(2 * len(halves), dtype=np.int8)
    out[::2] = (halves & 15).astype(np.int8) - 8
    out[1::2] = (halves >> 4).astype(np.int8) - 8
    return out


def _padded(values: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """Shape (blocks, block), the last block filled with zeros."""
    blocks = -(-len(values) // block)
    out = np.zeros(blocks * block, dtype=values.dtype)
    out[: len(values)] = values
    return out.reshape(blocks, block)
