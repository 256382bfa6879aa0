"""Error rates, and the cases in which they mean nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.speech.metrics import ErrorRates, error_rates

SPOKEN = st.text("我想喝水开灯关门零一二", min_size=1, max_size=8)


@given(st.lists(SPOKEN, min_size=1, max_size=6))
def test_a_perfect_transcript_has_no_errors(references: list[str]) -> None:
    rates = error_rates(references, references)

    assert (rates.cer, rates.exact, rates.clips) == (0.0, 1.0, len(references))


@given(st.lists(SPOKEN, min_size=1, max_size=6))
def test_silence_gets_every_character_wrong(references: list[str]) -> None:
    rates = error_rates(references, [""] * len(references))

    assert (rates.cer, rates.exact) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("references", "hypotheses", "cer"),
    [
        (["我想喝水"], ["我想喝茶"], 1 / 4),
        (["我想喝水"], ["我喝水"], 1 / 4),
        (["我想喝水"], ["我想想喝水"], 1 / 4),
        (["我想喝水", "关灯"], ["我想喝水", "开灯"], 1 / 6),
        (["关灯"], ["请你帮我关门"], 5 / 2),
        (["〇𨋢門"], ["〇𡃁門"], 1 / 3),
    ],
    ids=["substitution", "deletion", "insertion", "over all characters", "above one", "rarer characters"],
)
def test_errors_are_counted_over_all_reference_characters(
    references: list[str], hypotheses: list[str], cer: float
) -> None:
    assert error_rates(references, hypotheses).cer == pytest.approx(cer)


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [("我想飲水。", "我 想 饮水"), ("Open the DOOR!", "open the door"), ("１２３", "123"), ("我(真的)想", "我真的想")],
)
def test_spelling_that_normalising_removes_is_no_error(reference: str, hypothesis: str) -> None:
    rates = error_rates([reference], [hypothesis])

    assert (rates.cer, rates.exact) == (0.0, 1.0)


def test_text_in_parentheses_is_scored() -> None:
    assert error_rates(["我(真的)想"], ["我想"]).cer == pytest.approx(2 / 4)


def test_chinese_written_without_spaces_has_no_word_error_rate() -> None:
    assert error_rates(["我想喝水", "关灯"], ["我想喝茶", "关灯"]).wer is None


def test_english_has_a_word_error_rate() -> None:
    rates = error_rates(["open the door", "sit down"], ["open a door", "sit down"])

    assert rates.wer == pytest.approx(1 / 5)


def test_english_of_single_words_has_a_word_error_rate() -> None:
    assert error_rates(["yes", "no"], ["yes", "yes"]).wer == pytest.approx(1 / 2)


def test_the_majority_of_the_references_decides_whether_words_are_counted() -> None:
    assert error_rates(["我想喝水", "open the door", "sit down"], ["", "", ""]).wer == 1.0
    assert error_rates(["我想喝水", "关灯", "sit down"], ["", "", ""]).wer is None


def test_clips_without_speech_are_counted_apart_and_not_averaged() -> None:
    rates = error_rates(["我想喝水", "", "。", ""], ["我想喝水", "谢谢观看", "", "！"])

    assert rates == ErrorRates(cer=0.0, wer=None, clips=1, exact=1.0, empty=3, invented=1)


@pytest.mark.parametrize("references", [[], [""], ["。", "  "]])
def test_there_is_no_error_rate_without_any_reference_text(references: list[str]) -> None:
    with pytest.raises(ValueError, match="no reference holds any text"):
        error_rates(references, ["我"] * len(references))


def test_as_many_hypotheses_as_references_are_wanted() -> None:
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        error_rates(["我", "想"], ["我"])


def test_rates_can_be_written_as_json() -> None:
    rates = error_rates(["关灯"], ["开灯"])

    assert json.loads(json.dumps(rates.as_dict())) == {
        "cer": 0.5,
        "wer": None,
        "clips": 1,
        "exact": 0.0,
        "empty": 0,
        "invented": 0,
    }
