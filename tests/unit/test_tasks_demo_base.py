"""The recipe of the demo's base model, in miniature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import WhisperForConditionalGeneration

from p2pasr.demo.base import TEXT_POSITIONS, WINDOW_SECONDS, Recipe, alphabet, build_model, build_tokenizer, make_base
from p2pasr.speech.pretrained import Frontend, frontend
from p2pasr.speech.synthetic import HAKKA_READINGS

TINY = Recipe(clips=8, people=4, test_clips=4, test_people=2, steps=3, batch_size=4, warmup_steps=1)


def test_the_recipes_tokenizer_is_the_committed_one(base: Frontend) -> None:
    assert build_tokenizer().get_vocab() == base.tokenizer.get_vocab()


def test_the_recipes_model_has_the_committed_shape(base: Frontend) -> None:
    model = build_model(base.tokenizer)

    assert sum(parameter.numel() for parameter in model.parameters()) == 1_293_056
    wanted = base.config.to_dict()
    mine = model.config.to_dict()
    told = {"_name_or_path", "dtype", "architectures", "transformers_version"}
    assert {k: v for k, v in mine.items() if k not in told} == {k: v for k, v in wanted.items() if k not in told}


@pytest.mark.parametrize("char", sorted(alphabet()))
def test_every_character_of_the_phrases_is_one_token(base: Frontend, char: str) -> None:
    ids = base.tokenizer(char, add_special_tokens=False).input_ids

    assert len(ids) == 1
    assert base.tokenizer.decode(ids) == char


def test_the_alphabet_is_what_the_synthetic_speakers_say() -> None:
    assert len({*alphabet()}) == len(alphabet())
    assert {*alphabet()} == {*HAKKA_READINGS}


def test_any_other_text_is_written_in_bytes(base: Frontend) -> None:
    ids = base.tokenizer("龘 ok é", add_special_tokens=False).input_ids

    assert len(ids) > 3
    assert base.tokenizer.decode(ids) == "龘 ok é"


def test_the_tokens_stand_in_whispers_order(base: Frontend) -> None:
    first = base.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    names = base.tokenizer.convert_ids_to_tokens(range(first, len(base.tokenizer)))

    assert names[:11] == [
        "<|endoftext|>", "<|startoftranscript|>", "<|zh|>", "<|en|>", "<|translate|>", "<|transcribe|>",
        "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", "<|0.00|>",
    ]  # fmt: skip
    assert names[-1] == f"<|{WINDOW_SECONDS:.2f}|>"
    assert len(names) == 10 + WINDOW_SECONDS * 50 + 1


def test_a_base_model_made_in_miniature_loads_and_has_its_card(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    rates = make_base(tmp_path, TINY, lambda step, total, loss: steps.append((step, total)))

    there = frontend(str(tmp_path))
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (there.window_seconds, there.config.max_target_positions) == (WINDOW_SECONDS, TEXT_POSITIONS)
    assert next(model.parameters()).dtype == torch.float16
    assert model.generation_config.lang_to_id.keys() == {"<|zh|>", "<|en|>"}
    assert 0 < rates.clips <= TINY.test_clips
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "1,293,056 parameters" in card
    assert f"| Mandarin | {rates.clips} | {rates.cer:.1%} |" in card


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_recipe_may_end_during_or_right_after_its_warm_up(tmp_path: Path, steps: int) -> None:
    make_base(tmp_path, replace(TINY, steps=steps, warmup_steps=2))

    assert (tmp_path / "model.safetensors").is_file()
