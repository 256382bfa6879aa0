"""Codecs: exact lengths, bounded errors, equal bits; and layouts that cut without loss."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging.codec import CEILING, LARGEST, Codec, Decoded, Flat, Layout, Vector
from p2pasr.errors import Reject
from p2pasr.protocol.manifest import AveragingSection

from .builders import initial_params, random_delta

CODECS = [
    Codec("float32"),
    Codec("float16"),
    Codec("int8", 16),
    Codec("int8", 64),
    Codec("int4", 16),
    Codec("int4", 64),
]
LIMITS = {"int8": 127, "int4": 7}
BLOCKWISE = pytest.mark.parametrize("codec", CODECS[2:], ids=lambda codec: f"{codec.name}/{codec.block}")
EACH = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}/{codec.block}")

TINY = np.finfo(np.float32).smallest_normal


def vectors(limit: float, least: int = 1, most: int = 100) -> st.SearchStrategy[Vector]:
    bound = float(np.float32(limit))
    elements = st.floats(-bound, bound, width=32).map(lambda value: 0.0 if 0 < abs(value) < TINY else value)
    return st.lists(elements, min_size=least, max_size=most).map(lambda values: np.array(values, dtype=np.float32))


def block_scales(codec: Codec, vector: Vector) -> Vector:
    """For each value, the largest magnitude in its block divided by the codec's largest quotient."""
    maxima = [np.abs(vector[cut : cut + codec.block]).max() for cut in range(0, len(vector), codec.block)]
    return np.repeat(np.array(maxima, np.float32), codec.block)[: len(vector)] / np.float32(LIMITS[codec.name])


@EACH
@given(vector=vectors(LARGEST))
def test_an_encoding_has_exactly_the_announced_length(codec: Codec, vector: Vector) -> None:
    assert len(codec.encode(vector)) == codec.encoded_bytes(len(vector))


@EACH
@given(vector=vectors(6e4))
def test_the_same_bytes_decode_to_the_same_bits(codec: Codec, vector: Vector) -> None:
    encoded = codec.encode(vector)
    decoded = codec.decode(encoded, len(vector))
    assert decoded.dtype == np.float32
    assert decoded.shape == vector.shape
    assert decoded.tobytes() == codec.decode(memoryview(bytearray(encoded)), len(vector)).tobytes()
    assert codec.encode(vector.copy()) == encoded


@given(vectors(LARGEST))
def test_float32_loses_nothing(vector: Vector) -> None:
    codec = Codec("float32")
    assert codec.decode(codec.encode(vector), len(vector)).tobytes() == vector.tobytes()


@given(vectors(65_504))
def test_float16_is_the_nearest_half(vector: Vector) -> None:
    codec = Codec("float16")
    encoded = codec.encode(vector)
    assert encoded == b"".join(struct.pack("<e", value) for value in vector.tolist())
    decoded = codec.decode(encoded, len(vector))
    bound = np.maximum(np.abs(vector) * 2.0**-11, 2.0**-25)
    assert (np.abs(decoded.astype(np.float64) - vector) <= bound).all()


@pytest.mark.parametrize(("value", "expected"), [(65_520, 65_504), (1e30, 65_504), (-3e38, -65_504), (65_504, 65_504)])
def test_float16_stops_at_its_largest_value(value: float, expected: float) -> None:
    codec = Codec("float16")
    assert codec.decode(codec.encode(np.array([value], np.float32)), 1).tolist() == [expected]


@BLOCKWISE
@given(vector=vectors(LARGEST))
def test_a_value_is_off_by_half_a_step_of_its_block_at_most(codec: Codec, vector: Vector) -> None:
    decoded = codec.decode(codec.encode(vector), len(vector))
    scales = block_scales(codec, vector).astype(np.float64)
    assert (np.abs(decoded.astype(np.float64) - vector) <= scales * (0.5 + 1e-4)).all()


@BLOCKWISE
@given(vector=vectors(LARGEST))
def test_the_largest_value_of_a_block_and_every_sign_are_kept(codec: Codec, vector: Vector) -> None:
    decoded = codec.decode(codec.encode(vector), len(vector))
    assert (decoded * np.sign(vector) >= 0).all()
    for cut in range(0, len(vector), codec.block):
        largest = np.abs(vector[cut : cut + codec.block]).max()
        assert np.abs(decoded[cut : cut + codec.block]).max() == pytest.approx(largest, rel=1e-6)


