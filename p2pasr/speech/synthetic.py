"""A synthetic corpus for the demo and the tests: phrases and digit strings spoken by espeak-ng.

It shows that the machinery works; it says nothing about how well anything recognises people. A
synthetic speaker is an espeak-ng voice variant with its own pitch, rate and vocal-tract length.
Speakers for training and for testing use different variants, so nobody is heard in both.

espeak-ng is licensed GPL-3 and is loaded at run time from the `demo` extra; nothing else needs it.
"""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p2pasr.errors import LocalError
from p2pasr.speech.audio import Audio

OPENINGS = ("我想", "我要", "帮我", "请你", "")
ACTIONS = (
    "喝水", "喝茶", "吃饭", "吃药", "睡觉", "休息", "回家", "出门", "看书", "看电视", "听歌", "洗手",
    "坐下", "上楼", "下楼", "开灯", "关灯", "开门", "关门", "开窗", "关窗", "打电话",
)  # fmt: skip
DIGITS = "零一二三四五六七八九"

ENGLISH_OPENINGS = ("i want to", "please", "help me", "")
ENGLISH_ACTIONS = (
    "drink water", "eat rice", "go home", "sit down", "open the door", "close the door",
    "turn on the light", "turn off the light", "read a book", "call my mother", "wash my hands",
)  # fmt: skip
ENGLISH_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

HAKKA_READINGS = dict(
    zip(
        "我想要帮请你喝水茶吃饭药睡觉休息回家出门看书电视听歌洗手坐下上楼开关灯窗打话零一二三四五六七八九",
        "ngài sióng yeu pông chhiáng ngì hot súi chhà sṳ̍t fan yo̍k sòi kau hiû sit fì kâ chhut mùn "
        "khon sû thien sṳ thâng kô sé sú chhô hâ sông lèu khôi kwân tên chhûng tá fa làng yit ngi "
        "sâm si ńg liuk chhit pat kiú".split(),
        strict=True,
    )
)
"""Pha̍k-fa-sṳ readings: espeak-ng's Hakka voice reads romanised text only."""

TRAIN_VARIANTS = (
    "m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4", "klatt", "klatt2", "klatt4", "adam",
    "aunty", "belinda", "caleb", "david", "edward", "grandma", "john", "linda", "paul", "steph",
)  # fmt: skip
TEST_VARIANTS = ("m7", "m8", "f5", "klatt3", "Andy", "Annie", "benjamin", "grandpa", "robert", "quincy")
VARIANTS = {"train": TRAIN_VARIANTS, "test": TEST_VARIANTS}
"""Split → espeak-ng voice variants. One that espeak-ng lacks would be spoken without a word by its default."""

SYNTHESIS_RATE = 22_050
"""Hz, what espeak-ng produces."""

_ESPEAK_RATE, _ESPEAK_PITCH = 1, 3
_AUDIO_OUTPUT_SYNCHRONOUS, _CHARS_UTF8, _DONT_EXIT = 2, 1, 0x8000
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_NOISE_SEED = 1


@dataclass(frozen=True, slots=True)
class Speaker:
    """A synthetic voice.

    Attributes:
        name: unique among train and test speakers together.
        variant: espeak-ng voice variant.
        pitch: espeak-ng's pitch parameter, 0…99, 50 is the variant's own.
        rate: words a minute.
        tract: factor on the vocal tract's resonances (above 1: a smaller person).
    """

    name: str
    variant: str
    pitch: int
    rate: int
    tract: float


def speakers(split: str, count: int) -> list[Speaker]:
    """The first `count` speakers of a split, the same ones on every machine.

    Args:
        split: "train" or "test"; their variants are disjoint.
        count: any number; variants repeat with another pitch, rate and tract.

    Raises:
        LocalError: there is no such split.
    """
    if split not in VARIANTS:
        raise LocalError(f"there is no split {split!r} of the synthetic speakers, only {' and '.join(VARIANTS)}")
    variants = VARIANTS[split]
    draw = random.Random(f"p2pasr synthetic speakers {split}")
    return [
        Speaker(
            name=f"{split}-{index:03d}-{variants[index % len(variants)]}",
            variant=variants[index % len(variants)],
            pitch=draw.randint(30, 70),
            rate=draw.randint(140, 200),
            tract=round(draw.uniform(0.92, 1.08), 3),
        )
        for index in range(count)
    ]


def phrase(draw: random.Random, dialect: str) -> str:
    """One transcript: a phrase from the templates or, as often, a string of three to six digits."""
    english = dialect.startswith("en")
    if draw.random() < 0.5:
        digits = draw.choices(ENGLISH_DIGITS if english else DIGITS, k=draw.randint(3, 5 if english else 6))
        return " ".join(digits) if english else "".join(digits)
    if english:
        return f"{draw.choice(ENGLISH_OPENINGS)} {draw.choice(ENGLISH_ACTIONS)}".strip()
    return draw.choice(OPENINGS) + draw.choice(ACTIONS)


