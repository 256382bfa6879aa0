"""Transcripts that are wrong on purpose, in whole characters or words' pieces and never in halves of a character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

import torch

Unit = tuple[int, ...]
"""Token ids that only mean something together: those of a character that takes several."""

EDITED_SHARE = 0.15
"""Units that are edited in a transcript that is made wrong, besides the one that always is."""

DELETED_SHARE = 0.3
"""Edits that leave a unit out; all others put another in its place."""

_CONTINUATION = range(0x80, 0xC0)
"""Bytes of UTF-8 that do not begin a character."""


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A transcript with errors.

    Attributes:
        units: what is left.
        wrong: for each of them, and for the end behind them, whether it was put there or follows what was left out.
    """

    units: tuple[Unit, ...]
    wrong: tuple[bool, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The units' token ids."""
        return tuple(token for unit in self.units for token in unit)

    @property
    def wrong_tokens(self) -> tuple[bool, ...]:
        """The same as :attr:`wrong` for each token, and for the end."""
        flags = [flag for unit, flag in zip(self.units, self.wrong, strict=False) for _ in unit]
        return (*flags, self.wrong[-1])


def continuing_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of a byte-level vocabulary whose tokens begin in the middle of a character."""
    first_byte = {char: byte for byte, char in _byte_characters().items()}
    return frozenset(
        index for token, index in tokenizer.get_vocab().items() if token and first_byte.get(token[0]) in _CONTINUATION
    )


def units_of(tokens: Sequence[int], continuing: frozenset[int]) -> tuple[Unit, ...]:
    """Cut token ids where characters begin."""
    units: list[list[int]] = []
    for token in tokens:
        if units and token in continuing:
            units[-1].append(token)
        else:
            units.append([token])
    return tuple(map(tuple, units))


def corrupt(units: Sequence[Unit], pool: Sequence[Unit]) -> Corrupted:
    """Substitute or leave out some units, at least one, by torch's generator.

    Args:
        units: a transcript; an empty one stays as it is.
        pool: what substitutes are drawn from, one that is frequent there more often.
    """
    kept: list[Unit] = []
    wrong: list[bool] = []
    left_out = False
    chances = torch.rand(len(units), 3).tolist()
    always = int(torch.rand(1).item() * len(units))
    for index, (unit, (edit, kind, which)) in enumerate(zip(units, chances, strict=True)):
        edited = index == always or edit < EDITED_SHARE
        others = [other for other in pool if other != unit] if edited else []
        if edited and (kind < DELETED_SHARE or not others):
            left_out = True
            continue
        kept.append(others[int(which * len(others))] if edited else unit)
        wrong.append(edited or left_out)
        left_out = False
    return Corrupted(tuple(kept), (*wrong, left_out))


def compared(units: Sequence[Unit], truth: Sequence[Unit]) -> Corrupted:
    """A transcript as its differences from the true one show it: what has no counterpart there is wrong."""
    wrong = [True] * len(units) + [True]
    after_units = after_truth = 0
    for block in SequenceMatcher(None, units, truth, autojunk=False).get_matching_blocks():
        for index in range(block.a, block.a + block.size):
            wrong[index] = False
        left_out = block.a == after_units and block.b > after_truth
        wrong[block.a] = left_out
        after_units, after_truth = block.a + block.size, block.b + block.size
    return Corrupted(tuple(units), tuple(wrong))


def untouched(units: Sequence[Unit]) -> Corrupted:
    """A transcript without errors."""
    return Corrupted(tuple(units), (False,) * (len(units) + 1))


@lru_cache(maxsize=1)
def _byte_characters() -> dict[int, str]:
    """Byte → the character that stands for it in byte-level vocabularies (Radford et al. 2019)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    made: dict[int, str] = bytes_to_unicode()
    return made
