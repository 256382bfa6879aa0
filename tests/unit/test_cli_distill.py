"""`p2pasr distill`: what it prints and how it ends."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2pasr.speech.labels import signed_shard
from p2pasr.speech.prepare import ShardIndex, read_index, write_shard
from p2pasr.speech.shards import pack_shard, read_shard

from .builders import make_identity
from .conftest import MODEL, Command


@pytest.fixture
def distill(p2pasr: Command) -> Command:
    """Run one of the commands in this process."""
    return lambda *arguments: p2pasr("distill", *arguments)


def test_labelling_says_how_large_the_labels_are_and_what_they_keep(
    distill: Command, shards: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    labelled = distill(
        "label", "--teacher", MODEL, "--shards", shards, "--out", out, "--max-cer", 0.8, "--state-dir", home
    )

    assert labelled.code == 0
    assert re.search(r"left out: clip \d of [0-9a-f]{64}.safetensors: the teacher hears '.+', a CER of", labelled.out)
    index = read_index(out)
    assert f"{index.clips} clips in 3 shards in {out}; {24 - index.clips} clips left out" in labelled.out
    assert re.search(
        r"388 bytes a token, 1/3 of all logits as float16, hold [19]\d+\.\d+% of the probability", labelled.out
    )

    checked = distill("check", "--teacher", MODEL, "--shards", out, "--rate", 0.5)
    assert checked.code == 0
    assert f"of {index.clips} clips were asked about again; all are labelled as the teacher says" in checked.out


def test_a_label_that_is_not_the_teachers_ends_the_check_with_its_shard_clip_and_signer(
    distill: Command, labelled: Path, tmp_path: Path
) -> None:
    cheat = make_identity(9)
    shard = read_shard(labelled / read_index(labelled).shards[0].file)
    assert shard.labelling is not None
    first = shard.clips[0].labels
    assert first is not None
    made_up = replace(first, logs=first.logs - np.float16(1))
    clips = [replace(shard.clips[0], labels=made_up), *shard.clips[1:]]
    data = pack_shard(clips, "yue", shard.features, replace(shard.labelling, peer=cheat.peer, signature=""))
    entry = write_shard(tmp_path, clips, "yue", signed_shard(data, cheat))
    ShardIndex(MODEL, shard.features, [entry]).save(tmp_path)
    checked = distill("check", "--teacher", MODEL, "--shards", tmp_path, "--rate", 1)

    assert checked.code == 1
    assert f"clip 0 of {entry.file}, signed by {cheat.peer}: at target" in checked.out
    assert "8 of 8 clips were asked about again; 1 are not labelled as the teacher says" in checked.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["label", "--teacher", "nothing/here", "--out", "out"], "the model 'nothing/here' cannot be loaded"),
        (["check", "--teacher", MODEL], "holds no teacher's labels"),
    ],
    ids=["no teacher", "no labels"],
)
def test_what_cannot_be_done_is_one_sentence(
    distill: Command, shards: Path, arguments: list[str], sentence: str
) -> None:
    result = distill(*arguments, "--shards", shards)

    assert result.code == 1
    assert sentence in result.err
    assert "Traceback" not in result.err


def test_a_folder_without_shards_is_refused(distill: Command, tmp_path: Path) -> None:
    result = distill("check", "--teacher", MODEL, "--shards", tmp_path)

    assert result.code == 1
    assert "holds no shards" in result.err
