"""A teacher's labels in a shard: what goes in comes out, nothing damaged is read, and who signed is who is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.tensors import pack_tensors, unpack_tensors
from p2pasr.speech.labels import (
    IDS,
    LOGS,
    META,
    REST,
    Labelling,
    SoftLabels,
    check_signature,
    signed_shard,
    translation,
)
from p2pasr.speech.shards import Clip, Features, pack_shard, read_shard

from .builders import make_identity

FEATURES = Features(n_mels=80, window_seconds=3.0, vocabulary="ab" * 32)
WHO = make_identity(1)
LABELLING = Labelling("a teacher", "cd" * 32, "ef" * 32, 0.99, 0.9, WHO.peer)


def labelled_clip(targets: int = 3, width: int = 4, seed: int = 0) -> Clip:
    """A clip of noise with labels that name tokens at random."""
    draw = np.random.default_rng(seed)
    labels = SoftLabels(
        ids=np.stack([draw.permutation(500)[:width] for _ in range(targets)]).astype(np.int32),
        logs=-draw.exponential(size=(targets, width)).astype(np.float16),
        rest=-draw.exponential(size=targets).astype(np.float32),
    )
    mel = draw.standard_normal((80, 20)).astype(np.float16)
    return Clip(mel, tuple(range(targets + 1)), 0.2, labels=labels)


def written(folder: Path, data: bytes) -> Path:
    path = folder / blob_digest(data).hex()
    path.write_bytes(data)
    return path


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 99)), min_size=1, max_size=4), st.integers(1, 64))
def test_a_labelled_shard_gives_back_its_clips_and_their_labels(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], width: int
) -> None:
    clips = [labelled_clip(targets, width, seed) for targets, seed in shapes]
    data = signed_shard(pack_shard(clips, "yue", FEATURES, LABELLING), WHO)
    path = written(tmp_path_factory.getbasetemp(), data)
    shard = read_shard(path)

    assert shard.labelling is not None
    check_signature(path, shard.labelling)
    assert replace(shard.labelling, signature="") == LABELLING
    for one, other in zip(clips, shard.clips, strict=True):
        assert one.tokens == other.tokens
        assert one.labels is not None
        assert other.labels is not None
        for name in ("ids", "logs", "rest"):
            assert np.array_equal(getattr(one.labels, name), getattr(other.labels, name))


def test_labels_of_64_tokens_are_a_two_hundredth_of_whispers_logits() -> None:
    labels = labelled_clip(targets=5, width=64).labels
    assert labels is not None
    size = (labels.ids.nbytes + labels.logs.nbytes + labels.rest.nbytes) / 5

    assert size == 388
    assert size <= 51_865 * 2 / 200


def without_labels(clip: Clip) -> Clip:
    return replace(clip, labels=None)


def test_a_shard_without_labels_has_the_bytes_that_it_always_had() -> None:
    clips = [labelled_clip(seed=seed) for seed in range(2)]

    assert pack_shard(clips, "yue", FEATURES) == pack_shard([*map(without_labels, clips)], "yue", FEATURES)


def twice(tensors: dict[str, Any]) -> None:
    tensors[IDS] = tensors[IDS].copy()
    tensors[IDS][1, 0] = tensors[IDS][1, 1]


def negative(tensors: dict[str, Any]) -> None:
    tensors[IDS] = tensors[IDS].copy()
    tensors[IDS][0, 0] = -1


def nan(tensors: dict[str, Any]) -> None:
    tensors[LOGS] = tensors[LOGS].copy()
    tensors[LOGS][0, 0] = np.nan


def endless(tensors: dict[str, Any]) -> None:
    tensors[REST] = np.full_like(tensors[REST], -np.inf)


def short(tensors: dict[str, Any]) -> None:
    for name in (IDS, LOGS, REST):
        tensors[name] = tensors[name][:-1]


def narrow(tensors: dict[str, Any]) -> None:
    tensors[LOGS] = tensors[LOGS][:, :-1]


def empty(tensors: dict[str, Any]) -> None:
    for name in (IDS, LOGS):
        tensors[name] = tensors[name][:, :0]


def flat(tensors: dict[str, Any]) -> None:
    tensors[IDS] = tensors[IDS].reshape(-1)


def missing(tensors: dict[str, Any]) -> None:
    del tensors[REST]


@pytest.mark.parametrize("damage", [twice, negative, nan, endless, short, narrow, empty, flat, missing])
def test_labels_that_cannot_be_are_no_shard(tmp_path: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    tensors, meta = unpack_tensors(pack_shard([labelled_clip()], "yue", FEATURES, LABELLING))
    damage(tensors)

    with pytest.raises(LocalError, match="is not a shard"):
        read_shard(written(tmp_path, pack_tensors(tensors, meta)))


@pytest.mark.parametrize("teacher", [{}, 3, [], {"name": 3}, {"name": 1, "weights": 2}])
def test_a_description_of_the_teacher_that_cannot_be_is_no_shard(tmp_path: Path, teacher: Any) -> None:
    tensors, meta = unpack_tensors(pack_shard([labelled_clip()], "yue", FEATURES, LABELLING))

    with pytest.raises(LocalError, match="is not a shard"):
        read_shard(written(tmp_path, pack_tensors(tensors, {**meta, META: teacher})))


@pytest.mark.parametrize("name", ["teacher_logs", "teacher_ids", "teacher_rest", "tokens", "mel"])
def test_whatever_is_changed_in_a_labelled_shard_is_not_what_was_signed(tmp_path: Path, name: str) -> None:
    data = signed_shard(pack_shard([labelled_clip()], "yue", FEATURES, LABELLING), WHO)
    tensors, meta = unpack_tensors(data)
    changed = tensors[name].copy()
    changed.reshape(-1)[0] += 1000
    path = written(tmp_path, pack_tensors({**tensors, name: changed}, meta))
    labelling = read_shard(path).labelling

    assert labelling is not None
    with pytest.raises(LocalError, match="is not signed by the peer"):
        check_signature(path, labelling)


@pytest.mark.parametrize("change", [{"peer": make_identity(2).peer}, {"signature": "zz"}, {"weights": "00" * 32}])
def test_nobody_can_be_named_as_having_labelled_what_he_did_not_sign(tmp_path: Path, change: dict[str, str]) -> None:
    tensors, meta = unpack_tensors(signed_shard(pack_shard([labelled_clip()], "yue", FEATURES, LABELLING), WHO))
    path = written(tmp_path, pack_tensors(tensors, {**meta, META: {**meta[META], **change}}))
    labelling = read_shard(path).labelling

    assert labelling is not None
    with pytest.raises(LocalError, match="is not signed by the peer"):
        check_signature(path, labelling)


VOCABULARIES = st.dictionaries(st.text(max_size=3), st.none(), max_size=20).map(
    lambda tokens: {token: index for index, token in enumerate(tokens)}
)


@given(one=VOCABULARIES, other=VOCABULARIES, size=st.integers(0, 30))
def test_tokens_that_two_vocabularies_share_are_translated_and_no_others(
    one: dict[str, int], other: dict[str, int], size: int
) -> None:
    ids = translation(one, other, size).tolist()
    by_id = {index: token for token, index in one.items()}

    assert ids == [other.get(by_id[index], -1) if index in by_id else -1 for index in range(size)]


@given(one=VOCABULARIES, other=VOCABULARIES)
def test_what_is_translated_and_back_is_itself(one: dict[str, int], other: dict[str, int]) -> None:
    there, back = translation(one, other, len(one)), translation(other, one, len(other))

    assert all(back[index] == origin for origin, index in enumerate(there) if index >= 0)
    assert (there >= 0).sum() == (back >= 0).sum() == len(one.keys() & other.keys())
