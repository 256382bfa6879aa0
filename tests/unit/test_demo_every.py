"""`p2pasr demo all`: its configurations, what they start from, and the language model that is made for it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pasr import tasks
from p2pasr.demo import every
from p2pasr.demo.every import AIMS, CONFIGS, LANGUAGE_MODEL, Outcome, config_of, run_all, with_what_they_start_from
from p2pasr.demo.language_model import POSITIONS, PROMPT, REPEATS, Recipe, make_language_model, stutter
from p2pasr.protocol.manifest import read_config
from p2pasr.runs import shard_paths
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks import Checkpoint, build
from p2pasr.tasks.speech_llm import SpeechLlmTask

from .conftest import MODEL, Command, plan, start_of
from .test_cli_commands import failed

SMALL = Recipe(width=64, steps=200, learning_rate=6e-3)
CLIPS = {"train": (160, 8), "test": (24, 4)}
"""Split → recordings and their speakers."""


def trained(task: SpeechLlmTask, files: Sequence[Path]) -> tuple[Checkpoint, list[float]]:
    """The end of a short training, and the mean loss of each of its segments."""
    at, losses = start_of(task), []
    for index in range(3):
        at, report = task.segment(at, files, plan(steps=20, samples=8, seed=index, first=20 * index, total=60))
        losses.append(report.loss)
    return at, losses


# --- the language model -------------------------------------------------------------------------


def test_a_projector_alone_hears_speakers_that_it_never_heard_and_adapters_go_on_from_there(tmp_path: Path) -> None:
    files = {}
    for split, (clips, people) in CLIPS.items():
        write_corpus(tmp_path / split, dialect="cmn", split=split, clips=clips, people=people)
        prepare(tmp_path / split, tmp_path / f"{split}-shards", Settings(MODEL, dialect="cmn", clips_per_shard=40))
        files[split] = shard_paths(tmp_path / f"{split}-shards")
    rows = json.loads((tmp_path / "train" / "labels.json").read_text(encoding="utf-8"))
    make_language_model(tmp_path / "model", [row["text"] for row in rows], SMALL)
    config = {"model": MODEL, "language_model": str(tmp_path / "model"), "projector_width": 128, "prompt": PROMPT}
    config |= {"max_tokens": 16, "warmup_steps": 5, "dropout": 0.0}

    first = build("llm", {**config, "learning_rate": 1e-2}, seed=1)
    assert isinstance(first, SpeechLlmTask)
    end, _ = trained(first, files["train"])
    heard = first.evaluate(end.params, files["test"])["cer"]
    first.export(end.params, tmp_path / "exported", {})

    further = {"stage": "adapters", "projector": str(tmp_path / "exported"), "targets": ["q_proj", "v_proj", "up_proj"]}
    second = build("llm", {**config, **further, "learning_rate": 3e-3}, seed=1)
    assert isinstance(second, SpeechLlmTask)
    last, losses = trained(second, files["train"])

    assert first.evaluate(None, files["test"])["cer"] > 0.9
    assert heard < 0.8
    assert second.evaluate(None, files["test"])["cer"] == heard
    assert second.evaluate(last.params, files["test"])["cer"] < 0.8
    assert losses[-1] < 0.75 * losses[0]


@given(ids=st.lists(st.integers(1, 5), max_size=12), seed=st.integers(0, 2**32))
def test_a_text_can_be_read_from_its_stutter_but_for_how_often_a_token_stands_in_a_row(
    ids: list[int], seed: int
) -> None:
    given_text = stutter(ids, [0], random.Random(seed))

    assert [token for token, _ in groupby(filter(None, given_text))] == [token for token, _ in groupby(ids)]
    assert len(ids) <= len(given_text) <= len(ids) * (2 * REPEATS - 1) + REPEATS - 1


def test_the_longest_phrase_fits_the_language_model() -> None:
    characters, prompt_and_end = 6, 2

    assert characters * (2 * REPEATS - 1) + REPEATS - 1 + prompt_and_end + characters <= POSITIONS


def test_a_language_model_is_made_again_from_its_seed(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    for name in ("one", "other"):
        torch.rand(1)
        make_language_model(
            tmp_path / name, ["我想喝水", "五六"], Recipe(width=16, steps=2), lambda *at: steps.append(at)
        )

    assert steps == [(1, 2), (2, 2)] * 2
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


# --- what is trained ----------------------------------------------------------------------------


def test_the_demo_trains_every_kind_of_task() -> None:
    assert AIMS.keys() == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {read_config(CONFIGS / f"{name}.yaml").task.kind for name in AIMS} == tasks.KINDS.keys()


@pytest.mark.parametrize("name", AIMS)
def test_what_a_task_starts_from_is_made_before(name: str) -> None:
    before = [LANGUAGE_MODEL, *list(AIMS)[: list(AIMS).index(name)]]

    assert with_what_they_start_from([name]) - {name} <= {*before}


def test_the_second_stage_brings_the_first_with_it(tmp_path: Path) -> None:
    made = config_of("llm-adapters", tmp_path).task.config

    assert with_what_they_start_from(["llm-adapters"]) == {"llm-adapters", "llm-projector", LANGUAGE_MODEL}
    assert with_what_they_start_from(["lora"]) == {"lora"}
    assert made["language_model"] == str(tmp_path / LANGUAGE_MODEL)
    assert made["projector"] == str(tmp_path / "llm-projector" / "model")


def test_the_language_model_is_asked_as_it_was_taught() -> None:
    for name in ("llm-projector", "llm-adapters"):
        assert read_config(CONFIGS / f"{name}.yaml").task.config["prompt"] == PROMPT


def test_only_what_is_named_and_what_it_starts_from_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def run_one(name: str, *_: object) -> Outcome:
        done.append(name)
        return Outcome(name, name, 1000, 3, "cer", 1.0, 0.5, True, 1.0)

    monkeypatch.setattr(every, "interrupt_on_terminate", lambda: None)
    monkeypatch.setattr(every, "speak", lambda folder: (folder, folder))
    monkeypatch.setattr(every, "write_language_model", lambda *_: done.append(LANGUAGE_MODEL))
    monkeypatch.setattr(every, "run_one", run_one)

    assert run_all(tmp_path, ["student", "llm-adapters"]) == 0
    assert done == [LANGUAGE_MODEL, "llm-projector", "llm-adapters", "student"]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [outcome["task"] for outcome in report] == done[1:]


def test_a_task_that_the_demo_does_not_have_is_one_sentence(p2pasr: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"

    failed(
        p2pasr("demo", "all", "--out", out, "--only", "whisper"), "trains nothing by the name 'whisper'; choose from"
    )
    assert not out.exists()
