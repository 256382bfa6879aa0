"""What fits a machine: the cost of a step, told before it is taken, is the cost of the step that is taken."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from p2pasr import catalogue, tasks
from p2pasr.catalogue import Choice, write_shapes
from p2pasr.cli import app
from p2pasr.errors import LocalError
from p2pasr.plan import BATCHES, ERROR, GIB, Machine, imagine, measure, modules, plan, plans, sketch
from p2pasr.protocol.manifest import RoundSection
from p2pasr.tasks.cost import Cost, stored, take, trace
from p2pasr.tasks.training import GradientTask

from .conftest import MODEL

ROUNDS = RoundSection(rounds=1)

SMALL_ENCODER = {"width": 48, "layers": 2, "feedforward": 96}


SMALL_WHISPERS = {
    "whisper-tiny": (64, 4, 2, 80, 51_865),
    "whisper-base": (128, 4, 2, 80, 51_865),
    "whisper-small": (128, 4, 2, 80, 51_865),
    "whisper-medium": (192, 4, 2, 80, 51_865),
    "whisper-large-v3": (192, 4, 2, 128, 51_865),
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small Whispers without weights, by the names of real ones."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "WHISPERS", SMALL_WHISPERS)
        write_shapes(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(language_model: Path) -> Mapping[str, tuple[str, dict[str, Any]]]:
    """A task of every kind, and the sorts of it that take memory otherwise, at the smallest sizes."""
    whisper = {"model": MODEL}
    ctc = {**whisper, "layers": 2, "width": 64, "heads": 2}
    llm = {**whisper, "language_model": str(language_model), "projector_width": 64, "max_tokens": 48}
    return {
        "lora": ("lora", whisper),
        "lora that recomputes": ("lora", {**whisper, "gradient_checkpointing": True}),
        "lora in 4 bits": ("lora", {**whisper, "quantise": "4bit"}),
        "lora in 8 bits": ("lora", {**whisper, "quantise": "8bit"}),
        "full": ("full", whisper),
        "full in bf16": ("full", {**whisper, "precision": "bf16"}),
        "whisper student": ("student", {**whisper, "architecture": "whisper", "width": 64, "heads": 2}),
        "distil-whisper": ("student", {**whisper, "architecture": "distil-whisper", "decoder_layers": [0]}),
        "transformer-ctc": ("student", {**ctc, "architecture": "transformer-ctc"}),
        "parakeet-ctc": ("student", {**ctc, "architecture": "parakeet-ctc"}),
        "labelled": ("distill", {**whisper, "decoder_layers": [0], "freeze_encoder": True}),
        "taught online": ("distill", {**whisper, "teacher_online": True, "decoder_layers": [0]}),
        "sound heads": ("features", {**whisper, "heads": ["vad", "speaker", "masked"], "encoder": SMALL_ENCODER}),
        "text heads": ("features", {**whisper, "heads": ["confidence", "correction"], "encoder": SMALL_ENCODER}),
        "projector": ("llm", llm),
        "llm in 4 bits": ("llm", {**llm, "stage": "adapters", "quantise": "4bit"}),
    }


KINDS = (
    *("lora", "lora that recomputes", "lora in 4 bits", "lora in 8 bits", "full", "full in bf16", "whisper student"),
    *("distil-whisper", "transformer-ctc", "parakeet-ctc", "labelled", "taught online", "sound heads", "text heads"),
    *("projector", "llm in 4 bits"),
)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "lora in 8 bits"])
def test_the_first_steps_take_what_was_planned(
    name: str, tiny: Mapping[str, tuple[str, dict[str, Any]]], labelled_files: Sequence[Path]
) -> None:
    kind, config = tiny[name]
    pinned = tasks.pin(kind, config, None, labelled_files)
    task = tasks.build(kind, pinned, seed=0)
    assert isinstance(task, GradientTask)
    found = measure(task, sketch(kind, pinned), labelled_files, ROUNDS, steps=1)

    assert found.taken == pytest.approx(found.planned, rel=ERROR)
    assert found.minutes == pytest.approx(found.step_seconds * ROUNDS.segments * ROUNDS.steps_per_segment / 60)


@pytest.mark.parametrize("name", ["lora", "full", "whisper student", "sound heads"])
def test_what_is_counted_is_what_torch_was_given(
    name: str, tiny: Mapping[str, tuple[str, dict[str, Any]]], labelled_files: Sequence[Path]
) -> None:
    kind, config = tiny[name]
    task = tasks.build(kind, tasks.pin(kind, config, None, labelled_files), seed=0)
    assert isinstance(task, GradientTask)
    examples = task.examples(labelled_files)[:4]
    task.model.train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        counted = take(modules(task), lambda: task.loss(examples)).held

    kineto: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((event for event in kineto.events() if event.name() == "[memory]"), key=lambda e: e.start_ns())
    given = max(itertools.accumulate(event.nbytes() for event in events))
    assert counted == pytest.approx(given, rel=0.05)


@pytest.mark.parametrize("name", KINDS)
def test_a_sketch_has_the_weights_of_the_task_and_no_values(
    name: str, tiny: Mapping[str, tuple[str, dict[str, Any]]], labelled_files: Sequence[Path]
) -> None:
    kind, config = tiny[name]
    pinned = tasks.pin(kind, config, None, labelled_files)
    task, sketched = tasks.build(kind, pinned, seed=0), sketch(kind, pinned)
    assert isinstance(task, GradientTask)

    assert all(parameter.is_meta for parameter in modules(sketched).parameters())
    assert stored(modules(sketched)) == pytest.approx(stored(modules(task)), rel=0.02)
    assert {name: p.shape for name, p in sketched.trained.items()} == {n: p.shape for n, p in task.trained.items()}
    assert sketched.drops_out() == task.drops_out()


def test_a_device_without_values_trains_nothing() -> None:
    with pytest.raises(LocalError, match="the device 'meta' cannot be used"):
        tasks.build("lora", {"model": MODEL}, seed=0, device="meta")


def test_recomputing_holds_less_and_computes_more(shapes: Path) -> None:
    model = str(shapes / "whisper-tiny")
    plain, saving = (
        cost_of("lora", {"model": model, "gradient_checkpointing": checkpointing}) for checkpointing in (False, True)
    )

    assert saving.activations < 0.7 * plain.activations
    assert 1.2 * plain.flops < saving.flops < 1.5 * plain.flops


def test_what_was_drawn_before_does_not_change_a_plan() -> None:
    config = {"model": MODEL, "heads": ["vad"], "encoder": SMALL_ENCODER}
    before = cost_of("features", config)
    torch.rand(10)

    assert cost_of("features", config) == before


def test_a_resident_teacher_is_paid_for(shapes: Path) -> None:
    small, large = str(shapes / "whisper-tiny"), str(shapes / "whisper-base")
    alone = cost_of("distill", {"model": small})
    taught = cost_of("distill", {"model": small, "teacher_online": True, "teacher": large})
    teacher = stored(sketch("full", {"model": large}).model)

    assert taught.weights == pytest.approx(alone.weights + teacher, rel=0.01)
    assert taught.trained == alone.trained
    assert taught.flops > 1.3 * alone.flops


def cost_of(kind: str, config: Mapping[str, Any]) -> Cost:
    """As it is planned, two examples at most."""
    choice = Choice(kind, "", config)
    (made,) = plans([[choice]], imagine(1000, 1), steps_of(2))
    return made.cost


def steps_of(samples: int) -> RoundSection:
    """Rounds with steps of so many samples."""
    return ROUNDS.model_copy(update={"samples_per_step": samples})


def test_what_is_held_at_once_is_counted_until_it_is_let_go() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(100, 100, bias=False) for _ in range(4)))
    data = torch.zeros(50, 100)
    step = take(layers, lambda: layers(data).sum())

    layer, weight = data.nbytes, layers[0].weight.nbytes
    assert 5 * layer <= step.held <= 7 * layer + weight  # the data and four outputs, then gradients of two at a time
    assert step.flops == 2 * 50 * 100 * 100 * (4 + 4 + 3)
    assert all(parameter.grad is None for parameter in layers.parameters())


def test_arithmetic_is_counted_with_attention() -> None:
    width, queries = 64, 100
    layer = torch.nn.MultiheadAttention(width, 1, bias=False, batch_first=True, device="meta")

    def loss(examples: int) -> torch.Tensor:
        data = torch.zeros(examples, queries, width, device="meta", requires_grad=True)
        heads = (data @ layer.in_proj_weight.T).chunk(3, dim=-1)
        out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(*heads)
        return out.sum()

    projection = 2 * queries * width * 3 * width
    attention = 4 * queries * queries * width
    assert trace(layer, loss, 2).flops == 3 * projection + 3 * attention
    layer.requires_grad_(False)
    assert trace(layer, loss, 2).flops == 2 * projection + 3 * attention


@given(st.integers(2, 200), st.integers(1, 64), st.integers(1, 64))
def test_a_step_never_holds_more_than_is_planned_for_its_size(width: int, examples: int, most: int) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 8)).to("meta")

    def loss(count: int) -> torch.Tensor:
        out: torch.Tensor = layers(torch.zeros(count, 8, device="meta"))
        return out.sum()

    cost, size = trace(layers, loss, most), min(examples, most)
    assert take(layers, lambda: loss(size)).held <= cost.fixed + size * cost.activations + 1


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(1, 1e9), st.floats(1, 64), st.booleans())
def test_the_largest_batch_that_fits_is_chosen(
    weights: int, trained: int, activations: float, gib: float, drops_out: bool
) -> None:
    machine = Machine("cpu", "", gib * GIB, "fp32", {"fp32": 1e9})
    cost = Cost(weights, trained, 0.0, activations, 1.0)
    made = plan(Choice("lora", "", {}), cost, machine, ROUNDS, drops_out=drops_out)
    spare = 1 + ERROR if drops_out else 1.0

    assert made.room == spare * made.memory
    assert (made.room <= machine.memory) == (made.micro_batch is not None)
    assert made.memory == cost.memory(made.micro_batch or 1)
    larger = [size for size in BATCHES if (made.micro_batch or 0) < size <= ROUNDS.samples_per_step]
    assert all(spare * cost.memory(size) > machine.memory for size in larger)


@given(st.floats(0.5, 4096), st.floats(0.001, 1e3))
def test_a_machine_of_the_size_that_is_needed_has_that_room(gib: float, tflops: float) -> None:
    machine = imagine(gib, tflops)

    assert machine.whole(machine.memory) == pytest.approx(gib * GIB)
    assert machine.speeds["bf16"] == tflops * 1e12


def test_the_plainest_settings_that_fit_are_proposed(shapes: Path) -> None:
    config = {"model": str(shapes / "whisper-tiny")}
    ways = [Choice("lora", "tiny", config), Choice("lora", "tiny", config, {"gradient_checkpointing": True})]
    needed = (1 + ERROR) * cost_of("lora", config).memory(1)
    roomy, tight = (replace(imagine(1, 1), memory=share * needed) for share in (2.0, 0.9))

    assert next(plans([ways], roomy, steps_of(2))).choice.settings == {}
    assert next(plans([ways], tight, steps_of(2))).choice.settings == {"gradient_checkpointing": True}


def test_the_command_measures_a_runs_own_task(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("name: x\ntask: {kind: lora, config: {model: p2pasr/demo-base}}\nrounds: {rounds: 1}\n")
    result = CliRunner().invoke(app, ["plan", str(config), "--shards", str(shards), "--json"])

    found = json.loads(result.stdout)
    assert found["taken_gib"] == pytest.approx(found["planned_gib"], rel=0.15)


def test_the_time_that_was_planned_stands_beside_the_time_that_is_taken(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("name: x\ntask: {kind: lora, config: {model: p2pasr/demo-base}}\nrounds: {rounds: 1}\n")
    machine = Machine("cpu", "", GIB, "fp32", {"fp32": 1e9})
    monkeypatch.setattr("p2pasr.plan.look", lambda: machine)
    arguments = ["plan", str(config), "--shards", str(shards)]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    (made,) = plans([[Choice("lora", "", {"model": MODEL})]], machine, ROUNDS)

    assert found["planned_minutes"] == pytest.approx(made.minutes, rel=0.2)  # that is of other clips, with longer texts
    said = CliRunner().invoke(app, arguments).stdout
    assert f"% of the {found['planned_minutes']:.1f} min that were planned)" in said


@given(st.floats(1, 1e18), st.floats(1e9, 1e15), st.sampled_from(["fp32", "bf16"]))
def test_twice_the_arithmetic_or_half_the_speed_is_twice_the_time(flops: float, speed: float, precision: str) -> None:
    machine, slower = (Machine("cpu", "", GIB, "fp32", {"fp32": each}) for each in (speed, speed / 2))
    once = machine.minutes(flops, precision)

    assert once == pytest.approx(flops / (0.5 * speed) / 60)
    assert machine.minutes(2 * flops, precision) == slower.minutes(flops, precision) == pytest.approx(2 * once)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shards", "shards"], "--shards measures a run's own task"),
        (["--tflops", "20"], "--tflops is of a machine that is not here"),
        (["--shards", "shards", "--memory", "8"], "--shards takes steps on this machine"),
        (["--kind", "asr"], "--kind 'asr' is not one of lora, full"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: Sequence[str], sentence: str) -> None:
    assert str(CliRunner().invoke(app, ["plan", *arguments]).exception).startswith(sentence)


@pytest.fixture
def short_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task of each kind and one that is stored in 4 bits, with models of few layers."""
    monkeypatch.setattr(catalogue, "WHISPERS", SMALL_WHISPERS)
    monkeypatch.setattr(catalogue, "LANGUAGE_MODELS", {"Qwen2.5-0.5B": (896, 2, 14, 2, 4864)})
    whole = catalogue._entries

    def few(shapes: Path) -> Iterator[catalogue.Entry]:
        kinds = set()
        for entry in whole(shapes):
            if entry[0] not in kinds or entry[1] == "whisper-medium, 4-bit":
                kinds.add(entry[0])
                yield entry

    monkeypatch.setattr(catalogue, "_entries", few)


