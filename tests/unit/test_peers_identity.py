"""The key: made once, readable by its owner alone, used by one process at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from p2pasr.errors import LocalError
from p2pasr.peers.identity import Identity, load_or_create, lock
from p2pasr.protocol.signing import sign, verify

from .builders import make_identity


def test_a_key_is_made_once_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "identity.key"
    made = load_or_create(path)
    assert load_or_create(path).peer == made.peer
    assert path.read_bytes() == made.to_bytes()


def test_a_kill_while_a_key_is_made_leaves_no_half_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_path: Path) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "identity.key"
    with monkeypatch.context() as context:
        context.setattr("p2pasr.peers.identity.sync", killed)
        with pytest.raises(KeyboardInterrupt):
            load_or_create(path)
    assert not path.exists()
    made = load_or_create(path)
    assert load_or_create(path).peer == made.peer
    assert list(tmp_path.iterdir()) == [path]


def test_who_makes_a_key_at_the_same_time_takes_the_one_that_was_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = tmp_path / "identity.key", make_identity(1)

    def other_is_faster(_part: Path) -> None:
        if not path.exists():
            path.write_bytes(first.to_bytes())
            path.chmod(0o600)

    monkeypatch.setattr("p2pasr.peers.identity.sync", other_is_faster)
    assert load_or_create(path).peer == first.peer
    assert list(tmp_path.iterdir()) == [path]


def test_two_keys_are_two_peers(tmp_path: Path) -> None:
    assert load_or_create(tmp_path / "one").peer != load_or_create(tmp_path / "other").peer


def test_only_its_owner_can_read_a_new_key(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        load_or_create(tmp_path / "identity.key")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "identity.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o777, 0o610, 0o601])
def test_a_key_that_others_may_touch_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    load_or_create(path)
    path.chmod(mode)
    with pytest.raises(LocalError, match=f"mode {mode:03o}.*run chmod 600 {path}"):
        load_or_create(path)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_that_only_its_owner_may_touch_is_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    made = load_or_create(path)
    path.chmod(mode)
    assert load_or_create(path).peer == made.peer


def damaged() -> dict[str, bytes]:
    whole = make_identity(1).to_bytes()
    return {
        "empty": b"",
        "cut short": whole[:-1],
        "too long": whole + b"\x00",
        "another type of key": b"\x08\x00" + whole[2:],
        "the public half of another key": whole[:36] + make_identity(2).to_bytes()[36:],
        "a flipped bit in the seed": whole[:10] + bytes([whole[10] ^ 1]) + whole[11:],
        "text": b"-----BEGIN PRIVATE KEY-----\n",
    }


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in damaged().items()])
def test_a_damaged_key_is_refused_with_what_to_do(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(LocalError, match=f"the identity {path} is damaged .*; restore it, or delete it"):
        load_or_create(path)
    assert path.read_bytes() == data, "somebody may want to restore it"
    with pytest.raises(ValueError, match=r"key|belong"):
        Identity.from_bytes(data)


def test_a_place_where_no_key_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "identity.key"):
        with pytest.raises(LocalError):
            load_or_create(path)


def test_a_key_survives_its_bytes_and_signs_in_its_own_name() -> None:
    identity = make_identity(3)
    again = Identity.from_bytes(identity.to_bytes())
    assert again.peer == identity.peer
    verify(identity.peer, "claim", b"body", sign(again, "claim", b"body"))


def test_a_key_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_or_create(path)
    held = lock(path)
    try:
        with pytest.raises(LocalError, match=r"in use by another process.*--identity-path"):
            lock(path)
        code = "import pathlib, sys; from p2pasr.peers.identity import lock; lock(pathlib.Path(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(path)]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "LocalError" in other.stderr
    finally:
        os.close(held)
    os.close(lock(path))


def test_a_locked_key_can_still_be_read(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    made = load_or_create(path)
    held = lock(path)
    assert load_or_create(path).peer == made.peer
    os.close(held)