@given(vectors(LARGEST))
def test_int8_is_the_scales_and_then_the_quotients(vector: Vector) -> None:
    codec = Codec("int8", 16)
    encoded = codec.encode(vector)
    blocks = -(-len(vector) // 16)
    scales = np.frombuffer(encoded[: 4 * blocks], "<f4")
    quotients = np.frombuffer(encoded[4 * blocks :], np.int8)
    assert len(quotients) == len(vector)
    assert np.abs(quotients.astype(int)).max() <= 127
    np.testing.assert_array_equal(scales, block_scales(codec, vector)[::16])


@given(vectors(LARGEST))
def test_int4_is_the_scales_and_then_two_quotients_in_a_byte(vector: Vector) -> None:
    codec = Codec("int4", 16)
    encoded = codec.encode(vector)
    blocks = -(-len(vector) // 16)
    np.testing.assert_array_equal(np.frombuffer(encoded[: 4 * blocks], "<f4"), block_scales(codec, vector)[::16])
    halves = [half for byte in encoded[4 * blocks :] for half in (byte & 15, byte >> 4)]
    assert len(halves) == len(vector) + len(vector) % 2
    assert all(1 <= half <= 15 for half in halves)
    assert halves[len(vector) :] == [8] * (len(vector) % 2)
    decoded = codec.decode(encoded, len(vector)).tolist()
    assert [half - 8 for half in halves[: len(vector)] if half != 8] == [
        round(value / scale)
        for value, scale in zip(decoded, block_scales(codec, vector).tolist(), strict=True)
        if value
    ]


@EACH
@given(vector=vectors(LARGEST), factor=st.sampled_from([1.0, 1e-20, 1e-33, 1e-37]))
def test_no_decoded_value_is_above_the_ceiling_of_those_encoded(codec: Codec, vector: Vector, factor: float) -> None:
    vector = vector * np.float32(factor)
    decoded = codec.decode(codec.encode(vector), len(vector))
    largest = float(np.abs(vector).max())
    assert float(np.abs(decoded).max()) <= codec.ceiling(largest) <= 1.001 * largest + 2.0**-24


def test_the_ceiling_allows_for_float16_doubling_the_smallest_numbers() -> None:
    codec = Codec("float16")
    value = np.nextafter(np.float32(2.0**-25), np.float32(1))  # just above the middle between 0 and the first number
    (decoded,) = codec.decode(codec.encode(np.array([value])), 1).tolist()
    assert decoded == 2.0**-24 > 1.99 * value
    assert decoded <= codec.ceiling(float(value))


@EACH
def test_where_there_is_no_largest_value_the_ceiling_is_the_largest_there_is(codec: Codec) -> None:
    assert codec.ceiling(math.inf) == np.finfo(np.float32).max


@EACH
@pytest.mark.parametrize("value", [2 * LARGEST, np.finfo(np.float32).max])
def test_no_value_is_encoded_as_a_larger_one_than_all_decode(codec: Codec, value: float) -> None:
    vector = np.array([value, -value, 1.0], np.float32)
    decoded = codec.decode(codec.encode(vector), 3)
    largest = 65_504 if codec.name == "float16" else float(LARGEST)
    np.testing.assert_allclose(decoded[:2], [largest, -largest], rtol=1e-6)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.name != "float16"], ids=lambda c: c.name)
def test_a_part_with_a_value_from_which_arithmetic_could_overflow_is_refused(codec: Codec) -> None:
    number = np.array([1.01 * CEILING], "<f4").tobytes()
    filled = number * 40 if codec.name == "float32" else number * -(-40 // codec.block) + b"\x7f" * 40
    with pytest.raises(Reject, match=r"not finite or beyond ±8\.6e\+09"):
        codec.decode(filled[: codec.encoded_bytes(40)], 40)


@EACH
def test_zeros_stay_zeros(codec: Codec) -> None:
    decoded = codec.decode(codec.encode(np.zeros(50, np.float32)), 50)
    assert decoded.tolist() == [0.0] * 50


@pytest.mark.parametrize("value", [1e-45, 2.7e-43, -1e-40, 3e-39])
def test_int8_brings_values_too_small_for_a_step_no_further_from_zero(value: float) -> None:
    codec = Codec("int8", 16)
    (decoded,) = codec.decode(codec.encode(np.array([value], np.float32)), 1).tolist()
    assert 0 <= decoded / value <= 1.01


@EACH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_have_no_encoding(codec: Codec, value: float) -> None:
    vector = random_delta(1, 40)
    vector[33] = value
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(vector)


@EACH
@pytest.mark.parametrize("off", [-4, -1, 1, 4])
def test_bytes_of_another_length_are_refused(codec: Codec, off: int) -> None:
    encoded = codec.encode(random_delta(1, 40))
    data = encoded[:off] if off < 0 else encoded + bytes(off)
    with pytest.raises(Reject, match=f"a part of 40 values has {len(encoded)} bytes, not {len(data)}"):
        codec.decode(data, 40)
    with pytest.raises(Reject):
        codec.decode(b"", 40)


@EACH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_part_whose_first_number_is_not_finite_is_refused(codec: Codec, value: float) -> None:
    # In int8, infinity times the zeros of the padding is not a number.
    number = np.array([value], "<f2" if codec.name == "float16" else "<f4").tobytes()
    encoded = codec.encode(random_delta(1, 40))
    with pytest.raises(Reject, match="not finite"):
        codec.decode(number + encoded[len(number) :], 40)


def test_a_scale_that_makes_a_value_overflow_is_refused_without_a_warning() -> None:
    codec = Codec("int8", 16)
    data = np.array([3e38], "<f4").tobytes() + b"\x7f" * 16
    with pytest.raises(Reject, match="not finite"):
        codec.decode(data, 16)


@EACH
@given(data=st.data())
def test_any_bytes_of_the_right_length_are_finite_or_refused(codec: Codec, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 20))
    length = codec.encoded_bytes(size)
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            decoded = codec.decode(data.draw(st.binary(min_size=length, max_size=length)), size)
        except Reject:
            return
    assert np.isfinite(decoded).all()