@pytest.mark.usefixtures("short_catalogue")
def test_the_command_says_what_fits_and_what_would_be_needed() -> None:
    found = json.loads(CliRunner().invoke(app, ["plan", "--memory", "0.5", "--tflops", "20", "--json"]).stdout)
    rows = {row["kind"]: row for row in found["plans"] if row["model"] != "whisper-medium, 4-bit"}

    assert set(rows) == set(tasks.KINDS)
    assert found["machine"]["gib"] == 0.5
    assert all((row["needs_gib"] <= 0.5) == row["fits"] for row in found["plans"])
    assert rows["features"]["settings"] == {"precision": "bf16", "micro_batch": 1}
    assert not rows["llm"]["fits"]
    assert any(row["settings"].get("quantise") == "4bit" for row in found["plans"])


@pytest.mark.usefixtures("short_catalogue")
def test_the_table_has_a_line_for_each_model_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["plan", "--memory", "0.5", "--tflops", "20", "--kind", "llm"]
    lines = CliRunner().invoke(app, arguments).stdout.splitlines()

    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines if line.strip().removesuffix(":") in tasks.KINDS] == ["llm:"]
    (line,) = [line for line in lines if "0.5B, projector" in line]
    assert re.search(r"– +– +needs \d+\.\d GiB", line)
