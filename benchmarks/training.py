"""A LoRA step through our task beside transformers' `Seq2SeqTrainer` with peft, and feature preparation
beside `WhisperFeatureExtractor` as it is usually called, padding every clip to 30 s.

Both sides train the same model from the same clips with the same batch, window, optimizer and number
of threads, in turns; models are built before the clock starts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from p2pasr.speech.audio import SAMPLE_RATE
from p2pasr.speech.mel import log_mel, restore
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.pretrained import frontend, load
from p2pasr.speech.shards import Clip, read_shard
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks.base import Checkpoint, SegmentPlan
from p2pasr.tasks.lora import LoraTask, LoraTaskConfig

MODEL = "p2pasr/demo-base"
CLIP_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, as `--json` prints it."""

    what: str
    system: str
    unit: str
    value: float
    times_the_other: float


def measure(steps: int, batch: int, turns: int) -> list[Row]:
    """Measure both, turn by turn, and compare the fastest."""
    rows = _feature_rows(turns)  # first, as in a process that does nothing else: training warms the allocator
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus", dialect="yue", split="train", clips=128, people=8)
        index = prepare(folder / "corpus", folder / "shards", Settings(MODEL, dialect="yue"))
        shards = [folder / "shards" / shard.file for shard in index.shards]
        ours, theirs = _our_step(shards, steps, batch), _their_step(shards, steps, batch, folder)
        step_ours, step_theirs = _in_turns(ours, theirs, turns)
    samples = steps * batch
    what = f"LoRA step, {MODEL}, batch {batch}, window 3 s, {torch.get_num_threads()} threads"
    return rows + _pair(what, "samples/s", samples / step_ours, samples / step_theirs, "Seq2SeqTrainer + peft")


def _feature_rows(turns: int) -> list[Row]:
    rows: list[Row] = []
    cores = torch.get_num_threads()
    for threads in sorted({1, cores}):  # preparation runs one process a core, each with one thread
        torch.set_num_threads(threads)
        ours, theirs = _features(turns)
        what = f"log-mels of a {CLIP_SECONDS:g} s clip, {threads} thread{'s' if threads > 1 else ''}"
        rows += _pair(what, "clips/s", 1 / ours, 1 / theirs, "WhisperFeatureExtractor, 30 s")
    torch.set_num_threads(cores)
    return rows


def _pair(what: str, unit: str, ours: float, theirs: float, name: str) -> list[Row]:
    return [Row(what, "p2pasr", unit, ours, ours / theirs), Row(what, name, unit, theirs, theirs / ours)]


def _in_turns(ours: Callable[[], None], theirs: Callable[[], None], turns: int) -> tuple[float, float]:
    """Seconds of each's fastest turn, after one that does not count; what else the machine does only adds to them."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns + 1):
        for run, taken in zip((ours, theirs), seconds, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return min(seconds[0][1:]), min(seconds[1][1:])


def _config() -> LoraTaskConfig:
    return LoraTaskConfig(model=MODEL, rank=16, alpha=32.0, dropout=0.05, targets=("q_proj", "v_proj"))


def _our_step(shards: Sequence[Path], steps: int, batch: int) -> Callable[[], None]:
    task = LoraTask(_config(), seed=0)
    plan = SegmentPlan(bytes(32), steps, batch, 0, steps)

    def run() -> None:
        task.segment(Checkpoint(task.initial_params()), shards, plan)

    return run


def _their_step(shards: Sequence[Path], steps: int, batch: int, folder: Path) -> Callable[[], None]:
    """The recipe of Hugging Face's fine-tuning guides: features in memory, labels padded with -100."""
    from peft import LoraConfig, get_peft_model
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperForConditionalGeneration

    config = _config()
    model = get_peft_model(
        load(WhisperForConditionalGeneration, MODEL, dtype=torch.float32),
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
            bias="none",
        ),
    )
    frames = 2 * model.config.max_source_positions
    examples = [_example(clip, frames) for shard in shards for clip in read_shard(shard).clips]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=config.learning_rate,
        warmup_steps=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def run() -> None:
        trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=examples, data_collator=_collate)
        trainer.train()

    return run


def _example(clip: Clip, frames: int) -> dict[str, Any]:
    features = torch.from_numpy(restore(clip.mel, frames).astype(np.float32))
    return {"input_features": features, "labels": torch.tensor(clip.tokens[1:])}


def _collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    labels = torch.nn.utils.rnn.pad_sequence(
        [example["labels"] for example in examples], batch_first=True, padding_value=-100
    )
    return {"input_features": torch.stack([example["input_features"] for example in examples]), "labels": labels}


def _features(turns: int) -> tuple[float, float]:
    """Seconds a clip: ours at its true length, and theirs padded to 30 s."""
    from transformers import WhisperFeatureExtractor

    padding = WhisperFeatureExtractor()
    truncating = frontend(MODEL).extractor
    draw = np.random.default_rng(0)
    audio = (0.1 * draw.standard_normal(int(CLIP_SECONDS * SAMPLE_RATE))).astype(np.float32)
    clips = 20

    def ours() -> None:
        for _ in range(clips):
            log_mel(audio, truncating)

    def theirs() -> None:
        for _ in range(clips):
            padding(audio, sampling_rate=SAMPLE_RATE, return_tensors="np")

    a, b = _in_turns(ours, theirs, turns)
    return a / clips, b / clips
