"""Checking a task of one's own: what holds passes, and each way of breaking it is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SpeechT5Config, SpeechT5ForTextToSpeech
from typer.testing import CliRunner

from examples.characters import WIDTH, Characters, cut, run_config
from examples.speecht5 import SpeechT5Task, Utterance, utterances
from p2pasr import Checkpoint, LocalError, new_run, trainable, write_shards
from p2pasr.cli import app
from p2pasr.protocol.manifest import VerifySection
from p2pasr.runs import shard_paths
from p2pasr.shards import OwnShard
from p2pasr.taskcheck import Check, Target, check_task, plan_for

from .conftest import plan, start_of

HERE = "tests.unit.test_taskcheck"


class Honest(Characters):
    """Keeps every promise."""


class Undecided(Characters):
    """Draws its first parameters anew each time."""

    def initial_params(self) -> Any:
        return {name: value + np.float32(np.random.rand()) for name, value in super().initial_params().items()}


class Unseeded(Characters):
    """Adds noise that the segment's seed has no say in."""

    noise = np.random.default_rng()

    def loss(self, examples: Sequence[np.ndarray]) -> torch.Tensor:
        return super().loss(examples) * float(1 + self.noise.random())


class Remembering(Characters):
    """Trains differently when it has trained before."""

    calls = 0

    def segment(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        end, report = super().segment(*args, **kwargs)
        return replace(end, params={k: v + np.float32(1e-3 * self.calls) for k, v in end.params.items()}), report


class Overwriting(Characters):
    """Writes into the arrays that it is given."""

    def segment(self, start: Checkpoint, *args: Any, **kwargs: Any) -> Any:
        end = super().segment(start, *args, **kwargs)
        if start.params["0.weight"].flags.writeable:
            start.params["0.weight"][:] = 0
        return end


class Evaluated(Characters):
    """Training depends on what was evaluated before."""

    tilt = 0.0

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.tilt += 1e-3
        return super().evaluate(*args, **kwargs)

    def loss(self, examples: Sequence[np.ndarray]) -> torch.Tensor:
        return super().loss(examples) + self.tilt * self.model[2].weight.square().sum()


class Forgetful(Characters):
    """Leaves moments out of its checkpoints and keeps them to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}

    def segment(self, start: Checkpoint, *args: Any, **kwargs: Any) -> Any:
        moments = self.kept if start.step else {}
        end, report = super().segment(replace(start, moments=moments), *args, **kwargs)
        self.kept = end.moments
        return replace(end, moments={}), report


class Racing(Characters):
    """Says that its values move less than they do."""

    def largest_move(self, *args: Any) -> float:
        return super().largest_move(*args) / 100


class Normalised(Characters):
    """Normalises by running statistics, which are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model.insert(3, torch.nn.BatchNorm1d(WIDTH))
        self.trained = trainable(self.model)


class Still(Characters):
    """Trains nothing."""

    def segment(self, start: Checkpoint, *args: Any, **kwargs: Any) -> Any:
        end, report = super().segment(start, *args, **kwargs)
        return replace(end, params=start.params), report


class Mute(Characters):
    """Exports nothing."""

    def export(self, *args: Any) -> None:
        return


class Failing(Characters):
    """Its code has an error."""

    def loss(self, examples: Sequence[np.ndarray]) -> torch.Tensor:
        raise KeyError("mel")


@pytest.fixture(scope="module")
def text_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This file as shards."""
    folder = tmp_path_factory.mktemp("text")
    write_shards(folder, cut(Path(__file__).read_bytes()[:9000]))
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other processes, which take seconds to start."""
    monkeypatch.setattr("p2pasr.taskcheck._elsewhere", lambda *args: iter(()))


def checked(name: str, shards: Path) -> list[Check]:
    target = Target(f"{HERE}:{name}", Path.cwd(), tuple(shard_paths(shards)))
    return list(check_task(target, plan_for(2, 4), VerifySection()))


def test_a_task_that_keeps_its_promises_passes(text_shards: Path) -> None:
    done = checked("Honest", text_shards)

    assert [check.broken for check in done] == [None] * len(done)
    assert len(done) > 15


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("Undecided", "training leaves its start as it was"),
        ("Unseeded", "the same segment gives the same bits again"),
        ("Remembering", "the same segment gives the same bits again"),
        ("Overwriting", "training leaves its start as it was"),
        ("Evaluated", "what it evaluated before does not matter"),
        ("Forgetful", "another instance goes on from a packed checkpoint"),
        ("Racing", "no value moves further than the task says"),
        ("Still", "a segment ends with the parameters that it began with, moved"),
        ("Normalised", "what an instance trained before does not change a score"),
        ("Mute", "it exports what it trained"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_a_broken_promise_is_named(name: str, promise: str, text_shards: Path) -> None:
    assert {check.promise: check.broken for check in checked(name, text_shards)}[promise] is not None


def test_a_start_that_another_process_does_not_share_is_named(text_shards: Path) -> None:
    found = {check.promise: check.broken for check in checked("Undecided", text_shards)}

    assert found["another process starts from the same bits"] == "it computes other bits, so that nobody could join"


def test_a_task_whose_code_fails_is_one_sentence(text_shards: Path) -> None:
    with pytest.raises(LocalError, match=r"^its first segment fails: KeyError: 'mel'$"):
        checked("Failing", text_shards)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", r"^'nothing' is neither module:Class nor a run's configuration \(\.yaml\)$"),
        ("no.such.module:Task", r"^'no\.such\.module:Task' cannot be made without arguments \(No module named 'no'\)$"),
        (f"{HERE}:Nothing", r"cannot be made without arguments \(module .* has no attribute 'Nothing'\)$"),
        ("pathlib:Path", r"^'pathlib:Path' is no task: it has no initial_params, segment, evaluate, export, hardw"),
    ],
)
def test_what_is_no_task_is_one_sentence(name: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=sentence):
        Target(name, tmp_path, ()).make()


