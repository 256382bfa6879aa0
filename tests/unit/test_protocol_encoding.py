"""Canonical msgpack: one value, one encoding; and names that cannot be confused."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import Reject
from p2pasr.protocol.encoding import MAX_DEPTH, blob_digest, digest, keyed_bytes, pack, unpack

LIMIT = 1 << 16

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
    | st.binary(max_size=300)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=20).map(tuple) | st.dictionaries(st.text(max_size=40), inner, max_size=20),
    max_leaves=30,
)


def sloppy(value: Any, choose: Callable[[int], int]) -> bytes:
    """Any of the msgpack encodings of a value; `choose(n)` picks one of n."""
    if isinstance(value, bool) or value is None:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        forms = [
            bytes([code]) + struct.pack(f">{kind}", value)
            for code, kind, low, high in (
                (0xCC, "B", 0, 1 << 8),
                (0xCD, "H", 0, 1 << 16),
                (0xCE, "I", 0, 1 << 32),
                (0xCF, "Q", 0, 1 << 64),
                (0xD0, "b", -(1 << 7), 1 << 7),
                (0xD1, "h", -(1 << 15), 1 << 15),
                (0xD2, "i", -(1 << 31), 1 << 31),
                (0xD3, "q", -(1 << 63), 1 << 63),
            )
            if low <= value < high
        ]
        if -32 <= value < 128:
            forms.append(struct.pack(">b", value))
        return forms[choose(len(forms))]
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return _header(len(data), choose, (0xA0, 32), {1: 0xD9, 2: 0xDA, 4: 0xDB}) + data
    if isinstance(value, bytes):
        return _header(len(value), choose, None, {1: 0xC4, 2: 0xC5, 4: 0xC6}) + value
    if isinstance(value, tuple):
        items = b"".join(sloppy(item, choose) for item in value)
        return _header(len(value), choose, (0x90, 16), {2: 0xDC, 4: 0xDD}) + items
    pairs = [sloppy(key, choose) + sloppy(item, choose) for key, item in value.items()]
    order = sorted(range(len(pairs)), key=lambda index: (choose(2), index))
    return _header(len(value), choose, (0x80, 16), {2: 0xDE, 4: 0xDF}) + b"".join(pairs[index] for index in order)


def _header(size: int, choose: Callable[[int], int], short: tuple[int, int] | None, long: dict[int, int]) -> bytes:
    forms = [bytes([code]) + size.to_bytes(width, "big") for width, code in long.items() if size < 1 << 8 * width]
    if short is not None and size < short[1]:
        forms.append(bytes([short[0] + size]))
    return forms[choose(len(forms))]


@given(values)
def test_a_value_survives_its_encoding(value: Any) -> None:
    assert unpack(pack(value), LIMIT) == value


@given(values, values)
def test_different_values_have_different_encodings(one: Any, other: Any) -> None:
    assert (pack(one) == pack(other)) == (repr(unpack(pack(one), LIMIT)) == repr(unpack(pack(other), LIMIT)))


@given(values, st.data())
def test_no_other_encoding_of_a_value_is_read(value: Any, data: st.DataObject) -> None:
    encoded = sloppy(value, lambda count: data.draw(st.integers(0, count - 1)) if count > 1 else 0)
    if encoded == pack(value):
        assert unpack(encoded, LIMIT) == value
    else:
        with pytest.raises(Reject):
            unpack(encoded, LIMIT)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_canonical_or_refused(data: bytes) -> None:
    try:
        value = unpack(data, LIMIT)
    except Reject:
        return
    assert pack(value) == data


@given(values, st.data())
def test_a_flipped_bit_never_goes_unnoticed(value: Any, data: st.DataObject) -> None:
    encoded = bytearray(pack(value))
    bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    try:
        read = unpack(bytes(encoded), LIMIT)
    except Reject:
        return
    assert repr(read) != repr(unpack(pack(value), LIMIT))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="a reserved byte"),
        pytest.param(b"\xc0\xc0", id="trailing bytes"),
        pytest.param(b"\x92\x01", id="an array cut short"),
        pytest.param(b"\xa5abc", id="a string cut short"),
        pytest.param(b"\xcc\x01", id="1 in two bytes"),
        pytest.param(b"\xcd\x00\x01", id="1 in three bytes"),
        pytest.param(b"\xd0\x01", id="1 in a signed form"),
        pytest.param(b"\xd0\xff", id="-1 in two bytes"),
        pytest.param(b"\xca\x3f\x80\x00\x00", id="a float32"),
        pytest.param(b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", id="NaN"),
        pytest.param(b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00", id="infinity"),
        pytest.param(b"\xcb\xff\xf0\x00\x00\x00\x00\x00\x00", id="minus infinity"),
        pytest.param(b"\xd9\x01a", id="a short string in the long form"),
        pytest.param(b"\xc5\x00\x01a", id="short bytes in the long form"),
        pytest.param(b"\xdc\x00\x01\x01", id="a short array in the long form"),
        pytest.param(b"\xde\x00\x01\xa1a\x01", id="a short map in the long form"),
        pytest.param(b"\x82\xa1b\x01\xa1a\x01", id="keys out of order"),
        pytest.param(b"\x82\xa1a\x01\xa1a\x01", id="a key twice"),
        pytest.param(b"\x81\x01\x01", id="an integer as key"),
        pytest.param(b"\x81\xc4\x01a\x01", id="bytes as key"),
        pytest.param(b"\x81\xc0\x01", id="None as key"),
        pytest.param(b"\xd4\x05\x00", id="an extension"),
        pytest.param(b"\xd6\xff\x00\x00\x00\x00", id="a timestamp"),
        pytest.param(b"\xa1\xff", id="a string that is not UTF-8"),
        pytest.param(b"\xa3\xed\xa0\x80", id="a lone surrogate"),
        pytest.param(b"\x91" * 100_000 + b"\xc0", id="a nest of 100,000 arrays"),
        pytest.param(b"\x81\xa1a" * 20_000 + b"\xc0", id="a nest of 20,000 maps"),
    ],
)
def test_what_pack_would_not_have_written_is_refused(data: bytes) -> None:
    with pytest.raises(Reject, match=r"^a record is not "):
        unpack(data, 1 << 20)


def test_records_nest_so_deep_and_no_deeper() -> None:
    deepest: Any = None
    for _ in range(MAX_DEPTH):
        deepest = (deepest,)
    assert unpack(pack(deepest), LIMIT) == deepest
    with pytest.raises(ValueError, match="levels"):
        pack((deepest,))
    with pytest.raises(Reject):
        unpack(b"\x91" + pack(deepest), LIMIT)


def test_a_record_longer_than_its_limit_is_refused_unseen() -> None:
    data = pack(b"x" * 100)
    assert unpack(data, len(data)) == b"x" * 100
    with pytest.raises(Reject, match=f"{len(data)} bytes exceeds the limit of {len(data) - 1}"):
        unpack(data, len(data) - 1)
    with pytest.raises(Reject, match="exceeds the limit"):
        unpack(b"\xc1" * 200, 100)


def test_arrays_that_announce_more_than_they_hold_cost_little_memory() -> None:
    nested = b"\xdd" + (1 << 24).to_bytes(4, "big")
    bomb = nested * 200_000
    tracemalloc.start()
    try:
        with pytest.raises(Reject):
            unpack(bomb, len(bomb))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 128 << 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), [1.0, float("nan")]])
def test_numbers_that_are_not_finite_have_no_encoding(value: Any) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        pack(value)


@pytest.mark.parametrize("value", [{1: 2}, {b"a": 1}, {"a": {None: 1}}, {"a": 1, 2: 3}])
def test_maps_whose_keys_are_not_strings_have_no_encoding(value: Any) -> None:
    with pytest.raises(ValueError, match="strings"):
        pack(value)


@pytest.mark.parametrize("value", [{1, 2}, object(), 1j, bytearray(b"a"), range(3), [object()]])
def test_other_types_have_no_encoding(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        pack(value)


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1])
def test_integers_that_msgpack_cannot_hold_are_refused_as_documented(value: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        pack(value)


def test_the_order_in_which_a_map_was_filled_does_not_matter() -> None:
    assert pack({"b": 1, "a": {"d": 2, "c": 3}}) == pack({"a": {"c": 3, "d": 2}, "b": 1})


def test_lists_and_tuples_are_the_same_sequence() -> None:
    assert pack([1, (2, [3])]) == pack((1, [2, (3,)]))


def test_a_float_keeps_its_sign_of_zero_and_is_never_an_integer() -> None:
    assert pack(0.0) != pack(-0.0)
    assert pack(1.0) != pack(1)
    assert pack(True) != pack(1)


def test_a_digest_is_of_one_kind_only() -> None:
    assert digest("claim", b"body") != digest("receipt", b"body")
    assert digest("claim", b"body") != blob_digest(b"body")


def test_what_moves_between_the_kind_and_the_body_changes_the_digest() -> None:
    assert digest("claim", b"s") != digest("claims", b"")
    assert digest("a", b"bc") != digest("ab", b"c")


def test_a_blob_is_named_by_its_plain_blake3() -> None:
    assert blob_digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert blob_digest(memoryview(b"abc")) == blob_digest(b"abc")


@given(st.binary(max_size=64), st.integers(0, 200), st.integers(0, 200))
def test_the_dice_are_one_stream(key: bytes, short: int, long: int) -> None:
    short, long = sorted((short, long))
    assert keyed_bytes(key, long)[:short] == keyed_bytes(key, short)
    assert len(keyed_bytes(key, long)) == long
