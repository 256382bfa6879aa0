"""The folder of a daemon's sockets."""

from __future__ import annotations

import stat
from pathlib import Path

from p2pasr.peers import sockets


def test_a_folder_is_private_and_short_and_goes_with_its_owner(tmp_path: Path) -> None:
    note = tmp_path / "sockets"
    folder = sockets.make(note)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(str(folder)) < 60
    (folder / "daemon.sock").write_bytes(b"")
    sockets.remove(note)
    assert not folder.exists()
    assert not note.is_symlink()


def test_the_next_start_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    note = tmp_path / "sockets"
    left = sockets.make(note)
    (left / "daemon.sock").write_bytes(b"")
    folder = sockets.make(note)
    assert not left.exists()
    assert folder.is_dir()
    sockets.remove(note)


def test_a_note_that_leads_elsewhere_removes_nothing(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"")
    (tmp_path / "sockets").symlink_to(elsewhere)
    sockets.remove(tmp_path / "sockets")
    assert (elsewhere / "file").exists()
    sockets.remove(tmp_path / "sockets")


def test_a_note_that_leads_nowhere_does_no_harm(tmp_path: Path) -> None:
    note = tmp_path / "sockets"
    note.symlink_to(tmp_path / "p2pasr-gone")
    folder = sockets.make(note)
    assert folder.is_dir()
    sockets.remove(note)
