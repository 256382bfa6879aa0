"""Shards: pieces of a training set that hold what a model trains on, and neither audio nor raw text.

A shard is one tensor file, named by the BLAKE3 digest of its bytes:

=================  ==========  =====================  =============================================
tensor             dtype       shape                  meaning
=================  ==========  =====================  =============================================
``mel``            float16     (all frames, n_mels)   log-mel features of the clips, one after another
``mel_ends``       int64       (clips,)               where each clip's frames end
``tokens``         int32       (all tokens,)          decoder targets, special tokens included
``token_ends``     int64       (clips,)               where each clip's tokens end
``seconds``        float32     (clips,)               durations of the recordings
``speakers``       uint8       (clips, 8)             salted hash of the speaker; zeros if unknown
=================  ==========  =====================  =============================================

A teacher's labels may lie beside them: :mod:`p2pasr.speech.labels` says how.

Log-mels can be turned back into intelligible speech and token ids into text: a shard is smaller
than a recording and fits no player, but whoever has it can find out what was said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2pasr.errors import LocalError, Reject
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.tensors import pack_tensors, read_tensors
from p2pasr.speech.audio import SAMPLE_RATE
from p2pasr.speech.labels import IDS, LOGS, META, REST, Labelling, SoftLabels, clip_labels, label_tensors
from p2pasr.speech.mel import HOP, Mel

FORMAT = "p2pasr-shard/1"
SPEAKER_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Features:
    """What the clips of a shard were made for; shards of one run share all of it.

    Attributes:
        n_mels: mel bands (80, or 128 for large-v3).
        window_seconds: longest clip accepted.
        vocabulary: hex BLAKE3 of the tokenizer's sorted vocabulary, so that ids mean the same.
    """

    n_mels: int
    window_seconds: float
    vocabulary: str


@dataclass(frozen=True, slots=True)
class Clip:
    """One training example.

    Attributes:
        mel: float16, shape (n_mels, frames), at true length.
        tokens: decoder target, from ``<|startoftranscript|>`` to ``<|endoftext|>``.
        seconds: duration of the recording.
        speaker: 8 bytes, zeros if unknown.
        labels: what a teacher expects at each token but the first; None where none was asked.
    """

    mel: Mel
    tokens: tuple[int, ...]
    seconds: float
    speaker: bytes = bytes(SPEAKER_HASH_BYTES)
    labels: SoftLabels | None = None


def silence(seconds: float, n_mels: int) -> Clip:
    """A clip of zeros with two tokens."""
    frames = max(1, round(seconds * SAMPLE_RATE / HOP))
    return Clip(np.zeros((n_mels, frames), dtype=np.float16), (0, 0), seconds)


@dataclass(frozen=True, slots=True)
class Shard:
    """The clips of one shard, read-only views of the file."""

    dialect: str
    features: Features
    clips: tuple[Clip, ...]
    labelling: Labelling | None = None

    @property
    def seconds(self) -> float:
        """Seconds of audio in the shard."""
        return sum(clip.seconds for clip in self.clips)


def speaker_hash(speaker: str, salt: bytes) -> bytes:
    """Eight bytes that tell speakers apart without naming them, as long as `salt` stays secret."""
    return hashlib.blake2b(speaker.encode(), digest_size=SPEAKER_HASH_BYTES, key=salt).digest()


def pack_shard(clips: Sequence[Clip], dialect: str, features: Features, labelling: Labelling | None = None) -> bytes:
    """The bytes of a shard; equal clips give equal bytes.

    Args:
        labelling: who labelled the clips, all of them; their labels are left out if None.
    """
    if not clips:
        raise ValueError("a shard holds at least one clip")
    tensors: dict[str, npt.NDArray[Any]] = {
        "mel": np.concatenate([clip.mel.T for clip in clips]),
        "mel_ends": np.cumsum([clip.mel.shape[1] for clip in clips], dtype=np.int64),
        "tokens": np.concatenate([np.asarray(clip.tokens, dtype=np.int32) for clip in clips]),
        "token_ends": np.cumsum([len(clip.tokens) for clip in clips], dtype=np.int64),
        "seconds": np.asarray([clip.seconds for clip in clips], dtype=np.float32),
        "speakers": np.frombuffer(b"".join(clip.speaker for clip in clips), dtype=np.uint8).reshape(
            len(clips), SPEAKER_HASH_BYTES
        ),
    }
    meta: dict[str, Any] = {"format": FORMAT, "dialect": dialect, **asdict(features)}
    if labelling is not None:
        tensors |= label_tensors([clip.labels for clip in clips if clip.labels is not None])
        meta[META] = asdict(labelling)
    return pack_tensors(tensors, meta)


def read_shard(path: Path) -> Shard:
    """Open a shard; features are read from disk as they are used.

    Raises:
        LocalError: the file is missing or is no shard.
    """
    try:
        tensors, meta = read_tensors(path)
        if meta.pop("format", None) != FORMAT:
            raise Reject(f"its format is not {FORMAT}")
        dialect = str(meta.pop("dialect"))
        teacher = meta.pop(META, None)
        labelling = None if teacher is None else Labelling(**teacher)
        features = Features(**meta)
        labels = {name: tensors.pop(name) for name in (IDS, LOGS, REST)} if labelling else {}
        clips = _clips(tensors, features)
        if labelling:
            parts = clip_labels(labels, [len(clip.tokens) - 1 for clip in clips])
            clips = tuple(replace(clip, labels=part) for clip, part in zip(clips, parts, strict=True))
        return Shard(dialect, features, clips, labelling)
    except OSError as error:
        raise LocalError(f"the shard {path} cannot be read ({error.strerror})") from error
    except (Reject, ValueError, KeyError, TypeError, IndexError) as error:
        raise LocalError(f"{path} is not a shard ({error}); make it again with p2pasr data prepare") from error


def check_digest(path: Path, expected: str) -> None:
    """Compare a file with the digest that names it.

    Raises:
        LocalError: the file is missing or its bytes differ.
    """
    if not path.is_file():
        raise LocalError(f"shard {path} is missing")
    actual = blob_digest(path.read_bytes()).hex()
    if actual != expected:
        raise LocalError(f"shard {path} is corrupt: its digest is {actual[:12]}…, not {expected[:12]}…")


def _clips(tensors: dict[str, npt.NDArray[Any]], features: Features) -> tuple[Clip, ...]:
    frames, tokens, clips = len(tensors["mel"]), len(tensors["tokens"]), len(tensors["seconds"])
    layout: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]] = {
        "mel": (np.float16, (frames, features.n_mels)),
        "mel_ends": (np.int64, (clips,)),
        "tokens": (np.int32, (tokens,)),
        "token_ends": (np.int64, (clips,)),
        "seconds": (np.float32, (clips,)),
        "speakers": (np.uint8, (clips, SPEAKER_HASH_BYTES)),
    }
    if not clips or {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} != layout:
        raise Reject("its tensors do not fit together")
    mel_ends, token_ends = tensors["mel_ends"].tolist(), tensors["token_ends"].tolist()
    if not _ascending(mel_ends, frames) or not _ascending(token_ends, tokens):
        raise Reject("its clips do not cover its tensors")
    if max(np.diff(mel_ends, prepend=0)) * HOP > round(features.window_seconds * SAMPLE_RATE):
        raise Reject(f"a clip is longer than the window of {features.window_seconds:g} s")
    if tensors["tokens"].min() < 0:
        raise Reject("a token is negative")
    return tuple(
        Clip(
            mel=tensors["mel"][frames_from:frames_to].T,
            tokens=tuple(tensors["tokens"][tokens_from:tokens_to].tolist()),
            seconds=float(tensors["seconds"][index]),
            speaker=tensors["speakers"][index].tobytes(),
        )
        for index, (frames_from, frames_to, tokens_from, tokens_to) in enumerate(
            zip([0, *mel_ends], mel_ends, [0, *token_ends], token_ends, strict=False)
        )
    )


def _ascending(ends: list[int], last: int) -> bool:
    """Whether `ends` cuts a sequence of `last` items into non-empty runs."""
    return ends[-1] == last and all(a < b for a, b in zip([0, *ends], ends, strict=False))