@pytest.mark.usefixtures("alone")
def test_the_command_prints_every_promise_and_fails_if_one_is_broken(text_shards: Path) -> None:
    result = CliRunner().invoke(app, ["task", "check", f"{HERE}:Mute", "--shards", str(text_shards), "--json"])

    found = json.loads(result.stdout.splitlines()[0])
    assert [check["promise"] for check in found if check["broken"]] == ["it exports what it trained"]
    assert isinstance(result.exception, LocalError)
    assert str(result.exception).startswith(f"{HERE}:Mute breaks 1 of {len(found)} promises; the first is that it exp")


@pytest.mark.usefixtures("alone")
def test_a_runs_configuration_can_be_checked_before_anyone_joins(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: x\ntask: {kind: lora, config: {model: p2pasr/demo-base, rank: 2, warmup_steps: 0}}\n"
        "rounds: {rounds: 1}\n",
        encoding="utf-8",
    )
    target = Target(str(path), Path.cwd(), tuple(shard_paths(shards)[:1]))
    done = list(check_task(target, plan_for(2, 2), VerifySection()))

    assert [check for check in done if check.broken] == []


def test_shards_without_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a shard of 1 examples and 0\.0 s trains nothing$"):
        write_shards(tmp_path, [OwnShard({"x": np.zeros(1, np.float32)}, 1, 0.0)])


def test_shards_say_how_long_their_longest_clip_is_if_they_have_any(tmp_path: Path) -> None:
    content = {"x": np.zeros(1, np.float32)}
    index = write_shards(tmp_path, [OwnShard(content, 1, 2.0), OwnShard(content, 1, 2.0, longest=7)])
    assert [entry.longest for entry in index.shards] == [None, 7.0]
    with pytest.raises(ValueError, match=r"^the longest clip of a shard cannot last nan s$"):
        write_shards(tmp_path, [OwnShard(content, 1, 2.0, longest=float("nan"))])


# --- the examples -------------------------------------------------------------------------------


def test_the_example_outside_speech_learns_and_makes_a_run(text_shards: Path) -> None:
    task, files = Characters(), shard_paths(text_shards)
    at = start_of(task)
    for index in range(6):
        at, _ = task.segment(at, files, plan(steps=20, samples=32, seed=index, first=20 * index, total=120))

    before, after = task.evaluate(None, files), task.evaluate(at.params, files)
    assert after["bits_per_character"] < 0.75 * before["bits_per_character"]
    manifest = new_run(run_config(), text_shards, task=task)
    assert manifest.parameters == sum(value.size for value in at.params.values())


@pytest.fixture(scope="module")
def tiny_speecht5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SpeechT5 of random weights, as a folder."""
    folder = tmp_path_factory.mktemp("speecht5")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "speech_decoder_prenet_units": 16,
        "speech_decoder_postnet_units": 16,
        "speech_decoder_postnet_layers": 2,
        "speech_decoder_prenet_dropout": 0.1,
        "speaker_embedding_dim": 8,
        "initializer_range": 0.2,
    }
    SpeechT5ForTextToSpeech(SpeechT5Config(**sizes)).save_pretrained(folder)
    return folder


def spoken(tiny: Path, folder: Path, seed: int) -> Sequence[Path]:
    """Shards of eight utterances as a SpeechT5 says them that has adapters of large values, always the same."""
    task, dice, voice = SpeechT5Task(str(tiny)), np.random.default_rng(seed), np.random.default_rng(99)
    task.set_params({name: voice.normal(size=value.shape) for name, value in task.initial_params().items()})
    task.model.eval()
    rows = []
    for _ in range(8):
        text, speaker = dice.integers(4, 40, 12).astype(np.int32), dice.normal(size=8).astype(np.float32)
        mel = task.model.net.base_model.model.generate_speech(
            torch.from_numpy(text)[None].long(), torch.from_numpy(speaker)[None], minlenratio=2.0, maxlenratio=2.0
        )
        rows.append(Utterance(text, mel.numpy(), speaker))
    folder.mkdir()
    write_shards(folder, utterances(rows, size=4))
    return shard_paths(folder)


@pytest.mark.usefixtures("alone")
def test_the_speaking_example_keeps_its_promises_and_learns_another_way_of_speaking(
    tiny_speecht5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other sentences by other speakers, a new instance comes to 0.55 of the base's distance."""
    make: Callable[[], SpeechT5Task] = lambda: SpeechT5Task(str(tiny_speecht5), learning_rate=1e-2)  # noqa: E731
    monkeypatch.setattr(Target, "make", lambda target: make())
    files, others = (spoken(tiny_speecht5, tmp_path / name, seed) for seed, name in enumerate(("train", "test")))
    done = list(check_task(Target("", Path.cwd(), tuple(files)), plan_for(2, 4), VerifySection()))
    assert [check for check in done if check.broken] == []
    task = make()
    at = start_of(task)
    for index in range(4):
        at, _ = task.segment(at, files, plan(steps=10, samples=8, seed=index, first=10 * index, total=40))
    assert make().evaluate(at.params, others)["l1"] < 0.65 * make().evaluate(None, others)["l1"]
