"""Encoded deltas on disk, part by part."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pasr.averaging.codec import Codec, Layout
from p2pasr.averaging.partfile import PartFile
from p2pasr.errors import LocalError, Reject

LAYOUT = Layout(600, 256, Codec("float32"))
PARTS = [bytes([index]) * LAYOUT.part_bytes(index) for index in range(LAYOUT.parts)]


def test_parts_written_in_any_order_make_the_encoded_delta(tmp_path: Path) -> None:
    with PartFile(tmp_path / "average", LAYOUT) as file:
        for index in (2, 0, 1):
            file.write(index, PARTS[index])
        assert [file.read(index) for index in range(LAYOUT.parts)] == PARTS
    assert (tmp_path / "average").read_bytes() == b"".join(PARTS)


def test_a_file_can_be_read_after_it_was_renamed_and_deleted(tmp_path: Path) -> None:
    with PartFile(tmp_path / "scratch", LAYOUT) as file:
        file.write(1, PARTS[1])
        (tmp_path / "scratch").replace(tmp_path / "blob")
        (tmp_path / "blob").unlink()
        assert file.read(1) == PARTS[1]


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "delta").write_bytes(bytes(LAYOUT.total_bytes - 1))
    with pytest.raises(Reject, match="has 2400 bytes, not 2399"):
        PartFile(tmp_path / "delta", LAYOUT)


def test_a_part_of_another_length_is_not_written(tmp_path: Path) -> None:
    with PartFile(tmp_path / "average", LAYOUT) as file, pytest.raises(ValueError, match="part 0 has 1024 bytes"):
        file.write(0, b"short")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="cannot be opened"):
        PartFile(tmp_path / "nowhere" / "delta", LAYOUT)
