"""The blob store: whole or not there, damaged or found out, full or making room."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import LocalError
from p2pasr.peers.blobs import EVICTABLE, KINDS, BlobStore, Kind, disk_errors, file_digest, sync
from p2pasr.protocol.encoding import blob_digest


def files(store: BlobStore) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file())


def aged(store: BlobStore, kind: Kind, data: bytes, age: int) -> bytes:
    """Store bytes that were last asked for `age` seconds ago."""
    digest = store.put(kind, data)
    path = store.find(digest)
    assert path is not None
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("durable", [True, False])
def test_what_is_put_is_got_by_its_digest(store: BlobStore, kind: Kind, durable: bool) -> None:
    digest = store.put(kind, b"content", durable=durable)
    assert digest == blob_digest(b"content")
    assert store.get(digest) == b"content"
    assert store.holds(kind) == [digest]
    assert store.find(digest) == store.root / kind / digest.hex()


def test_an_empty_blob_and_a_view_are_blobs_too(store: BlobStore) -> None:
    assert store.get(store.put("delta", b"")) == b""
    assert store.get(store.put("delta", memoryview(b"xcontent")[1:])) == b"content"


def test_putting_twice_stores_once(store: BlobStore) -> None:
    store.put("state", b"content")
    store.put("average", b"content")
    assert len(files(store)) == 1


def test_another_store_on_the_same_folder_sees_the_same_blobs(store: BlobStore) -> None:
    digest = store.put("state", b"content")
    other = BlobStore(store.root)
    assert other.get(digest) == b"content"
    other.discard(digest)
    assert store.find(digest) is None


def test_a_blob_that_is_not_here_is_said_to_be_so(store: BlobStore) -> None:
    missing = blob_digest(b"nowhere")
    assert store.find(missing) is None
    with pytest.raises(LocalError, match=f"{missing.hex()[:12]}… is not in {store.root}"):
        store.get(missing)


def test_a_write_that_fails_leaves_nothing_behind(store: BlobStore) -> None:
    (store.root / "delta").rmdir()
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        store.put("delta", b"content")
    assert files(store) == []


def test_a_blob_and_its_name_are_synced_before_it_is_said_to_be_stored(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("p2pasr.peers.blobs.sync", synced.append)
    store.put("delta", b"fleeting", durable=False)
    assert synced == []
    store.put("delta", b"content")
    assert [path.parent for path in synced] == [store.root / "partial", store.root]
    assert synced[1] == store.root / "delta"


def test_files_and_folders_can_be_synced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    for path in (tmp_path, tmp_path / "file"):
        sync(path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nowhere")


def test_a_file_under_its_final_name_is_whole_at_every_moment(store: BlobStore) -> None:
    digest = blob_digest(b"content")
    with store._writing(digest, "delta", durable=True) as part:
        part.write_bytes(b"con")
        assert store.find(digest) is None
        part.write_bytes(b"content")
    assert store.get(digest) == b"content"


def test_a_write_that_is_interrupted_leaves_nothing_under_the_final_name(store: BlobStore) -> None:
    digest = blob_digest(b"content")

    def write_and_be_interrupted() -> None:
        with store._writing(digest, "delta", durable=True) as part:
            part.write_bytes(b"con")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_be_interrupted()
    assert files(store) == []


@pytest.mark.parametrize("spoilt", [b"", b"conten", b"c0ntent", b"content "])
def test_a_blob_that_the_disk_damaged_is_found_out_and_removed(store: BlobStore, spoilt: bytes) -> None:
    digest = store.put("shard", b"content")
    (store.root / "shard" / digest.hex()).write_bytes(spoilt)
    with pytest.raises(LocalError, match="was damaged on disk and has been removed"):
        store.get(digest)
    assert store.find(digest) is None
    assert store.put("shard", b"content") == digest
    assert store.get(digest) == b"content"


def test_a_lent_file_is_served_from_where_it_lies_and_never_deleted(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(b"content")
    digest = blob_digest(b"content")
    store.lend(path, digest)
    assert store.find(digest) == path
    assert store.get(digest) == b"content"
    assert store.put("shard", b"content") == digest
    assert store.retain("shard", ()) == 0
    store.discard(digest)
    assert store.find(digest) is None
    assert path.read_bytes() == b"content"


def test_a_lent_file_that_is_missing_or_another_is_refused(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    with pytest.raises(LocalError, match=f"{path} is missing"):
        store.lend(path, blob_digest(b"content"))
    path.write_bytes(b"c0ntent")
    with pytest.raises(LocalError, match=f"{path} is corrupt"):
        store.lend(path, blob_digest(b"content"))
    assert store.find(blob_digest(b"content")) is None


def test_a_lent_file_that_goes_away_is_no_longer_found(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(b"content")
    store.lend(path, blob_digest(b"content"))
    path.unlink()
    assert store.find(blob_digest(b"content")) is None


def test_a_lent_file_that_changes_is_found_out_and_stays_where_it_is(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(b"content")
    digest = blob_digest(b"content")
    store.lend(path, digest)
    path.write_bytes(b"c0ntent")
    with pytest.raises(LocalError, match=f"{path} has changed since it was prepared and is no longer used; restore it"):
        store.get(digest)
    assert path.read_bytes() == b"c0ntent"
    assert store.find(digest) is None


def test_what_is_asked_for_is_touched_unless_it_was_lent(store: BlobStore, tmp_path: Path) -> None:
    lent = tmp_path / "shard.safetensors"
    lent.write_bytes(b"lent")
    store.lend(lent, blob_digest(b"lent"))
    own = store.find(store.put("shard", b"own"))
    assert own is not None
    for path in (lent, own):
        os.utime(path, (1000, 1000))
        store.touch(path)
    assert lent.stat().st_mtime == 1000
    assert own.stat().st_mtime > 1000


def test_retaining_deletes_the_rest_of_one_kind(store: BlobStore) -> None:
    one, two, three = (store.put("state", data) for data in (b"1", b"2", b"3"))
    other = store.put("delta", b"4")
    assert store.retain("state", {one, blob_digest(b"nowhere")}) == 2
    assert store.holds("state") == [one]
    assert [store.find(digest) for digest in (two, three)] == [None, None]
    assert store.get(other) == b"4"


def test_the_oldest_of_the_most_dispensable_kind_goes_first(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", budget_bytes=100)
    kept = store.put("state", b"s" * 20)
    shard = aged(store, "shard", b"a" * 20, 1000)
    old, new = aged(store, "checkpoint", b"b" * 20, 50), aged(store, "checkpoint", b"c" * 20, 10)
    average = aged(store, "average", b"d" * 20, 0)

    delta = store.put("delta", b"e" * 20)
    assert [store.find(digest) is None for digest in (average, old, new, shard, kept)] == [True] + [False] * 4
    second = store.put("shard", b"f" * 15)
    assert [store.find(digest) is None for digest in (old, new, shard, delta, kept)] == [True] + [False] * 4
    store.put("state", b"g" * 45)
    assert [store.find(digest) is None for digest in (new, shard)] == [True] * 2
    assert store.get(kept) == b"s" * 20
    assert store.get(delta) == b"e" * 20
    assert store.get(second) == b"f" * 15


def test_what_must_not_go_is_not_evicted_and_the_budget_is_named(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", budget_bytes=100)
    state, manifest = store.put("state", b"s" * 60), store.put("manifest", b"m" * 30)
    with pytest.raises(LocalError, match=r"the disk budget of .* is used up; raise it with --disk-gib"):
        store.put("state", b"t" * 11)
    assert store.get(state) == b"s" * 60
    assert store.get(manifest) == b"m" * 30
    store.put("state", b"t" * 10)


def test_nothing_is_evicted_for_what_cannot_fit_anyway(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", budget_bytes=100)
    shard, delta = store.put("shard", b"a" * 20), store.put("delta", b"b" * 20)
    with pytest.raises(LocalError, match="disk budget"):
        store.put("average", b"c" * 101)
    assert store.find(shard) is not None
    assert store.find(delta) is not None


def test_lent_files_do_not_count(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", budget_bytes=10)
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 1000)
    store.lend(path, blob_digest(b"x" * 1000))
    store.put("state", b"s" * 10)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 40)), max_size=12))
def test_the_budget_is_never_exceeded(tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[Kind, int]]) -> None:
    store = BlobStore(tmp_path_factory.mktemp("store"), budget_bytes=100)
    lasting: dict[bytes, int] = {}
    for number, (kind, size) in enumerate(puts):
        data = bytes([number]) * size
        try:
            digest = store.put(kind, data, durable=False)
        except LocalError:
            assert sum(lasting.values()) + size > 100
            continue
        assert store.get(digest) == data
        if kind not in EVICTABLE:
            lasting[digest] = size
        assert sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file()) <= 100
        assert all(store.find(digest) is not None for digest in lasting)


class LaggingStore(BlobStore):
    """Sees a folder as it was before another process deleted a file of it."""

    ghost: Path | None = None

    def _files(self, kind: Kind) -> list[Path]:
        return super()._files(kind) + ([self.ghost] if self.ghost is not None and kind == "delta" else [])


def test_a_blob_that_the_other_process_deletes_meanwhile_does_no_harm(tmp_path: Path) -> None:
    store = LaggingStore(tmp_path / "blobs")
    store.ghost = store.root / "delta" / blob_digest(b"gone").hex()
    store.put("average", b"content")


def test_an_unfinished_download_has_a_place_that_is_no_blob(store: BlobStore) -> None:
    digest = blob_digest(b"content")
    store.partial(digest, "7").write_bytes(b"con")
    assert store.find(digest) is None
    store.partial(digest, "7").write_bytes(b"content")
    store.commit(store.partial(digest, "7"), digest, "shard")
    assert store.get(digest) == b"content"
    assert not store.partial(digest, "7").exists()


def test_unfinished_downloads_of_one_blob_are_apart_and_go_together(store: BlobStore) -> None:
    digest, other = blob_digest(b"content"), blob_digest(b"other")
    paths = [store.partial(digest, "7"), store.partial(digest, "8"), store.partial(other, "7")]
    for path in paths:
        path.write_bytes(b"con")
    store.drop_partials(digest)
    assert [path.exists() for path in paths] == [False, False, True]


def test_tidying_removes_what_a_killed_writer_left_and_keeps_downloads(store: BlobStore) -> None:
    digest = blob_digest(b"content")
    download = store.partial(digest, "7")
    download.write_bytes(b"con")
    download.with_name(download.name + ".map").write_bytes(b"\x01")
    (store.root / "partial" / f"{digest.hex()[:16]}-abcdef").write_bytes(b"con")
    kept = store.put("delta", b"kept")
    store.tidy()
    assert files(store) == sorted([download.name, download.name + ".map", kept.hex()])


def test_foreign_files_in_the_folder_are_left_alone(store: BlobStore) -> None:
    note = store.root / "delta" / "note.txt"
    note.write_bytes(b"x")
    assert store.holds("delta") == []
    assert store.retain("delta", ()) == 0
    assert note.exists()


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(size)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == blob_digest(data)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence(tmp_path: Path, number: int) -> None:
    def fail(number: int) -> None:
        with disk_errors(tmp_path):
            raise OSError(number, os.strerror(number))

    with pytest.raises(LocalError, match=f"the disk that holds {tmp_path} is full; free some space"):
        fail(number)
    with pytest.raises(PermissionError):
        fail(errno.EACCES)
