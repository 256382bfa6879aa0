"""How transcripts are pronounced: lexicons, and readings of Chinese characters from two libraries.

Mandarin characters are read by pypinyin and Cantonese ones by ToJyutping, each as a syllable's initial, if it has
one, and its final with the tone. Characters with several readings get the commonest: a lexicon may name whole words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from p2pasr.errors import LocalError

_JYUTPING = re.compile(r"((?:ng|gw|kw|[bpmfdtnlgkhzcswj])(?=[aeiouy]))?([a-z]+[1-6])")
"""A syllable's initial and its final with the tone (Linguistic Society of Hong Kong 1993)."""

LONGEST_WORD = 32
"""Characters of a lexicon's entry at most."""


def readings(dialect: str, characters: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Character → phonemes, for those that the dialect's library can read, ascending.

    Args:
        dialect: `cmn` or `yue`.

    Raises:
        LocalError: there is no library for the dialect, or it is not installed.
    """
    if dialect not in _READERS:
        raise LocalError(
            f"nothing here knows how {dialect!r} is pronounced; name its characters or words and their phonemes in "
            f"task.config.pronunciations"
        )
    try:
        return _READERS[dialect](sorted(characters))
    except ImportError as error:
        raise LocalError("readings of characters need two libraries: pip install 'p2pasr[phonemes]'") from error


def pronounce(text: str, lexicon: Mapping[str, Sequence[str]]) -> list[str] | None:
    """The phonemes of a text, by the longest entries from left to right; None if something has no entry.

    Args:
        text: normalised; spaces are not spoken.
        lexicon: character or word → phonemes.
    """
    phonemes: list[str] = []
    start = 0
    while start < len(text):
        if text[start] == " ":
            start += 1
            continue
        ends = range(min(len(text), start + LONGEST_WORD), start, -1)
        end = next((end for end in ends if text[start:end] in lexicon), None)
        if end is None:
            return None
        phonemes += lexicon[text[start:end]]
        start = end
    return phonemes


def _mandarin(characters: Sequence[str]) -> dict[str, tuple[str, ...]]:
    from pypinyin import Style, pinyin

    found: dict[str, tuple[str, ...]] = {}
    for character in characters:
        finals = pinyin(character, style=Style.FINALS_TONE3, strict=False, errors="ignore", neutral_tone_with_five=True)
        if finals and finals[0][0]:
            initial = pinyin(character, style=Style.INITIALS, strict=False)[0][0]
            found[character] = (initial, finals[0][0]) if initial else (finals[0][0],)
    return found


def _cantonese(characters: Sequence[str]) -> dict[str, tuple[str, ...]]:
    import ToJyutping

    found: dict[str, tuple[str, ...]] = {}
    for character in characters:
        syllable = ToJyutping.get_jyutping_list(character)[0][1]
        parts = _JYUTPING.fullmatch(syllable or "")
        if parts:
            found[character] = tuple(filter(None, parts.groups()))
    return found


_READERS = {"cmn": _mandarin, "yue": _cantonese}
