"""The same adapters trained in Whisper's window of 30 s and in one no longer than the recordings: speed and CER.

Both sides start from one model and train the same steps on the same recordings of 5 s in the same
order, in turns, on one thread. The demo's model hears 3 s at once, so it gets the positions of 30 s
first, which are sines and cosines of the position and follow exactly, and goes on learning Mandarin
there: like Whisper, it then comes from the long window. The adapters learn Cantonese.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import sinusoids

from p2pasr.protocol.tensors import Tensors
from p2pasr.runs import shard_paths
from p2pasr.speech.audio import Audio
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.pretrained import POSITIONS_A_SECOND, frontend
from p2pasr.speech.synthetic import SYNTHESIS_RATE, phrase, say, speakers
from p2pasr.tasks.base import Checkpoint, SegmentPlan
from p2pasr.tasks.full import FullTask, FullTaskConfig
from p2pasr.tasks.lora import LoraTask, LoraTaskConfig
from p2pasr.tasks.whisper import load_whisper

MODEL = "p2pasr/demo-base"
WHOLE, SHORT = 30, 5
"""Seconds: Whisper's window, and the recordings, which fill the short one."""
CLIPS, TEST_CLIPS, PEOPLE = 240, 80, 12
PHRASES = 2
BASE_BATCH, BATCH, SPEED_BATCH = 8, 4, 2
STEPS_A_TURN = 5
BASE_CLIPS, BASE_PEOPLE = 1200, 48
BASE_STEPS = {SHORT: 500, WHOLE: 40}
"""Window → steps by which the demo's model is brought to 30 s; most are made where they are cheap."""
TINY = WhisperConfig(
    d_model=384,
    encoder_layers=4,
    decoder_layers=4,
    encoder_attention_heads=6,
    decoder_attention_heads=6,
    encoder_ffn_dim=1536,
    decoder_ffn_dim=1536,
)
"""The shape of openai/whisper-tiny."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: character error rates in percent, on speakers that were not heard in training."""

    seed: int
    window_seconds: int
    seconds_a_step: float
    times_faster: float
    cer_before: float
    cer_after: float
    cer_after_in_30_s: float


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One line of the table of `--speed`."""

    model: str
    window_seconds: int
    seconds_a_step: float
    times_faster: float


@dataclass(slots=True)
class Side:
    """Training in one window, and how far it came."""

    window: int
    task: LoraTask
    train: list[Path]
    at: Checkpoint
    seconds: list[float] = field(default_factory=list)

    def turn(self, plan: SegmentPlan) -> None:
        """Train one segment; of its steps the first, in which shards are read, is not timed.

        Time is the processor's, which others at work on the machine do not lengthen much.
        """
        ends: list[float] = []
        self.at, _ = self.task.segment(self.at, self.train, plan, lambda *_: ends.append(time.process_time()))
        self.seconds += [after - before for before, after in itertools.pairwise(ends)]


def measure(seeds: Sequence[int], turns: int) -> list[Row]:
    """Train and score both sides with each seed.

    Args:
        turns: of each side, :data:`STEPS_A_TURN` steps each.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        folder = Path(name)
        base = _base(folder / "base")
        train = _speech(folder / "train", base, "yue", "train", CLIPS, PEOPLE)
        test = _speech(folder / "test", base, "yue", "test", TEST_CLIPS, PEOPLE)
        before: dict[int, float] = {}
        rows = []
        for seed in seeds:
            sides = {window: _side(base, window, train[window], seed) for window in (WHOLE, SHORT)}
            before = before or {window: _cer(side, None, test) for window, side in sides.items()}
            _in_turns(list(sides.values()), seed, turns, BATCH)
            slowest = statistics.median(sides[WHOLE].seconds)
            for window, side in sides.items():
                taken = statistics.median(side.seconds)
                after = _cer(side, side.at.params, test)
                whole = after if window == WHOLE else _cer(sides[WHOLE], side.at.params, test)
                rows.append(Row(seed, window, taken, slowest / taken, before[window], after, whole))
                print(rows[-1], file=sys.stderr, flush=True)
        return rows