def say(text: str, dialect: str, speaker: Speaker) -> Audio:
    """Speak a transcript, the same samples whatever was spoken before.

    Args:
        text: Chinese characters for `cmn`, `yue` and `hak`; English otherwise.
        dialect: an espeak-ng voice such as `cmn`, `yue`, `hak`, `en-us`, `en-gb-scotland`.
        speaker: one whose variant is among :data:`VARIANTS`.

    Returns:
        float32, shape (samples,), mono at :data:`SYNTHESIS_RATE`, peak 0.7.

    Raises:
        LocalError: espeak-ng is missing or knows no such voice, or nothing can be heard of the text.
    """
    if speaker.variant not in TRAIN_VARIANTS + TEST_VARIANTS:
        raise LocalError(f"there is no voice variant {speaker.variant!r} among the synthetic speakers")
    voice = f"{dialect}+{speaker.variant}"
    samples = _warp(_speak(_hakka(text) if dialect == "hak" else text, voice, speaker), speaker.tract)
    peak = float(np.abs(samples).max(initial=0))
    if not peak:
        raise LocalError(f"espeak-ng produced no sound for {text!r} in {voice}")
    return samples * (0.7 / peak)


def write_corpus(
    out: Path,
    *,
    dialect: str,
    split: str,
    clips: int,
    people: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a folder that `p2pasr data prepare` reads: `audio/*.wav` and `labels.json`.

    Args:
        out: folder to fill; recordings of the same name are overwritten.
        split: "train" or "test", which decides who speaks.
        clips, people: how many recordings by how many speakers, in turn.
        seed: what is said and how much noise lies under it.
        on_progress: called with (clips written, clips in all).

    Returns:
        The path of `labels.json`.

    Raises:
        LocalError: there is no such split or nobody to speak, or espeak-ng cannot speak the dialect.
    """
    import soundfile

    (out / "audio").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (text, speaker, samples) in enumerate(utterances(dialect, split, clips, people, seed)):
        name = f"audio/{dialect}-{split}-{index:05d}.wav"
        soundfile.write(out / name, samples, SYNTHESIS_RATE, subtype="PCM_16")
        rows.append({"audio": name, "text": text, "speaker": speaker.name, "dialect": dialect})
        if on_progress is not None:
            on_progress(index + 1, clips)
    labels = out / "labels.json"
    labels.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")
    return labels


def utterances(dialect: str, split: str, clips: int, people: int, seed: int) -> Iterator[tuple[str, Speaker, Audio]]:
    """Draw transcripts and speak them, each over a little noise (25 to 45 dB below the speech)."""
    draw = random.Random(f"{seed} {dialect} {split}")
    noise = np.random.default_rng([seed, *dialect.encode(), *split.encode()])
    voices = speakers(split, people)
    if not voices:
        raise LocalError(f"a corpus needs at least one speaker, not {people}")
    for index in range(clips):
        speaker = voices[index % len(voices)]
        text = phrase(draw, dialect)
        samples = say(text, dialect, speaker)
        level = 10 ** (-draw.uniform(25, 45) / 20) * float(np.sqrt(np.mean(samples**2)))
        yield text, speaker, samples + level * noise.standard_normal(len(samples)).astype(np.float32)


def _hakka(text: str) -> str:
    """The readings of a transcript's characters, which espeak-ng's Hakka voice can speak."""
    if unknown := "".join(char for char in text if char not in HAKKA_READINGS):
        raise LocalError(f"there is no Hakka reading for {unknown!r}: only the phrases of the corpus can be spoken")
    return " ".join(HAKKA_READINGS[char] for char in text)


def _speak(text: str, voice: str, speaker: Speaker) -> Audio:
    """What espeak-ng says, at its own vocal-tract length. It is not thread-safe."""
    pieces: list[npt.NDArray[np.int16]] = []

    def collect(samples: ctypes._Pointer[ctypes.c_short], count: int, _events: object) -> int:
        if count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(collect)
    with _fresh_espeak() as espeak:
        espeak.espeak_SetSynthCallback(callback)
        if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
            raise LocalError(f"espeak-ng has no voice {voice!r}")
        # Resampling by `tract` moves the formants; pitch and pace are set against it beforehand.
        espeak.espeak_SetParameter(_ESPEAK_RATE, round(speaker.rate / speaker.tract), 0)
        espeak.espeak_SetParameter(_ESPEAK_PITCH, speaker.pitch, 0)
        data = text.encode()
        espeak.espeak_Synth(data, len(data) + 1, 0, 0, 0, _CHARS_UTF8, None, None)
        espeak.espeak_Synchronize()
    spoken = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    return np.divide(spoken, 32_768, dtype=np.float32)


@contextmanager
def _fresh_espeak() -> Iterator[ctypes.CDLL]:
    """An espeak-ng that has said nothing yet, unloaded when done with.

    Its flutter, noise and echo run on from one utterance to the next, and most of that cannot be set
    back: only a library that is loaded anew says the same whatever was said before.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise LocalError("synthetic speech needs espeak-ng: pip install 'p2pasr[demo]'") from error

    espeak, libc = ctypes.CDLL(espeakng_loader.get_library_path()), ctypes.CDLL(None)
    try:
        data = espeakng_loader.get_data_path().encode()
        rate = espeak.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _DONT_EXIT)
        if rate != SYNTHESIS_RATE:
            raise LocalError(f"espeak-ng could not start (espeak_Initialize returned {rate})")
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED))
        libc.srand(_NOISE_SEED)
        yield espeak
        espeak.espeak_Terminate()
    finally:
        libc.dlclose(ctypes.c_void_p(espeak._handle))


def _warp(samples: Audio, factor: float) -> Audio:
    """Play faster by `factor`, which raises every resonance by it (linear interpolation)."""
    if factor == 1.0 or not len(samples):
        return samples
    positions = np.arange(0, len(samples) - 1, factor)
    warped: Audio = np.interp(positions, np.arange(len(samples)), samples).astype(np.float32)
    return warped
