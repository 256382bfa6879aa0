"""Character and word error rates, with the cases in which they mean nothing kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jiwer

from p2pasr.speech.text import is_unspaced, normalise


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Scores of one set of clips.

    Attributes:
        cer: character errors / reference characters, over all clips with speech; may exceed 1.
        wer: word errors / reference words; None when the references are written without spaces,
            where every sentence would be one word and the rate either 0 or 1 a clip.
        clips: clips with a non-empty reference.
        exact: share of those whose hypothesis equals the reference.
        empty: clips whose reference is empty after normalising (no speech).
        invented: of those, how many got a non-empty hypothesis. A rate over an empty reference is
            a division by zero, so they are counted and not averaged.
    """

    cer: float
    wer: float | None
    clips: int
    exact: float
    empty: int
    invented: int

    def as_dict(self) -> dict[str, float | int | None]:
        """The same as plain values, for JSON."""
        return asdict(self)


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates:
    """Score hypotheses against references, both normalised first.

    Args:
        references, hypotheses: one transcript a clip, same length.

    Raises:
        ValueError: the lengths differ or no reference holds any text.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    pairs = [(normalise(r), normalise(h)) for r, h in zip(references, hypotheses, strict=True)]
    spoken = [(r, h) for r, h in pairs if r]
    silent = [h for r, h in pairs if not r]
    if not spoken:
        raise ValueError("no reference holds any text, so there is no error rate")
    wanted, heard = [r for r, _ in spoken], [h for _, h in spoken]
    unspaced = sum(map(is_unspaced, wanted)) > len(wanted) / 2
    return ErrorRates(
        cer=float(jiwer.cer(wanted, heard)),
        wer=None if unspaced else float(jiwer.wer(wanted, heard)),
        clips=len(spoken),
        exact=sum(r == h for r, h in spoken) / len(spoken),
        empty=len(silent),
        invented=sum(bool(h) for h in silent),
    )