layouts = st.builds(
    lambda values, blocks, codec: Layout(values, blocks * codec.block, codec),
    st.integers(1, 2000),
    st.integers(1, 8),
    st.sampled_from([Codec("float32", 16), Codec("float16", 16), Codec("int8", 16), Codec("int4", 16)]),
)


@given(layouts)
def test_a_layout_cuts_all_values_into_parts_without_gap_or_overlap(layout: Layout) -> None:
    assert sum(layout.part_size(index) for index in range(layout.parts)) == layout.values
    assert all(1 <= layout.part_size(index) <= layout.part_values for index in range(layout.parts))
    assert layout.total_bytes == sum(layout.part_bytes(index) for index in range(layout.parts))
    offset = 0
    for index in range(layout.parts):
        assert layout.offset(index) == offset
        offset += layout.part_bytes(index)


@given(layouts)
def test_the_parts_of_a_delta_are_what_it_is_cut_into(layout: Layout) -> None:
    parts = layout.encode(random_delta(layout.values, layout.values))
    joined = b"".join(parts)
    assert [bytes(part) for part in layout.cut(joined)] == parts
    whole = layout.decode(joined)
    pieces = [layout.codec.decode(part, layout.part_size(index)) for index, part in enumerate(parts)]
    assert whole.tobytes() == np.concatenate(pieces).tobytes()
    assert whole.shape == (layout.values,)


@given(layouts)
def test_parts_do_not_depend_on_each_other(layout: Layout) -> None:
    delta = random_delta(7, layout.values)
    changed = delta.copy()
    changed[0] += 1000
    assert layout.encode(delta)[1:] == layout.encode(changed)[1:]


@given(layouts, st.integers(-5, 5).filter(bool))
def test_a_delta_of_another_length_is_refused(layout: Layout, off: int) -> None:
    data = bytes(max(0, layout.total_bytes + off))
    with pytest.raises(Reject, match=f"has {layout.total_bytes} bytes, not {len(data)}"):
        layout.cut(data)
    with pytest.raises(Reject):
        layout.decode(data)
    with pytest.raises(ValueError, match="has the shape"):
        layout.encode(np.zeros(max(0, layout.values + off), np.float32))


def test_a_layout_is_the_one_that_the_manifest_prescribes() -> None:
    layout = Layout.of(600, AveragingSection(codec="int8", block=32, part_values=256))
    assert layout == Layout(600, 256, Codec("int8", 32))
    assert layout.parts == 3
    assert [layout.part_size(index) for index in range(3)] == [256, 256, 88]
    assert [layout.part_bytes(index) for index in range(3)] == [256 + 32, 256 + 32, 88 + 12]


def test_parameters_are_one_vector_in_the_order_of_their_names() -> None:
    params = initial_params()
    vector = Flat(params)[:]
    assert vector.dtype == np.float32
    np.testing.assert_array_equal(vector[:400], params["decoder.b"])
    np.testing.assert_array_equal(vector[400:], params["encoder.a"].reshape(-1))
    np.testing.assert_array_equal(Flat(dict(reversed(params.items())))[:], vector)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.data())
def test_a_slice_of_the_vector_is_the_slice_of_the_whole(sizes: list[int], data: st.DataObject) -> None:
    params = {f"{number:02d}": random_delta(number, size) for number, size in enumerate(sizes)}
    whole = np.concatenate(list(params.values()))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    np.testing.assert_array_equal(Flat(params)[start:stop], whole[start:stop])
    assert len(Flat(params)) == len(whole)


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int4"])
def test_what_was_encoded_takes_its_names_and_shapes_again(codec: Any) -> None:
    params, layout = initial_params(), Layout(600, 256, Codec(codec, 32))
    encoded = b"".join(layout.encode(Flat(params)[:]))
    again = Decoded(encoded, layout, params)
    assert list(again) == list(params)
    assert len(again) == len(params)
    assert {name: value.shape for name, value in again.items()} == {name: v.shape for name, v in params.items()}
    np.testing.assert_array_equal(Flat(again)[:], layout.decode(encoded))
    with pytest.raises(KeyError):
        again["nothing"]


def test_an_encoded_delta_that_does_not_fit_takes_no_names() -> None:
    layout = Layout(599, 256, Codec("float32"))
    with pytest.raises(ValueError, match="599 values do not fit parameters of 600"):
        Decoded(bytes(layout.total_bytes), layout, initial_params())
    with pytest.raises(Reject):
        Decoded(bytes(layout.total_bytes - 1), layout, initial_params())
