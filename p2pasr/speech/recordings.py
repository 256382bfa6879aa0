"""Recordings that shards were prepared from, found again for a model that takes other features of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from p2pasr.speech.audio import SAMPLE_RATE, Audio, ClipLimits, RefusedClip, read_clip
from p2pasr.speech.mel import log_mel
from p2pasr.speech.prepare import read_rows
from p2pasr.speech.pretrained import Frontend
from p2pasr.speech.shards import Clip

MEL_TOLERANCE = 0.05
"""How far features of one recording may lie apart that different machines computed."""


class Recordings:
    """Recordings that shards were prepared from, found again by what was made of them.

    Args:
        folder: holds labels.json or metadata.csv, as for `p2pasr data prepare`.
        dialect: of rows that name none.
        student: what the shards were prepared with.
    """

    def __init__(self, folder: Path, dialect: str, student: Frontend) -> None:
        self.folder = folder
        self.student = student
        self.limits = ClipLimits(student.window_seconds)
        self._by_length: dict[float, list[Path]] = {}
        for row in read_rows(folder, dialect):
            path = folder / row.audio
            with contextlib.suppress(RefusedClip):  # what was refused then is in no shard
                self._by_length.setdefault(_length(len(read_clip(path, self.limits))), []).append(path)

    def of(self, clip: Clip) -> Audio:
        """The recording of a clip: the one that is as long and gives the same features.

        Raises:
            RefusedClip: none does.
        """
        for path in self._by_length.get(float(np.float32(clip.seconds)), []):
            audio = read_clip(path, self.limits)
            mel = log_mel(audio, self.student.extractor)
            if mel.shape == clip.mel.shape and float(np.abs(mel.astype(np.float32) - clip.mel).max()) < MEL_TOLERANCE:
                return audio
        raise RefusedClip(f"no recording in {self.folder} is the one that it was made of")


def _length(samples: int) -> float:
    """Seconds of a recording as shards hold them."""
    return float(np.float32(samples / SAMPLE_RATE))
