"""Shards: what goes in comes out, equal clips give equal bytes, and nothing damaged is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.tensors import pack_tensors, unpack_tensors
from p2pasr.speech.prepare import read_index
from p2pasr.speech.pretrained import Frontend
from p2pasr.speech.shards import (
    FORMAT,
    Clip,
    Features,
    Shard,
    check_digest,
    pack_shard,
    read_shard,
    speaker_hash,
)

FEATURES = Features(n_mels=80, window_seconds=3.0, vocabulary="ab" * 32)


def clip(frames: int = 60, tokens: Sequence[int] = (5, 6, 7), seed: int = 0, speaker: bytes = bytes(8)) -> Clip:
    """A clip of noise."""
    draw = np.random.default_rng(seed)
    mel = draw.standard_normal((80, frames)).astype(np.float16)
    return Clip(mel=mel, tokens=tuple(tokens), seconds=frames / 100, speaker=speaker)


clips = st.lists(
    st.builds(
        clip,
        frames=st.integers(1, 300),
        tokens=st.lists(st.integers(0, 51_865), min_size=1, max_size=48),
        seed=st.integers(0, 9),
        speaker=st.binary(min_size=8, max_size=8),
    ),
    min_size=1,
    max_size=5,
)


def opened(folder: Path, data: bytes) -> Shard:
    path = folder / blob_digest(data).hex()
    path.write_bytes(data)
    return read_shard(path)


def same(one: Clip, other: Clip) -> bool:
    return (
        one.mel.shape == other.mel.shape
        and one.mel.tobytes() == other.mel.tobytes()
        and one.tokens == other.tokens
        and np.float32(one.seconds) == np.float32(other.seconds)
        and one.speaker == other.speaker
    )


@given(made=clips, dialect=st.sampled_from(["yue", "cmn", "en-gb-scotland"]))
def test_a_shard_gives_back_what_was_packed(
    tmp_path_factory: pytest.TempPathFactory, made: list[Clip], dialect: str
) -> None:
    shard = opened(tmp_path_factory.getbasetemp(), pack_shard(made, dialect, FEATURES))

    assert (shard.dialect, shard.features) == (dialect, FEATURES)
    assert len(shard.clips) == len(made)
    assert all(map(same, shard.clips, made))
    assert shard.seconds == pytest.approx(sum(c.seconds for c in made), rel=1e-6)


@given(clips)
def test_equal_clips_give_equal_bytes(made: list[Clip]) -> None:
    again = [Clip(np.array(c.mel), tuple(c.tokens), c.seconds, c.speaker) for c in made]

    assert pack_shard(again, "yue", FEATURES) == pack_shard(made, "yue", FEATURES)


@pytest.mark.parametrize(
    "other",
    [
        pack_shard([clip()], "cmn", FEATURES),
        pack_shard([clip()], "yue", Features(80, 2.0, FEATURES.vocabulary)),
        pack_shard([clip()], "yue", Features(80, 3.0, "cd" * 32)),
        pack_shard([clip(seed=1)], "yue", FEATURES),
        pack_shard([clip(tokens=(5, 6, 8))], "yue", FEATURES),
        pack_shard([clip(speaker=b"somebody")], "yue", FEATURES),
        pack_shard([clip(), clip()], "yue", FEATURES),
    ],
    ids=["dialect", "window", "vocabulary", "mel", "tokens", "speaker", "number of clips"],
)
def test_whatever_differs_changes_the_name(other: bytes) -> None:
    assert blob_digest(other) != blob_digest(pack_shard([clip()], "yue", FEATURES))


def test_a_shard_without_clips_is_not_made() -> None:
    with pytest.raises(ValueError, match="at least one clip"):
        pack_shard([], "yue", FEATURES)


def test_any_safetensors_reader_loads_a_shard() -> None:
    tensors = load(pack_shard([clip(frames=3), clip(frames=4)], "yue", FEATURES))

    assert {name: (str(a.dtype), a.shape) for name, a in tensors.items()} == {
        "mel": ("float16", (7, 80)),
        "mel_ends": ("int64", (2,)),
        "tokens": ("int32", (6,)),
        "token_ends": ("int64", (2,)),
        "seconds": ("float32", (2,)),
        "speakers": ("uint8", (2, 8)),
    }


def test_features_are_views_of_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    mel = opened(tmp_path, pack_shard([clip()], "yue", FEATURES)).clips[0].mel

    with pytest.raises(ValueError, match="read-only"):
        mel[0, 0] = 1


# --- prepared shards ----------------------------------------------------------------------------


def test_a_prepared_shard_is_named_by_the_digest_of_its_bytes(shards: Path) -> None:
    for entry in read_index(shards).shards:
        data = (shards / entry.file).read_bytes()
        assert blob_digest(data).hex() == entry.digest == (shards / entry.file).stem
        assert len(data) == entry.bytes
        check_digest(shards / entry.file, entry.digest)


def test_a_prepared_shard_holds_neither_audio_nor_raw_text_nor_names(
    corpus: Path, shards: Path, shard_files: Sequence[Path]
) -> None:
    rows = json.loads((corpus / "labels.json").read_text(encoding="utf-8"))
    data = b"".join(path.read_bytes() for path in shard_files)

    assert {*unpack_tensors(shard_files[0].read_bytes())[0]} == {
        "mel", "mel_ends", "tokens", "token_ends", "seconds", "speakers",
    }  # fmt: skip
    assert not any(row["text"].encode() in data for row in rows)
    assert not any(row["speaker"].encode() in data for row in rows)
    assert not any(Path(row["audio"]).name.encode() in data for row in rows)
    samples = [(corpus / row["audio"]).read_bytes()[44:] for row in rows]
    assert not any(audio[len(audio) // 2 :][:64] in data for audio in samples)


def test_a_prepared_shard_says_what_was_said_to_whoever_has_the_vocabulary(
    corpus: Path, shard_files: Sequence[Path], base: Frontend
) -> None:
    rows = json.loads((corpus / "labels.json").read_text(encoding="utf-8"))
    made = [c for path in shard_files for c in read_shard(path).clips]

    texts = [base.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in made]
    assert texts == [row["text"] for row in rows]


def test_the_same_speaker_has_the_same_hash_and_another_another(corpus: Path, shard_files: Sequence[Path]) -> None:
    rows = json.loads((corpus / "labels.json").read_text(encoding="utf-8"))
    made = [c for path in shard_files for c in read_shard(path).clips]

    pairs = {(row["speaker"], c.speaker) for row, c in zip(rows, made, strict=True)}
    assert len(pairs) == len({name for name, _ in pairs}) == len({hashed for _, hashed in pairs}) == 4


@given(name=st.text(min_size=1), one=st.binary(min_size=32, max_size=32), other=st.binary(min_size=32, max_size=32))
def test_a_speakers_hash_depends_on_the_salt(name: str, one: bytes, other: bytes) -> None:
    assert len(speaker_hash(name, one)) == 8
    assert speaker_hash(name, one) == speaker_hash(name, one)
    assert (speaker_hash(name, one) == speaker_hash(name, other)) == (one == other)


# --- damage -------------------------------------------------------------------------------------


WHOLE = pack_shard([clip(frames=20), clip(frames=30, tokens=(1, 2, 3, 4))], "yue", FEATURES)


def refused(path: Path) -> str:
    with pytest.raises(LocalError) as error:
        read_shard(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} is not a shard (")
    assert sentence.endswith("make it again with p2pasr data prepare")
    assert "\n" not in sentence
    return sentence


@given(cut=st.integers(0, len(WHOLE) - 1))
def test_a_truncated_shard_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(WHOLE[:cut])

    refused(path)


@given(extra=st.binary(min_size=1, max_size=64))
def test_a_shard_with_bytes_behind_it_is_refused(tmp_path_factory: pytest.TempPathFactory, extra: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "extended"
    path.write_bytes(WHOLE + extra)

    refused(path)


@given(position=st.integers(0, len(WHOLE) - 1), flip=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_found_by_the_digest(
    tmp_path_factory: pytest.TempPathFactory, position: int, flip: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed"
    data = bytearray(WHOLE)
    data[position] ^= flip
    path.write_bytes(data)

    with pytest.raises(LocalError, match="is corrupt: its digest is"):
        check_digest(path, blob_digest(WHOLE).hex())
    try:
        read_shard(path)
    except LocalError:
        refused(path)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\xff" * 100, b"{}" * 100])
def test_a_file_that_is_no_tensor_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)

    refused(path)


def test_a_missing_shard_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(LocalError, match="cannot be read"):
            read_shard(path)


def test_the_digest_of_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="is missing"):
        check_digest(tmp_path / "a", "00" * 32)


Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return apply


INCONSISTENT: dict[str, Change] = {
    "another format": lambda _, meta: meta.update(format="p2pasr-shard/0"),
    "no format": lambda _, meta: meta.pop("format"),
    "no dialect": lambda _, meta: meta.pop("dialect"),
    "no vocabulary": lambda _, meta: meta.pop("vocabulary"),
    "an unknown key": lambda _, meta: meta.update(audio="base64"),
    "no tokens": lambda tensors, _: tensors.pop("tokens"),
    "no clips": lambda tensors, _: tensors.update({n: a[:0] for n, a in tensors.items()}),
    "mel in float32": tensor("mel", lambda a: a.astype(np.float32)),
    "mel flat": tensor("mel", lambda a: a.reshape(-1)),
    "mel short": tensor("mel", lambda a: a[:-1]),
    "mel long": tensor("mel", lambda a: np.concatenate([a, a[:1]])),
    "ends beyond": tensor("mel_ends", lambda a: a + 1),
    "ends descending": tensor("mel_ends", lambda a: np.array([60, 50])),
    "ends equal": tensor("mel_ends", lambda a: np.array([50, 50])),
    "ends negative": tensor("token_ends", lambda a: np.array([-1, 7])),
    "ends flat": tensor("token_ends", lambda a: a.reshape(1, 2)),
    "one end": tensor("token_ends", lambda a: a[-1:]),
    "tokens short": tensor("tokens", lambda a: a[:-1]),
    "one duration": tensor("seconds", lambda a: a[:1]),
    "one speaker": tensor("speakers", lambda a: a[:1]),
}


def changed(change: Change) -> bytes:
    """The whole shard, packed again with something about it changed."""
    view, meta = unpack_tensors(WHOLE)
    tensors = {name: np.array(array) for name, array in view.items()}
    change(tensors, meta)
    return pack_tensors(tensors, meta)


def test_packing_a_shard_again_unchanged_gives_the_same_bytes() -> None:
    assert changed(lambda *_: None) == WHOLE
    assert FORMAT.encode() in WHOLE


@pytest.mark.parametrize("what", INCONSISTENT)
def test_a_shard_whose_parts_do_not_fit_together_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(changed(INCONSISTENT[what]))

    refused(path)


UNFIT: dict[str, Change] = {
    "other mel bands than it says": tensor("mel", lambda a: np.ascontiguousarray(a[:, :40])),
    "a clip longer than its window": lambda _, meta: meta.update(window_seconds=0.25),
    "tokens that are no integers": tensor("tokens", lambda a: a.astype(np.float32)),
    "a negative token": tensor("tokens", lambda a: a - 6),
    "a tensor of no use": lambda tensors, _: tensors.update(audio=np.zeros(3, np.float32)),
    "hashes of another length": tensor("speakers", lambda a: np.ascontiguousarray(a[:, :4])),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_shard_that_no_model_could_train_on_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(changed(UNFIT[what]))

    refused(path)