def speeds(turns: int) -> list[SpeedRow]:
    """Time both sides for the demo's model and for one of whisper-tiny's shape with random weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = {
        "demo base": lengthened(load_whisper(MODEL)),
        "whisper-tiny's shape, random weights": WhisperForConditionalGeneration(TINY),
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        for number, (what, model) in enumerate(models.items()):
            folder = Path(name) / str(number)
            _save(model, folder)
            train = _speech(folder / "train", folder, "yue", "train", BATCH, PEOPLE)
            sides = [_side(folder, window, train[window], 0) for window in (WHOLE, SHORT)]
            _in_turns(sides, 0, turns, SPEED_BATCH)
            taken = [statistics.median(side.seconds) for side in sides]
            rows += [SpeedRow(what, side.window, own, taken[0] / own) for side, own in zip(sides, taken, strict=True)]
    return rows


def lengthened(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Give a model the encoder's positions of 30 s; the first are those it had."""
    positions = WHOLE * POSITIONS_A_SECOND
    encoder = model.model.encoder
    weight = sinusoids(positions, model.config.d_model)
    encoder.embed_positions = torch.nn.Embedding(positions, model.config.d_model, _weight=weight, _freeze=True)
    model.config.max_source_positions = encoder.max_source_positions = positions
    return model


def spaced(pieces: Sequence[Audio], length: int, draw: random.Random) -> Audio:
    """Pieces of sound in their order, with silence drawn at random before, between and behind them.

    Args:
        pieces: float32, shape (samples,) each, together no longer than `length`.

    Returns:
        float32, shape (length,).
    """
    free = length - sum(map(len, pieces))
    silences = sorted(draw.randint(0, free) for _ in pieces)
    out = np.zeros(length, np.float32)
    spoken = 0
    for silence, piece in zip(silences, pieces, strict=True):
        out[silence + spoken : silence + spoken + len(piece)] = piece
        spoken += len(piece)
    return out


def _base(folder: Path) -> Path:
    """The demo's model, at home in a window of 30 s."""
    _save(lengthened(load_whisper(MODEL)), folder / "start")
    speech = _speech(folder / "train", folder / "start", "cmn", "train", BASE_CLIPS, BASE_PEOPLE)
    params: Tensors = {}
    for window, steps in BASE_STEPS.items():
        config = FullTaskConfig(
            model=str(folder / "start"), window_seconds=float(window), learning_rate=1e-3, warmup_steps=10
        )
        task = FullTask(config, seed=0)
        plan = SegmentPlan(bytes(32), steps, BASE_BATCH, 0, steps)
        end, _ = task.segment(Checkpoint(task.initial_params() | params), speech[window], plan)
        params = end.params
    task.export(params, folder / "trained", {})
    return folder / "trained"


def _save(model: WhisperForConditionalGeneration, folder: Path) -> None:
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=WHOLE).save_pretrained(folder)
    frontend(MODEL).tokenizer.save_pretrained(folder)


def _speech(folder: Path, model: Path, dialect: str, split: str, clips: int, people: int) -> dict[int, list[Path]]:
    """Recordings of 5 s, each with some phrases of one speaker; window → shards."""
    (folder / "in").mkdir(parents=True)
    draw = random.Random(f"{dialect} {split}")
    noise = np.random.default_rng(0)
    voices = speakers(split, people)
    length = SHORT * SYNTHESIS_RATE
    rows = []
    for index in range(clips):
        speaker = voices[index % people]
        texts = [phrase(draw, dialect) for _ in range(PHRASES)]
        samples = spaced([say(text, dialect, speaker) for text in texts], length, draw)
        samples += 0.002 * noise.standard_normal(length).astype(np.float32)
        soundfile.write(folder / "in" / f"{index}.wav", samples, SYNTHESIS_RATE, subtype="PCM_16")
        rows.append({"audio": f"{index}.wav", "text": "".join(texts), "speaker": speaker.name, "dialect": dialect})
    (folder / "in" / "labels.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    for window in (WHOLE, SHORT):
        settings = Settings(str(model), window_seconds=float(window), strict=True)
        prepare(folder / "in", folder / str(window), settings)
    return {window: shard_paths(folder / str(window)) for window in (WHOLE, SHORT)}


def _side(model: Path, window: int, train: list[Path], seed: int) -> Side:
    config = LoraTaskConfig(
        model=str(model),
        window_seconds=float(window),
        targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        learning_rate=5e-3,
        warmup_steps=10,
    )
    task = LoraTask(config, seed)
    return Side(window, task, train, Checkpoint(task.initial_params()))


def _in_turns(sides: Sequence[Side], seed: int, turns: int, batch: int) -> None:
    steps = turns * STEPS_A_TURN
    for first in range(0, steps, STEPS_A_TURN):
        plan = SegmentPlan(seed.to_bytes(16, "big") + first.to_bytes(16, "big"), STEPS_A_TURN, batch, first, steps)
        for side in sides:
            side.turn(plan)


def _cer(side: Side, params: Tensors | None, test: dict[int, list[Path]]) -> float:
    return 100 * float(side.task.evaluate(params, test[side.window])["cer"])
