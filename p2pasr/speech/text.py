"""Transcripts: what the model is taught to write, and what counts as the same when it is scored."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from p2pasr.errors import LocalError
from p2pasr.speech.audio import RefusedClip

if TYPE_CHECKING:
    from transformers import WhisperTokenizer

DIALECTS: dict[str, tuple[str, ...]] = {
    "cmn": ("zh",),
    "yue": ("yue", "zh"),
    "nan": ("zh",),
    "hak": ("zh",),
    "wuu": ("zh",),
    "en": ("en",),
    "en-us": ("en",),
    "en-gb": ("en",),
    "en-gb-scotland": ("en",),
    "en-029": ("en",),
}
"""Dialect code (ISO 639-3 or an English variety) → Whisper language tokens to try, best first."""

_CJK = r"\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""〇 and the Han characters, with those of planes 2 and 3 in which much of written Cantonese and Hakka lies."""

_LANGUAGE = re.compile(r"[a-z]{2,3}")
"""A language's code. The names of Whisper's other special tokens are longer or hold a digit."""

_BETWEEN_CJK = re.compile(rf"(?<=[{_CJK}])\s+(?=[{_CJK}])")
_SPACES = re.compile(r"\s+")


def language_token(tokenizer: WhisperTokenizer, dialect: str) -> str:
    """The language token a model uses for a dialect, such as ``<|zh|>``.

    Models differ: ``<|yue|>`` exists in large-v3 only, and asking an older tokenizer for it silently
    yields ``<|translate|>``. So a token is used only when this vocabulary really holds it as such.

    Raises:
        LocalError: the vocabulary holds none of the dialect's tokens.
    """
    languages = DIALECTS.get(dialect, (dialect.split("-")[0],))
    vocabulary = tokenizer.get_vocab()
    for language in languages:
        token = f"<|{language}|>"
        if _LANGUAGE.fullmatch(language) and token in vocabulary:
            return token
    tried = ", ".join(f"<|{language}|>" for language in languages)
    raise LocalError(f"the model's vocabulary has no language token for dialect {dialect!r} (tried {tried})")


def label_ids(tokenizer: WhisperTokenizer, text: str, dialect: str) -> list[int]:
    """The decoder's target for a transcript.

    Returns:
        ``<|startoftranscript|> <|language|> <|transcribe|> <|notimestamps|>`` text ``<|endoftext|>``
        as token ids. The decoder's input is all but the last, its label all but the first.

    Raises:
        LocalError: the vocabulary holds no token for the dialect.
        RefusedClip: the text contains a special token, such as a timestamp that Whisper wrote.
    """
    prefix = ["<|startoftranscript|>", language_token(tokenizer, dialect), "<|transcribe|>", "<|notimestamps|>"]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    special = tokenizer.added_tokens_decoder
    if found := [str(special[token]) for token in ids if token in special]:
        raise RefusedClip(f"its transcript contains {found[0]}, which the tokenizer reads as a special token")
    return [*tokenizer.convert_tokens_to_ids(prefix), *ids, tokenizer.eos_token_id]


def normalise(text: str) -> str:
    """The form of a transcript that is scored.

    Unicode NFKC, lower case, Traditional characters to Simplified, punctuation and symbols dropped,
    spaces between Chinese characters dropped and all others made single. Nothing in parentheses is
    deleted (transformers' BasicTextNormalizer does that).
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(char)[0] in "PSZC" else char for char in text)
    text = _SPACES.sub(" ", text).strip()
    return _to_simplified(_BETWEEN_CJK.sub("", text))


def is_unspaced(text: str) -> bool:
    """Whether a transcript is written without spaces, so that a word error rate says nothing about it."""
    return " " not in text and re.search(rf"[{_CJK}]", text) is not None


def _to_simplified(text: str) -> str:
    return text if text.isascii() else str(_converter().convert(text))


@lru_cache(maxsize=1)
def _converter() -> Any:
    import opencc

    return opencc.OpenCC("t2s")
