"""The same student with and without its teacher: equal clips, steps, order and schedule.

The teacher is the demo's model, which knows synthetic Mandarin; the student has one of its two
decoder layers and its encoder, which stays as it is. The transcripts that both learn from are wrong
in places, as those of volunteers are: each character is another one with some probability.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pasr import tasks
from p2pasr.peers.identity import Identity
from p2pasr.runs import shard_paths
from p2pasr.speech.prepare import Settings, prepare, read_index
from p2pasr.speech.synthetic import ACTIONS, DIGITS, write_corpus
from p2pasr.tasks.base import Checkpoint, SegmentPlan
from p2pasr.tasks.labelling import LabelSettings, label_shards
from p2pasr.tasks.teacher import Teacher

MODEL = "p2pasr/demo-base"
CLIPS, TEST_CLIPS, PEOPLE = 64, 64, 8
BATCH = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: character error rates on speakers that were not heard in training."""

    seed: int
    student_untrained: float
    without_teacher: float
    with_teacher: float
    teacher: float


def measure(seeds: Sequence[int], steps: int, wrong: float) -> list[Row]:
    """Train each pair of students.

    Args:
        steps: of each student.
        wrong: probability that a character of a training transcript is another one.
    """
    with tempfile.TemporaryDirectory(prefix="p2pasr-bench-") as name:
        folder = Path(name)
        train, test = _corpus(folder / "train", "train", CLIPS, wrong), _corpus(folder / "test", "test", TEST_CLIPS, 0)
        index = read_index(train)
        signer = Identity(Ed25519PrivateKey.generate())
        label_shards(Teacher(MODEL, index.features, MODEL), train, folder / "labelled", LabelSettings(), signer)
        labelled, held_out = shard_paths(folder / "labelled"), shard_paths(test)
        teacher = tasks.build("full", {"model": MODEL}, seed=0).evaluate(None, held_out)["cer"]
        rows = []
        for seed in seeds:
            untrained, alone = _student(labelled, held_out, seed, steps, 0.0)
            _, taught = _student(labelled, held_out, seed, steps, 0.7)
            rows.append(Row(seed, untrained, alone, taught, teacher))
        return rows


def _corpus(folder: Path, split: str, clips: int, wrong: float) -> Path:
    labels = write_corpus(folder / "in", dialect="cmn", split=split, clips=clips, people=PEOPLE)
    rows = json.loads(labels.read_text(encoding="utf-8"))
    draw = random.Random(split)
    letters = sorted({*"".join(ACTIONS), *DIGITS})
    for row in rows:
        row["text"] = "".join(draw.choice(letters) if draw.random() < wrong else letter for letter in row["text"])
    labels.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    prepare(folder / "in", folder / "shards", Settings(MODEL))
    return folder / "shards"


def _student(
    labelled: Sequence[Path], held_out: Sequence[Path], seed: int, steps: int, alpha: float
) -> tuple[float, float]:
    """Error rates of a student before and after training; the teacher's share of the loss is `alpha`."""
    config = {
        "model": MODEL,
        "decoder_layers": [0],
        "freeze_encoder": True,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "alpha": alpha,
    }
    pinned = tasks.pin("distill", config, None, labelled)
    task = tasks.build("distill", pinned, seed=seed, shards=labelled)
    plan = SegmentPlan(seed.to_bytes(32, "big"), steps, BATCH, 0, steps)
    end, _ = task.segment(Checkpoint(task.initial_params()), labelled, plan)
    return task.evaluate(None, held_out)["cer"], task.evaluate(end.params, held_out)["cer"]
