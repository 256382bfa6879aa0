"""One adapter of several: equal to what the adapters do together, and honest about what does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from p2pasr import LocalError
from p2pasr.cli import app
from p2pasr.speech.pretrained import BUNDLED
from p2pasr.tasks import Task
from p2pasr.tasks.merging import cut, merge, read_adapter, write_adapter

from .conftest import MODEL, plan, start_of

Write = Callable[..., Path]


@pytest.fixture
def write(make_task: Callable[..., Task], shard_files: Sequence[Path], tmp_path: Path) -> Write:
    """Train an adapter a little and write its folder; `about` goes into its notes, the rest into its configuration."""

    def made(name: str, *, seed: int = 1, about: dict[str, Any] | None = None, **config: Any) -> Path:
        task = make_task(seed=seed, **config)
        end, _ = task.segment(start_of(task), shard_files, plan(steps=3, seed=len(name)))
        out = tmp_path / name
        out.mkdir()
        task.export(end.params, out, {"run": "a" * 64, "round": 1, "seconds_merged": 10.0, **(about or {})})
        return out

    return made


def added(folder: Path) -> dict[str, np.ndarray]:
    """Layer → what an adapter adds to it."""
    adapter = read_adapter(folder)
    return {layer: adapter.scale * (b @ a) for layer, (a, b) in adapter.factors.items()}


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(one))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.integers(1, 12))
def test_a_cut_is_the_best_product_of_its_rank(seed: int, rank: int, count: int, wanted: int) -> None:
    dice = np.random.default_rng(seed)
    pairs = [(dice.normal(size=(rank, 9)), dice.normal(size=(7, rank))) for _ in range(count)]
    weights = dice.uniform(0.1, 1, count)
    total = sum(weight * (b @ a) for weight, (a, b) in zip(weights, pairs, strict=True))
    a, b, kept = cut(pairs, weights, wanted)
    values = np.linalg.svd(total, compute_uv=False)

    assert (a.shape, b.shape) == ((wanted, 9), (7, wanted))
    assert np.linalg.norm(total - b @ a) ** 2 == pytest.approx(np.sum(values[wanted:] ** 2), rel=1e-5, abs=1e-8)
    assert kept == pytest.approx(np.sum(values[:wanted] ** 2) / np.sum(values**2))


def test_adapters_of_one_run_are_averaged_by_their_factors(write: Write, tmp_path: Path) -> None:
    folders = [write("one"), write("other")]
    read = [read_adapter(folder) for folder in folders]
    result = merge(read, [3.0, 1.0])
    write_adapter(tmp_path / "out", read, result, [3.0, 1.0])

    assert (result.how, result.kept, result.warnings) == ("factors", 1.0, ())
    for layer, (a, b) in read_adapter(tmp_path / "out").factors.items():
        (a1, b1), (a2, b2) = (adapter.factors[layer] for adapter in read)
        assert close(0.75 * a1 + 0.25 * a2, a)
        assert close(0.75 * b1 + 0.25 * b2, b)


def test_strangers_are_merged_by_their_products(write: Write, tmp_path: Path) -> None:
    folders = [write("one"), write("other", seed=2, rank=6, alpha=3.0, about={"run": "b" * 64})]
    read = [read_adapter(folder) for folder in folders]
    result = merge(read, [1.0, 1.0], rank=10)
    write_adapter(tmp_path / "out", read, result, [1.0, 1.0])

    assert result.how == "products"
    assert result.kept == pytest.approx(1.0)
    together, one, other = added(tmp_path / "out"), *map(added, folders)
    assert all(close((one[layer] + other[layer]) / 2, value) for layer, value in together.items())


def test_layers_may_have_weights_of_their_own(write: Write) -> None:
    read = [read_adapter(write(name)) for name in ("one", "other")]
    result = merge(read, [1.0, 1.0], {"*encoder*": [1.0, 0.0]})

    for layer, (_, b) in result.factors.items():
        (_, b1), (_, b2) = (adapter.factors[layer] for adapter in read)
        assert close(b1 if "encoder" in layer else (b1 + b2) / 2, b)


def test_a_merged_adapter_loads_with_plain_peft(write: Write, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration

    result = CliRunner().invoke(
        app, ["merge", str(write("one")), str(write("other")), "--out", str(tmp_path / "out"), "--rank", "3"]
    )
    assert result.exception is None, result.output
    assert "merged by products at rank 3, which keeps at least" in result.stdout
    base = WhisperForConditionalGeneration.from_pretrained(BUNDLED[MODEL], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    expected = added(tmp_path / "out")
    for layer, value in expected.items():
        module = loaded.get_submodule(layer)
        assert close(value, module.get_delta_weight("default").detach().numpy())
    notes = json.loads((tmp_path / "out" / "p2pasr.json").read_text(encoding="utf-8"))
    assert [source["weight"] for source in notes["merged_from"]] == [10.0, 10.0]


def merged(*folders: Path, out: Path) -> str:
    """What the command says."""
    result = CliRunner().invoke(app, ["merge", *map(str, folders), "--out", str(out)])
    assert result.exception is None, result.output
    return result.stdout


def test_what_was_merged_weighs_as_much_as_all_that_it_is_made_of(write: Write, tmp_path: Path) -> None:
    one, other, third = (write(name, about={"seconds_merged": 100.0 * len(name)}) for name in ("a", "ab", "abc"))
    merged(one, other, out=tmp_path / "pair")
    said = merged(tmp_path / "pair", third, out=tmp_path / "all")

    assert read_adapter(tmp_path / "pair").seconds == 300.0
    assert "weights: the seconds of audio that went into each adapter" in said
    notes = json.loads((tmp_path / "all" / "p2pasr.json").read_text(encoding="utf-8"))
    assert [source["weight"] for source in notes["merged_from"]] == [300.0, 300.0]
    assert notes["seconds_merged"] == 600.0


@pytest.mark.parametrize("unsaid", ["no notes", None, 0.0, -5.0, math.inf, math.nan, "many"], ids=str)
def test_weights_are_equal_unless_all_say_how_much_audio_went_into_them(
    write: Write, tmp_path: Path, unsaid: Any
) -> None:
    one, other = write("one", about={"seconds_merged": 5000.0}), write("other", about={"seconds_merged": unsaid})
    if unsaid == "no notes":
        (other / "p2pasr.json").unlink()
    said = merged(one, other, out=tmp_path / "out")

    assert "weights: equal, for not every adapter says how much audio went into it" in said
    notes = json.loads((tmp_path / "out" / "p2pasr.json").read_text(encoding="utf-8"))
    assert [source["weight"] for source in notes["merged_from"]] == [1.0, 1.0]
    assert "seconds_merged" not in notes


@pytest.mark.parametrize("noted", [0, 1])
def test_bases_without_a_digest_are_compared_by_their_names(write: Write, noted: int) -> None:
    folders = [write("one"), write("other")]
    for folder in folders[noted:]:
        (folder / "p2pasr.json").unlink()
    assert merge([read_adapter(folder) for folder in folders], [1, 1]).warnings == ()

    settings_ = folders[1] / "adapter_config.json"
    content = {**json.loads(settings_.read_text(encoding="utf-8")), "base_model_name_or_path": "openai/whisper-tiny"}
    settings_.write_text(json.dumps(content), encoding="utf-8")
    (said,) = merge([read_adapter(folder) for folder in folders], [1, 1]).warnings
    assert said.startswith(f"the adapters name different base models (openai/whisper-tiny, {MODEL})")


def test_what_does_not_fit_together_is_said(write: Write, tmp_path: Path) -> None:
    folders = [write("one"), write("other", about={"round": 2})]
    for folder, change in zip(folders, ({}, {"window_seconds": 1.5}), strict=True):
        notes = folder / "p2pasr.json"
        content = {**json.loads(notes.read_text(encoding="utf-8")), "base_weights": folder.name, **change}
        notes.write_text(json.dumps(content), encoding="utf-8")
    said = merge([read_adapter(folder) for folder in folders], [1, 1]).warnings

    assert [sentence.split(";")[0] for sentence in said] == [
        "the adapters were trained on different base weights",
        "the adapters were trained at windows of 1.5 s, 3 s",
        "the adapters are of different rounds of one run",
    ]


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]], ids=str)
def test_weights_that_are_none_are_refused(write: Write, weights: list[float]) -> None:
    read = [read_adapter(write(name)) for name in ("one", "other")]

    with pytest.raises(LocalError, match="are not 2 numbers of at least zero that are not all zero"):
        merge(read, weights)


def test_adapters_of_other_layers_are_refused(write: Write) -> None:
    read = [read_adapter(write("one")), read_adapter(write("other", targets=["fc1"]))]

    with pytest.raises(LocalError, match="adapts other layers than"):
        merge(read, [1, 1])


@pytest.mark.parametrize("damage", ["nothing there", "no weights", "cut weights", "no JSON"])
def test_a_folder_that_is_no_adapter_is_one_sentence(write: Write, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "empty" if damage == "nothing there" else write("one")
    if damage == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif damage == "cut weights":
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 20)
    elif damage == "no JSON":
        (folder / "adapter_config.json").write_text("{", encoding="utf-8")

    with pytest.raises(LocalError, match="is no adapter folder"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["one"], "there is nothing to merge"),
        (["one", "two", "--out", "one"], "--out one is one of the adapters"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: list[str], sentence: str) -> None:
    given = arguments if "--out" in arguments else [*arguments, "--out", "out"]

    assert str(CliRunner().invoke(app, ["merge", *given]).exception).startswith(sentence)
