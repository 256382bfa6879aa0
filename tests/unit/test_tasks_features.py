"""Small models around a recogniser: each head learns from synthetic speech what it is then asked about strangers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr.runs import shard_paths
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.shards import read_shard
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks import Checkpoint, build, pin
from p2pasr.tasks.features import FeaturesTask
from p2pasr.tasks.text_heads import Guess

from .conftest import MODEL, plan, start_of

SMALL = {"width": 48, "layers": 2, "feedforward": 96}

SYLLABLES = {
    "cmn": dict(zip(DIGITS, ["l-ing", "y-i", "er", "s-an", "s-i", "w-u", "l-iu", "q-i", "b-a", "j-iu"], strict=True))
}
SHARDS = dict[str, Sequence[Path]]


def dialects(folder: Path, split: str, clips: int, people: int) -> Sequence[Path]:
    """Shards of Mandarin and Cantonese by the same speakers, one a dialect."""
    rows = []
    for dialect in ("cmn", "yue"):
        labels = write_corpus(folder / "corpus", dialect=dialect, split=split, clips=clips, people=people)
        rows += json.loads(labels.read_text(encoding="utf-8"))
    labels.write_text(json.dumps(rows), encoding="utf-8")
    prepare(folder / "corpus", folder / "shards", Settings(MODEL, clips_per_shard=clips))
    return shard_paths(folder / "shards")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> SHARDS:
    """96 clips by twelve speakers to train on, 48 by six others."""
    folder = tmp_path_factory.mktemp("dialects")
    return {
        "train": dialects(folder / "train", "train", 48, 12),
        "test": dialects(folder / "test", "test", 24, 6),
    }


def made(heads: Sequence[str], shards: Sequence[Path], **config: Any) -> FeaturesTask:
    """A small task."""
    settings = {"model": MODEL, "heads": heads, "encoder": SMALL, "warmup_steps": 10, "learning_rate": 4e-3, **config}
    task = build("features", pin("features", settings, None, shards), seed=3, shards=shards)
    assert isinstance(task, FeaturesTask)
    return task


def learn(task: FeaturesTask, shards: Sequence[Path], steps: int) -> Checkpoint:
    """Train in segments of twenty steps."""
    at = start_of(task)
    for index in range(steps // 20):
        at, _ = task.segment(at, shards, plan(steps=20, samples=16, seed=index, first=20 * index, total=steps))
    return at


# --- learning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(spoken: SHARDS) -> tuple[FeaturesTask, Checkpoint]:
    """A model that was taught four things at once by 160 steps."""
    task = made(["accent", "speaker", "vad", "masked"], spoken["train"])
    return task, learn(task, spoken["train"], 160)


@pytest.fixture(scope="module")
def scores(learned: tuple[FeaturesTask, Checkpoint], spoken: SHARDS) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Its scores before and after, on strangers."""
    task, end = learned
    return task.evaluate(None, spoken["test"]), task.evaluate(end.params, spoken["test"])


Scores = tuple[Mapping[str, Any], Mapping[str, Any]]


def test_the_accent_of_strangers_is_told(scores: Scores) -> None:
    before, after = (one["accent"] for one in scores)
    print(before, after)
    assert before["accuracy"] <= 0.7
    assert after["accuracy"] >= 0.8
    assert {spoken: sum(row.values()) for spoken, row in after["confusion"].items()} == {"cmn": 24, "yue": 24}
    right = sum(after["confusion"][dialect][dialect] for dialect in ("cmn", "yue"))
    assert right / after["clips"] == after["accuracy"]


def test_strangers_are_told_apart_by_their_voices(scores: Scores) -> None:
    before, after = (one["speaker"] for one in scores)
    print(before, after)
    assert after["same"] + after["different"] == 48 * 47 // 2
    assert after["same"] == 6 * 8 * 7 // 2
    assert after["eer"] < before["eer"] - 0.05
    assert after["eer"] <= 0.3


def test_speech_and_noise_are_found_better_than_by_loudness(scores: Scores) -> None:
    print(scores)
    for sound in ("speech", "noise"):
        after = scores[1]["vad"][sound]
        assert after["eer"] <= 0.1 <= after["eer_of_loudness"]
        assert 1 >= after["misses_at_1%"] >= after["misses_at_5%"] >= after["misses_at_20%"]
        assert after["misses_at_20%"] <= 0.1


def test_masked_sound_is_guessed_from_what_is_around_it(scores: Scores) -> None:
    before, after = (one["masked"] for one in scores)
    print(before, after)
    assert after["l1"] <= 0.5 * before["l1"]
    assert after["l2"] <= 0.5 * before["l2"]


def test_a_wrong_transcript_is_told_by_listening(spoken: SHARDS) -> None:
    shards = spoken["train"][:1]
    task = made(["confidence"], shards, text_layers=1)
    end = learn(task, shards, 200)
    scores = task.evaluate(end.params, shards)["confidence"]
    print(scores)
    assert scores["auroc"] >= 0.8
    assert 0 < scores["ece"] < 0.3
    task.set_params(end.params)
    clips = read_shard(shards[0]).clips
    own = task.model.confidences(clips, [clip.tokens[4:-1] for clip in clips])
    shifted = task.model.confidences(clips, [clip.tokens[4:-1] for clip in (*clips[5:], *clips[:5])])
    print(np.mean(own), np.mean(shifted))
    assert np.mean(own) > np.mean(shifted) + 0.3


def test_a_language_model_and_a_lexicon_pick_better_guesses(spoken: SHARDS) -> None:
    task = made(["correction"], spoken["train"], lexicon=["开灯"], lexicon_bonus=50.0)
    end = learn(task, spoken["train"], 80)
    scores = task.evaluate(end.params, spoken["test"])["correction"]
    print(scores)
    assert scores["cer_after"] <= 0.7 * scores["cer_before"]
    clip = read_shard(spoken["test"][0]).clips[0]
    tokenizer = task.model.rescorer.tokenizer  # type: ignore[union-attr]
    guesses = [Guess(tuple(tokenizer(text, add_special_tokens=False).input_ids)) for text in ("我想喝水", "开灯灯灯")]
    task.set_params(end.params)
    plain, favoured = task.model.rescore(clip, guesses)
    assert favoured > plain + 30


def test_phonemes_are_recognised(spoken: SHARDS) -> None:
    task = made(["phoneme"], spoken["train"][:1], pronunciations=SYLLABLES)
    end = learn(task, spoken["train"][:1], 300)
    before, after = (task.evaluate(p, spoken["test"][:1])["phoneme"] for p in (None, end.params))
    print(before, after)
    assert before["clips"] == after["clips"] == 24
    assert after["per"] <= 0.7 <= before["per"]
