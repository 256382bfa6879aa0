"""Synthetic speech: heard in every dialect, the same on every machine, nobody in both splits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import LocalError
from p2pasr.speech.audio import ClipLimits, read_clip
from p2pasr.speech.synthetic import (
    ACTIONS,
    DIGITS,
    HAKKA_READINGS,
    OPENINGS,
    SYNTHESIS_RATE,
    TEST_VARIANTS,
    TRAIN_VARIANTS,
    Speaker,
    phrase,
    say,
    speakers,
    utterances,
    write_corpus,
)

DIALECTS = ("cmn", "yue", "hak", "en-us", "en-gb-scotland")


def test_no_voice_is_heard_in_training_and_in_testing() -> None:
    assert not {*TRAIN_VARIANTS} & {*TEST_VARIANTS}
    train, test = speakers("train", 200), speakers("test", 200)
    assert not {s.variant for s in train} & {s.variant for s in test}
    assert len({s.name for s in train + test}) == 400


@given(few=st.integers(0, 60), more=st.integers(0, 60), split=st.sampled_from(["train", "test"]))
def test_the_first_speakers_are_the_same_however_many_are_asked_for(few: int, more: int, split: str) -> None:
    assert speakers(split, few + more)[:few] == speakers(split, few)


def test_speakers_of_one_variant_differ_in_pitch_pace_or_tract() -> None:
    voices = speakers("train", 2 * len(TRAIN_VARIANTS))

    assert len({(s.variant, s.pitch, s.rate, s.tract) for s in voices}) == len(voices)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_dialect_is_spoken_by_every_split(dialect: str, split: str) -> None:
    for _, speaker, samples in utterances(dialect, split, 4, 4, seed=0):
        assert samples.dtype == np.float32
        assert len(samples) > 0.2 * SYNTHESIS_RATE, speaker
        assert 0.5 < np.abs(samples).max() < 1.0
        assert np.isfinite(samples).all()


@pytest.mark.parametrize("variant", [*TRAIN_VARIANTS, *TEST_VARIANTS])
def test_every_variant_speaks_every_phrase_in_a_voice_of_its_own(variant: str) -> None:
    speaker = Speaker("one", variant, 50, 170, 1.0)
    other = Speaker("other", "klatt3" if variant != "klatt3" else "m1", 50, 170, 1.0)

    spoken = say("我想喝水", "cmn", speaker)

    assert np.abs(spoken).max() == pytest.approx(0.7, abs=1e-4)
    assert spoken.tobytes() != say("我想喝水", "cmn", other).tobytes()


def test_a_smaller_person_speaks_with_higher_resonances_at_about_the_same_pace() -> None:
    large, small = (Speaker("one", "m1", 50, 170, tract) for tract in (0.92, 1.08))

    slow, fast = say("零一二三四五", "cmn", large), say("零一二三四五", "cmn", small)

    def centroid(samples: np.ndarray) -> float:
        spectrum = np.abs(np.fft.rfft(samples))
        return float((spectrum * np.arange(len(spectrum))).sum() / spectrum.sum() / len(samples))

    assert centroid(fast) > centroid(slow)
    assert len(fast) == pytest.approx(len(slow), rel=0.12)


def test_the_same_words_sound_different_in_different_dialects() -> None:
    speaker = speakers("train", 1)[0]

    assert len({say("我想喝水", dialect, speaker).tobytes() for dialect in ("cmn", "yue", "hak")}) == 3


def test_hakka_has_a_reading_for_every_character_of_the_phrases() -> None:
    assert {*"".join((*OPENINGS, *ACTIONS)), *DIGITS} <= {*HAKKA_READINGS}


@given(seed=st.integers(), dialect=st.sampled_from(DIALECTS))
def test_a_phrase_is_written_in_the_script_of_its_dialect(seed: int, dialect: str) -> None:
    text = phrase(random.Random(seed), dialect)

    assert text == text.strip() != ""
    assert text.isascii() == dialect.startswith("en")


@pytest.mark.parametrize("voice", ["tlh-nowhere", "", "cmn/../yue"])
def test_a_dialect_that_espeak_does_not_speak_is_an_error(voice: str) -> None:
    with pytest.raises(LocalError, match=r"espeak-ng has no voice"):
        say("water", voice, speakers("train", 1)[0])


@pytest.mark.parametrize("text", ["", " ", "。"])
def test_text_without_sound_is_an_error(text: str) -> None:
    with pytest.raises(LocalError, match=r"espeak-ng produced no sound"):
        say(text, "yue", speakers("train", 1)[0])


def test_a_variant_that_espeak_would_replace_by_its_default_is_an_error() -> None:
    with pytest.raises(LocalError, match=r"there is no voice variant 'andy' among the synthetic speakers"):
        say("我想喝水", "cmn", Speaker("one", "andy", 50, 170, 1.0))


def test_hakka_outside_the_phrases_is_an_error() -> None:
    with pytest.raises(LocalError, match=r"there is no Hakka reading for '飯'"):
        say("吃飯", "hak", speakers("train", 1)[0])


@pytest.mark.parametrize("split", ["dev", "", "Train"])
def test_a_split_that_does_not_exist_is_an_error(split: str) -> None:
    with pytest.raises(LocalError, match=r"there is no split .* of the synthetic speakers, only train and test"):
        speakers(split, 1)


# --- corpora ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


SPEAK = """
import pathlib, sys
from p2pasr.speech.synthetic import write_corpus
write_corpus(pathlib.Path(sys.argv[1]), dialect="yue", split="train", clips=24, people=24, seed=5)
"""


def test_the_same_seed_gives_the_same_bytes_in_any_process_and_after_any_words(tmp_path: Path) -> None:
    say("零一二", "cmn", speakers("test", 1)[0])
    write_corpus(tmp_path / "here", dialect="yue", split="train", clips=24, people=24, seed=5)
    subprocess.run([sys.executable, "-c", SPEAK, tmp_path / "there"], check=True)

    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.parametrize("variant", [*TRAIN_VARIANTS, *TEST_VARIANTS])
def test_no_voice_remembers_what_was_said_before(variant: str) -> None:
    speaker = Speaker("one", variant, 50, 170, 1.0)

    assert say("我想喝水", "cmn", speaker).tobytes() == say("我想喝水", "cmn", speaker).tobytes()


@pytest.mark.parametrize("change", [{"seed": 6}, {"dialect": "cmn"}, {"split": "test"}, {"people": 2}], ids=str)
def test_anything_else_gives_other_recordings(tmp_path: Path, change: dict[str, object]) -> None:
    asked = {"dialect": "yue", "split": "train", "clips": 4, "people": 3, "seed": 5}
    write_corpus(tmp_path / "one", **asked)
    write_corpus(tmp_path / "other", **{**asked, **change})

    one, other = (sorted(p.read_bytes() for p in (tmp_path / n).rglob("*.wav")) for n in ("one", "other"))
    assert len(one) == len(other) == 4
    assert one != other


def test_a_corpus_of_nobodys_speech_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="a corpus needs at least one speaker, not 0"):
        write_corpus(tmp_path, dialect="yue", split="train", clips=1, people=0)


def test_a_corpus_is_a_folder_that_prepare_reads(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    labels = write_corpus(
        tmp_path,
        dialect="hak",
        split="test",
        clips=5,
        people=2,
        on_progress=lambda done, total: calls.append((done, total)),
    )

    rows = json.loads(labels.read_text(encoding="utf-8"))
    assert labels == tmp_path / "labels.json"
    assert [row["dialect"] for row in rows] == ["hak"] * 5
    assert [row["speaker"] for row in rows] == [speakers("test", 2)[n % 2].name for n in range(5)]
    assert calls == [(n, 5) for n in range(1, 6)]
    for row in rows:
        assert soundfile.info(tmp_path / row["audio"]).samplerate == SYNTHESIS_RATE
        read_clip(tmp_path / row["audio"], ClipLimits(window_seconds=3.0, min_seconds=0.2))
