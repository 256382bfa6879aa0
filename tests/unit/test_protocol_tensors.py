"""Tensor files: readable by any safetensors reader, with one layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from p2pasr.errors import Reject
from p2pasr.protocol.tensors import MAX_HEADER_BYTES, Tensors, pack_tensors, read_tensors, unpack_tensors

DTYPES = [np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype=dtype).reshape(shape)


named = st.dictionaries(st.text(max_size=12).filter(lambda name: name != "__metadata__"), arrays(), max_size=5)
descriptions = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    max_size=4,
)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        (one[name].dtype, one[name].shape, one[name].tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name in one
    )


def example() -> bytes:
    tensors = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "ids": np.array([3, 1, 2], dtype=np.int64),
        "mel": np.array([0.5, -1.5], dtype=np.float16),
        "flag": np.array([1], dtype=np.uint8),
    }
    return pack_tensors(tensors, {"format": "example/1", "round": 7})


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def body_of(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]


def file_of(head: bytes, body: bytes) -> bytes:
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + body


def compact(header: Any) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def test_the_helpers_of_these_tests_rebuild_a_file_exactly() -> None:
    assert file_of(compact(header_of(example())), body_of(example())) == example()


@given(named, descriptions)
def test_arrays_and_description_survive(tensors: Tensors, meta: dict[str, Any]) -> None:
    read, description = unpack_tensors(pack_tensors(tensors, meta))
    assert same(read, tensors)
    assert description == meta


@given(named)
def test_safetensors_own_reader_reads_the_same_arrays(tensors: Tensors) -> None:
    assert same(load(pack_tensors(tensors, {"any": 1})), tensors)


@given(named, st.randoms(use_true_random=False))
def test_the_order_of_the_names_does_not_matter(tensors: Tensors, random: Any) -> None:
    names = list(tensors)
    random.shuffle(names)
    assert pack_tensors({name: tensors[name] for name in names}, {}) == pack_tensors(tensors, {})


@given(named)
def test_every_array_is_aligned_to_its_elements(tensors: Tensors) -> None:
    data = pack_tensors(tensors, {})
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    for name, entry in header_of(data).items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % tensors[name].dtype.itemsize == 0


def test_arrays_in_any_memory_layout_are_written_alike() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert pack_tensors({"a": np.asfortranarray(array)}, {}) == pack_tensors({"a": array}, {})
    assert pack_tensors({"a": np.repeat(array, 2, axis=1)[:, ::2]}, {}) == pack_tensors({"a": array}, {})


@pytest.mark.parametrize("dtype", [np.float64, np.bool_, np.complex64, ">f4", np.uint32, "U3", object])
def test_other_types_of_elements_have_no_encoding(dtype: Any) -> None:
    with pytest.raises(TypeError, match="no canonical encoding"):
        pack_tensors({"a": np.zeros(2, dtype=dtype)}, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_description_holds_finite_numbers_only(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        pack_tensors({}, {"loss": value})


def test_what_was_read_cannot_be_written_to() -> None:
    read, _ = unpack_tensors(example())
    assert not any(array.flags.writeable for array in read.values())


def test_a_mapped_file_reads_like_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(example())
    mapped, meta = read_tensors(path)
    read, description = unpack_tensors(example())
    assert same(mapped, read)
    assert meta == description
    assert not any(array.flags.writeable for array in mapped.values())


@pytest.mark.parametrize("length", range(8))
def test_a_file_without_a_header_is_refused(length: int) -> None:
    with pytest.raises(Reject, match="shorter than its own header"):
        unpack_tensors(bytes(length))


@pytest.mark.parametrize("announced", [1, 8, MAX_HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(announced: int) -> None:
    with pytest.raises(Reject, match=f"announces a header of {announced} bytes"):
        unpack_tensors(announced.to_bytes(8, "little"))


def test_a_header_longer_than_the_limit_is_refused_even_if_it_is_there() -> None:
    padded = compact(header_of(example())) + b" " * (MAX_HEADER_BYTES + 8)
    with pytest.raises(Reject, match="announces a header"):
        unpack_tensors(file_of(padded, body_of(example())))


@pytest.mark.parametrize("cut", range(0, len(example()), 7))
def test_a_file_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(Reject):
        unpack_tensors(example()[:cut])


def test_bytes_after_the_last_array_are_refused() -> None:
    with pytest.raises(Reject, match="follow the last array"):
        unpack_tensors(example() + b"\x00")


def test_every_flipped_bit_of_a_header_is_refused_or_changes_what_is_read() -> None:
    data = example()
    tensors, meta = unpack_tensors(data)
    for bit in range(8 * (8 + int.from_bytes(data[:8], "little"))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            read, description = unpack_tensors(bytes(flipped))
        except Reject:
            continue
        assert not (same(read, tensors) and description == meta), f"bit {bit} changes nothing"


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("weight", {"dtype": "F64"}),
        ("weight", {"dtype": "f32"}),
        ("weight", {"dtype": None}),
        ("weight", {"dtype": ["F32"]}),
        ("weight", {"dtype": "I32", "shape": [3, 3]}),
        ("weight", {"shape": [2, 4]}),
        ("weight", {"shape": [2, 2]}),
        ("weight", {"shape": [-2, -3]}),
        ("weight", {"shape": [2.0, 3.0]}),
        ("weight", {"shape": ["2", "3"]}),
        ("weight", {"shape": 6}),
        ("weight", {"shape": None}),
        ("weight", {"shape": [1 << 39, 1 << 39]}),
        ("weight", {"shape": [1 << 41, 0]}),
        ("weight", {"shape": [6] + [1] * 100}),
        ("weight", {"data_offsets": [0, 24]}),
        ("weight", {"data_offsets": [24, 52]}),
        ("weight", {"data_offsets": [24, 24]}),
        ("weight", {"data_offsets": [48, 24]}),
        ("weight", {"data_offsets": [-24, 0]}),
        ("weight", {"data_offsets": [24]}),
        ("weight", {"data_offsets": None}),
        ("flag", {"shape": [True]}),
        ("flag", {"shape": [2], "data_offsets": [52, 54]}),
        ("flag", {"shape": [1 << 39], "data_offsets": [52, 52 + (1 << 39)]}),
    ],
)
def test_an_array_that_does_not_lie_where_it_belongs_is_refused(name: str, entry: dict[str, Any]) -> None:
    header = header_of(example())
    header[name].update(entry)
    with pytest.raises(Reject, match="malformed header"):
        unpack_tensors(file_of(compact(header), body_of(example())))


@pytest.mark.parametrize("missing", ["dtype", "shape", "data_offsets"])
def test_an_array_without_its_description_is_refused(missing: str) -> None:
    header = header_of(example())
    del header["weight"][missing]
    with pytest.raises(Reject, match="malformed header"):
        unpack_tensors(file_of(compact(header), body_of(example())))


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="not JSON"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(b"{}", id="no metadata"),
        pytest.param(b'{"__metadata__":{}}', id="no metadata of ours"),
        pytest.param(b'{"__metadata__":{"p2pasr":{}}}', id="metadata that is no text"),
        pytest.param(b'{"__metadata__":{"p2pasr":"{"}}', id="metadata that is not JSON"),
        pytest.param(b'{"__metadata__":{"p2pasr":"[]"}}', id="metadata that is no map"),
        pytest.param(b'{"__metadata__":[]}', id="metadata in a list"),
        pytest.param(b'{"__metadata__":{"p2pasr":"{}"},"a":[]}', id="an array that is a list"),
        pytest.param(b'{"__metadata__":{"p2pasr":"{}"},"a":null}', id="an array that is null"),
    ],
)
def test_a_header_that_is_none_is_refused(head: bytes) -> None:
    with pytest.raises(Reject):
        unpack_tensors(file_of(head, b""))


def other_layouts() -> dict[str, bytes]:
    """Files that hold the arrays of the example, written in another way than `pack_tensors` writes them."""
    header, body = header_of(example()), body_of(example())
    changed = {name: dict(entry) for name, entry in header.items()}
    changed["weight"]["data_offsets"] = [24.0, 48.0]
    with_scalar = {"__metadata__": {"p2pasr": "{}"}, "a": {"dtype": "U8", "shape": "", "data_offsets": [0, 1]}}
    padding = compact(header)
    return {
        "keys out of order": file_of(json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode(), body),
        "spaces inside": file_of(json.dumps(header, sort_keys=True).encode(), body),
        "spaces beyond the padding": file_of(padding + b" " * (8 + -len(padding) % 8), body),
        "no padding": len(padding).to_bytes(8, "little") + padding + body,
        "a key twice": file_of(padding[:-1] + b',"flag":' + compact(header["flag"]) + b"}", body),
        "a further key of an array": file_of(compact({**header, "flag": {**header["flag"], "note": "x"}}), body),
        "further metadata": file_of(compact({**header, "__metadata__": {**header["__metadata__"], "note": "x"}}), body),
        "offsets that are floats": file_of(compact(changed), body),
        "a shape that is a text": file_of(compact(with_scalar), b"\x01"),
        "another encoding of the text": file_of(padding.decode().encode("utf-16-le"), body),
        "a description with spaces": file_of(
            compact({**header, "__metadata__": {"p2pasr": header["__metadata__"]["p2pasr"] + " "}}), body
        ),
    }


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in other_layouts().items()])
def test_another_layout_of_the_same_arrays_is_refused(data: bytes) -> None:
    with pytest.raises(Reject):
        unpack_tensors(data)
