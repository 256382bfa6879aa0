"""Pronunciations from lexicons and from the two libraries that read Chinese characters."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import LocalError
from p2pasr.speech.phonemes import pronounce, readings

LEXICON = {"银": ("y", "in2"), "行": ("x", "ing2"), "银行": ("y", "in2", "h", "ang2"), "走": ("z", "ou3")}


def test_the_longest_entry_is_spoken() -> None:
    assert pronounce("走行", LEXICON) == ["z", "ou3", "x", "ing2"]
    assert pronounce("走银行 走", LEXICON) == ["z", "ou3", "y", "in2", "h", "ang2", "z", "ou3"]


def test_a_text_with_something_unknown_is_not_pronounced() -> None:
    assert pronounce("走x", LEXICON) is None
    assert pronounce("", LEXICON) == []


@given(st.lists(st.sampled_from(sorted(LEXICON)), max_size=6))
def test_words_between_spaces_are_spoken_one_after_the_other(words: list[str]) -> None:
    assert pronounce(" ".join(words), LEXICON) == [phoneme for word in words for phoneme in LEXICON[word]]


@pytest.mark.parametrize(
    ("dialect", "library", "wanted"),
    [
        ("cmn", "pypinyin", {"我": ("w", "o3"), "二": ("er4",), "水": ("sh", "ui3"), "灯": ("d", "eng1")}),
        (
            "yue",
            "ToJyutping",
            {"我": ("ng", "o5"), "五": ("ng5",), "唔": ("m4",), "关": ("gw", "aan1"), "书": ("s", "yu1")},
        ),
    ],
)
def test_characters_are_read_as_initials_and_toned_finals(
    dialect: str, library: str, wanted: dict[str, tuple[str, ...]]
) -> None:
    pytest.importorskip(library)
    assert readings(dialect, [*wanted, "x", " "]) == dict(sorted(wanted.items()))


def test_a_dialect_that_nothing_reads_needs_a_lexicon() -> None:
    with pytest.raises(LocalError, match=r"'hak' is pronounced; name .* in task\.config\.pronunciations"):
        readings("hak", ["我"])


def test_without_the_libraries_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypinyin", None)
    with pytest.raises(LocalError, match=r"pip install 'p2pasr\[phonemes\]'"):
        readings("cmn", ["我"])
