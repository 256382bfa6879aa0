"""A little synthetic Cantonese, made once, and a model small enough to train in a test."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")  # before huggingface_hub reads them

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from p2pasr import cli, tasks
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.manifest import RunConfig, RunManifest
from p2pasr.runs import new_run, shard_paths
from p2pasr.speech.audio import SAMPLE_RATE, Audio
from p2pasr.speech.prepare import Settings, prepare, read_index
from p2pasr.speech.pretrained import BUNDLED, Frontend, frontend
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks import Checkpoint, SegmentPlan
from p2pasr.tasks.labelling import LabelSettings, label_shards
from p2pasr.tasks.teacher import Teacher

from .builders import make_identity

torch.set_num_threads(1)

MODEL = "p2pasr/demo-base"

LORA: dict[str, Any] = {"model": MODEL, "rank": 4, "warmup_steps": 0}
"""The smallest task configuration that learns."""


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """An empty store."""
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """A run's empty folder, open."""
    opened = Journal(tmp_path / "run")
    yield opened
    opened.close()


def tone(seconds: float, rate: int = SAMPLE_RATE, hertz: float = 440.0, peak: float = 0.3) -> Audio:
    """A steady note: a recording whose content survives any format."""
    times = np.arange(round(seconds * rate)) / rate
    return (peak * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def recordings(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write `labels.json`, and for each row whose file is not there yet a note of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        path = folder / row["audio"]
        if not row["audio"].startswith("missing") and not path.exists():
            soundfile.write(path, tone(0.6, hertz=200.0 + 10 * number), SAMPLE_RATE)
    (folder / "labels.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


def plan(*, steps: int = 2, samples: int = 4, seed: int = 0, first: int = 0, total: int = 100) -> SegmentPlan:
    """A short segment."""
    return SegmentPlan(bytes([seed]) * 32, steps, samples, first, total)


def start_of(task: tasks.Task) -> Checkpoint:
    """Where the first round of a run starts."""
    return Checkpoint(task.initial_params())


@pytest.fixture(scope="session")
def base() -> Frontend:
    """What stands before and after the demo's model."""
    return frontend(MODEL)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four recordings by four speakers, with `labels.json`."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, dialect="yue", split="train", clips=24, people=4)
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as three shards."""
    folder = tmp_path_factory.mktemp("shards")
    prepare(corpus, folder, Settings(MODEL, dialect="yue", clips_per_shard=8))
    return folder


@pytest.fixture(scope="session")
def shard_files(shards: Path) -> Sequence[Path]:
    """The files of the three shards, in their order."""
    return shard_paths(shards)


@pytest.fixture(scope="session")
def labelled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three shards with labels of 16 tokens by the demo's model."""
    folder = tmp_path_factory.mktemp("labelled")
    teacher = Teacher(MODEL, read_index(shards).features, MODEL)
    label_shards(teacher, shards, folder, LabelSettings(top_k=16), make_identity(1))
    return folder


@pytest.fixture(scope="session")
def labelled_files(labelled: Path) -> Sequence[Path]:
    """The files of the three labelled shards, in their order."""
    return shard_paths(labelled)


@pytest.fixture(scope="session")
def steady_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with the dropout of its own layers off, so that a step is a sum over its examples."""
    folder = tmp_path_factory.mktemp("models") / "steady"
    shutil.copytree(BUNDLED[MODEL], folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.0}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers that knows nothing, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    letters = sorted(ByteLevel.alphabet())
    tokens = Tokenizer(BPE({token: index for index, token in enumerate([*letters, "<end>"])}, []))
    tokens.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(folder)  # noqa: S106
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(letters) + 1, max_position_embeddings=256, initializer_range=0.1, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_task(steady_base: Path) -> Callable[..., tasks.Task]:
    """Build a task; keyword arguments change its configuration. `steady=True` turns all dropout off."""

    def make(*, seed: int = 1, steady: bool = False, **config: Any) -> tasks.Task:
        quiet = {"model": str(steady_base), "dropout": 0.0} if steady else {}
        return tasks.build("lora", {**LORA, **quiet, **config}, seed=seed)

    return make


@pytest.fixture(scope="session")
def task(make_task: Callable[..., tasks.Task]) -> tasks.Task:
    """A LoRA task of the smallest kind."""
    return make_task()


@pytest.fixture(scope="session")
def manifest(shards: Path) -> RunManifest:
    """A run on the corpus."""
    return new_run(run_config(), shards)


def run_config(**changes: Any) -> RunConfig:
    """The configuration of a quick run."""
    sections = {"name": "quick", "task": {"kind": "lora", "config": LORA}, "rounds": {"rounds": 3}}
    return RunConfig.model_validate({**sections, **changes})


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def p2pasr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the console script in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["p2pasr", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run
