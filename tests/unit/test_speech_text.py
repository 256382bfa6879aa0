"""What is taught and what is scored: special tokens, dialects, normalised transcripts."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pasr.errors import LocalError
from p2pasr.speech.audio import RefusedClip
from p2pasr.speech.pretrained import Frontend
from p2pasr.speech.text import DIALECTS, is_unspaced, label_ids, language_token, normalise

HAN = st.sampled_from("我想喝水開關燈門睡覺電視聽歌麵後裡係唔喺嘅佢哋冇㗎零一二")
TEXT = st.text(st.one_of(st.characters(), HAN, st.sampled_from(" ,.!?()（）「」。，？！ａＢ１…—'-\u3000\u200b")))

PAIRS = [
    ("我想飲水", "我想饮水"),
    ("請你幫我開燈", "请你帮我开灯"),
    ("聽歌、看電視", "听歌、看电视"),
    ("關門睡覺", "关门睡觉"),
    ("上樓後下樓", "上楼后下楼"),
    ("喺屋企食麵", "喺屋企食面"),
]


@given(TEXT)
@example("我 想")
@example("İstanbul ǅ ﬁ ①")
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise(text)

    assert normalise(once) == once


@given(TEXT)
def test_a_normalised_transcript_holds_no_punctuation_no_symbol_and_single_spaces(text: str) -> None:
    scored = normalise(text)

    assert all(char == " " or unicodedata.category(char)[0] not in "PSZC" for char in scored)
    assert scored == scored.strip()
    assert "  " not in scored
    assert scored == scored.lower()


@given(
    st.text(HAN, min_size=1),
    st.text(HAN, min_size=1),
    st.sampled_from([" ", "  ", "\t", "\u3000", "，", " 、 "]),
)
def test_a_gap_between_two_chinese_characters_does_not_count(left: str, right: str, gap: str) -> None:
    assert normalise(left + gap + right) == normalise(f"{left[:-1]}{left[-1]}{gap.strip()}{right}".replace("，", ""))
    assert " " not in normalise(left + gap + right)


@pytest.mark.parametrize(("traditional", "simplified"), PAIRS)
def test_traditional_and_simplified_are_the_same(traditional: str, simplified: str) -> None:
    assert traditional != simplified
    assert normalise(traditional) == normalise(simplified)


@pytest.mark.parametrize(
    ("text", "scored"),
    [
        ("", ""),
        ("   ", ""),
        ("。！？…", ""),
        ("我想喝水。", "我想喝水"),
        ("我 想 喝 水", "我想喝水"),
        ("「我想」——喝水！", "我想喝水"),
        ("ＡＢＣ１２３", "abc123"),
        ("三½杯", "三1 2杯"),
        ("  Please   OPEN\tthe\ndoor! ", "please open the door"),
        ("don't", "don t"),
        ("我用 iPhone 打電話", "我用 iphone 打电话"),
        ("喝水\u200b吧", "喝水吧"),
        ("100%", "100"),
        ("café", "café"),
        ("cafe\u0301", "café"),
    ],
)
def test_transcripts_are_scored_as(text: str, scored: str) -> None:
    assert normalise(text) == scored


@pytest.mark.parametrize(("opening", "closing"), [("(", ")"), ("（", "）"), ("[", "]"), ("【", "】"), ("<", ">")])
def test_nothing_in_parentheses_is_deleted(opening: str, closing: str) -> None:
    assert normalise(f"我{opening}真的{closing}想喝水") == "我真的想喝水"
    assert normalise(f"i {opening}really{closing} want to") == "i really want to"


@pytest.mark.parametrize("text", ["𨋢 門", "𩠌 菜", "〇 一", "𡃁 仔"])
def test_a_gap_beside_a_rarer_chinese_character_does_not_count_either(text: str) -> None:
    assert normalise(text) == normalise(text.replace(" ", ""))
    assert is_unspaced(normalise(text))


@pytest.mark.parametrize(
    ("text", "unspaced"),
    [
        ("我想喝水", True),
        ("想", True),
        ("我用 iphone", False),
        ("open the door", False),
        ("door", False),
        ("", False),
    ],
)
def test_only_chinese_without_spaces_counts_as_unspaced(text: str, unspaced: bool) -> None:
    assert is_unspaced(text) is unspaced


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "token"),
    [
        *((dialect, "<|zh|>") for dialect in ("cmn", "yue", "nan", "hak", "wuu", "zh")),
        *((dialect, "<|en|>") for dialect in ("en", "en-us", "en-gb-scotland", "en-au")),
    ],
)
def test_a_dialect_gets_the_best_token_the_vocabulary_has(base: Frontend, dialect: str, token: str) -> None:
    assert "<|yue|>" not in base.tokenizer.get_vocab()
    assert language_token(base.tokenizer, dialect) == token


def test_cantonese_gets_its_own_token_where_there_is_one() -> None:
    class LargeV3:
        def get_vocab(self) -> dict[str, int]:
            return {"<|zh|>": 0, "<|yue|>": 1}

    assert language_token(LargeV3(), "yue") == "<|yue|>"
    assert language_token(LargeV3(), "cmn") == "<|zh|>"


def test_a_dialect_the_model_has_no_token_for_is_an_error_that_says_which_were_tried(base: Frontend) -> None:
    with pytest.raises(LocalError, match=r"no language token for dialect 'de-ch' \(tried <\|de\|>\)"):
        language_token(base.tokenizer, "de-ch")


@pytest.mark.parametrize("dialect", ["translate", "transcribe", "notimestamps", "nospeech", "0.00", "endoftext"])
def test_a_special_token_that_is_no_language_is_not_taken_for_one(base: Frontend, dialect: str) -> None:
    with pytest.raises(LocalError, match="no language token"):
        language_token(base.tokenizer, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_target_is_start_language_task_no_timestamps_text_end(base: Frontend, dialect: str) -> None:
    ids = label_ids(base.tokenizer, "我想喝水", dialect)

    language = "<|en|>" if dialect.startswith("en") else "<|zh|>"
    special = ["<|startoftranscript|>", language, "<|transcribe|>", "<|notimestamps|>"]
    assert base.tokenizer.convert_ids_to_tokens(ids[:4]) == special
    assert base.tokenizer.decode(ids[4:-1]) == "我想喝水"
    assert ids[-1] == base.tokenizer.eos_token_id
    assert ids.count(base.tokenizer.eos_token_id) == 1


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20))
def test_any_text_can_be_taught_and_read_back(base: Frontend, text: str) -> None:
    ids = label_ids(base.tokenizer, text, "yue")

    assert base.tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("我<|endoftext|>想", "<|endoftext|>"),
        ("<|translate|>", "<|translate|>"),
        ("<|startoftranscript|>喝水", "<|startoftranscript|>"),
        ("<|0.02|>等<|0.04|>", "<|0.02|>"),
    ],
)
def test_a_transcript_with_a_special_token_is_refused(base: Frontend, text: str, token: str) -> None:
    with pytest.raises(RefusedClip) as refused:
        label_ids(base.tokenizer, text, "cmn")
    assert str(refused.value) == f"its transcript contains {token}, which the tokenizer reads as a special token"


@pytest.mark.parametrize("text", ["<||>", "<|我|>", "<|endoftext", "<| endoftext |>"])
def test_text_that_only_looks_like_a_special_token_is_text(base: Frontend, text: str) -> None:
    assert base.tokenizer.decode(label_ids(base.tokenizer, text, "cmn"), skip_special_tokens=True) == text
