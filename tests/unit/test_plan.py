"""What fits a machine: the cost of a step, told before it is taken, is the cost of the step that is taken."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from p2pasr import tasks
from p2pasr.cli import app
from p2pasr.plan import BATCHES, GIB, Choice, Machine, measure, plan, plans, whisper
from p2pasr.protocol.manifest import RoundSection
from p2pasr.tasks.cost import Cost, kept_by, trace
from p2pasr.tasks.training import GradientTask

from .conftest import MODEL

ROUNDS = RoundSection(rounds=1)


def tiny_whisper() -> Any:
    """A Whisper of 0.4 million parameters and a window of 3 s."""
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=1000,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=150,
    )


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "whole"])
def test_what_autograd_keeps_is_predicted_without_any_data(adapters: bool) -> None:
    predicted = trace(*whisper(tiny_whisper(), adapters, False), examples=2)
    model, loss = whisper(tiny_whisper(), adapters, False, "cpu")
    model.train()

    assert kept_by(lambda: loss(2), model) / 2 == pytest.approx(predicted.activations, rel=0.15)
    assert predicted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert predicted.trained + predicted.frozen == sum(p.numel() for p in model.parameters())


def test_weights_gradients_and_moments_are_predicted() -> None:
    model, loss = whisper(tiny_whisper(), False, False, "cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    torch.autograd.backward(loss(1))
    optimizer.step()

    held = sum(p.nbytes for p in model.parameters()) + sum(p.grad.nbytes for p in trained if p.grad is not None)
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    cost = trace(*whisper(tiny_whisper(), False, False))
    assert cost.memory(0) == pytest.approx(held, rel=0.15)


def test_checkpointing_keeps_less() -> None:
    plain, saving = (trace(*whisper(tiny_whisper(), True, checkpointing)) for checkpointing in (False, True))

    assert saving.activations < 0.7 * plain.activations


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
    assert trace(layer, loss, examples=2).flops == 3 * projection + 3 * attention
    assert trace(layer, loss, examples=2, recompute=True).flops == 4 * projection + 4 * attention
    layer.requires_grad_(False)
    assert trace(layer, loss, examples=2).flops == 2 * projection + 3 * attention


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.floats(1, 1e9), st.floats(1, 64))
def test_the_largest_batch_that_fits_is_chosen(frozen: int, trained: int, activations: float, gib: float) -> None:
    machine = Machine("cpu", "", gib * GIB, 1e9)
    cost = Cost(frozen, trained, activations, 1.0)
    made = plan(Choice("lora", "", {}, lambda: None), cost, machine, ROUNDS)  # type: ignore[arg-type, return-value]

    if made.micro_batch is None:
        assert cost.memory(1) > machine.memory
    else:
        assert made.memory == cost.memory(made.micro_batch) <= machine.memory
        larger = [size for size in BATCHES if made.micro_batch < size <= ROUNDS.samples_per_step]
        assert all(cost.memory(size) > machine.memory for size in larger)


def test_the_plainest_settings_that_fit_are_proposed() -> None:
    def make(checkpointing: bool) -> Callable[[], Any]:
        return lambda: whisper(tiny_whisper(), True, checkpointing)

    ways = [Choice("lora", "tiny", {}, make(False)), Choice("lora", "tiny", {"saving": True}, make(True))]
    needed = trace(*make(False)()).memory(1)
    roomy, tight = (Machine("cpu", "", share * needed, 1e9) for share in (2.0, 0.9))

    assert next(plans([ways], roomy, ROUNDS)).choice.settings == {}
    assert next(plans([ways], tight, ROUNDS)).choice.settings == {"saving": True}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_first_steps_take_what_was_planned(kind: str, shard_files: Sequence[Path]) -> None:
    task = tasks.build(kind, {"model": MODEL}, seed=0)
    assert isinstance(task, GradientTask)
    found = measure(task, shard_files, ROUNDS, steps=1)

    assert found.taken == pytest.approx(found.planned, rel=0.15)
    assert found.minutes == pytest.approx(found.step_seconds * ROUNDS.segments * ROUNDS.steps_per_segment / 60)


def test_the_command_measures_a_runs_own_task(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("name: x\ntask: {kind: lora, config: {model: p2pasr/demo-base}}\nrounds: {rounds: 1}\n")
    result = CliRunner().invoke(app, ["plan", str(config), "--shards", str(shards), "--json"])

    found = json.loads(result.stdout)
    assert found["taken_gib"] == pytest.approx(found["planned_gib"], rel=0.15)
    alone = CliRunner().invoke(app, ["plan", "--shards", str(shards)])
    assert str(alone.exception).startswith("--shards measures a run's own task")


def test_the_command_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pasr.plan.WHISPERS", {"whisper-tiny": (384, 4, 6, 80, 51_865)})
    monkeypatch.setattr("p2pasr.plan.FULL", ())
    table = CliRunner().invoke(app, ["plan", "--memory", "6"])
    tight = CliRunner().invoke(app, ["plan", "--memory", "0.5", "--json"])

    assert "whisper-tiny" in table.stdout
    assert "yes" in table.stdout
    found = json.loads(tight.stdout)
    assert found["machine"]["gib"] == 0.5
    assert [(row["fits"], row["gib"] <= 0.5, row["settings"]["micro_batch"] < 16) for row in found["plans"]] == [
        (True, True, True)
    ]
