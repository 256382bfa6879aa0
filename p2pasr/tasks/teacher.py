"""A teacher: what it expects of clips that were prepared for another model, as labels by that model's ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from p2pasr.errors import LocalError
from p2pasr.speech.audio import RefusedClip
from p2pasr.speech.labels import SoftLabels, translation
from p2pasr.speech.mel import log_mel
from p2pasr.speech.pretrained import BUNDLED, Frontend, frontend, local_folder, weights_digest
from p2pasr.speech.recordings import Recordings
from p2pasr.speech.shards import Clip, Features
from p2pasr.speech.text import language_token
from p2pasr.tasks.determinism import usable_device
from p2pasr.tasks.whisper import IGNORED, collate, load_whisper

LANGUAGE = 1
"""Where a transcript's language token stands."""


def grouped(logs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of some tokens and, behind them, of all others together.

    Args:
        logs: float32, (targets, tokens).
        ids: int64, (targets, k), each once in its row, k less than all.

    Returns:
        float32, (targets, k + 1).
    """
    named = torch.zeros_like(logs, dtype=torch.bool).scatter_(-1, ids, value=True)
    rest = logs.masked_fill(named, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, ids), rest], dim=-1)


def stacked(labels: SoftLabels) -> Tensor:
    """Labels as :func:`grouped` gives them: float32, (targets, k + 1)."""
    return torch.from_numpy(np.column_stack([labels.logs.astype(np.float32), labels.rest]))


@dataclass(slots=True)
class Kept:
    """What truncated labels keep of a teacher's distributions, over all targets of the shards that were labelled.

    Attributes:
        targets: how many there are.
        mass: summed probability of the tokens that are named.
        mass_min: the least of a target.
        gap: summed divergence of the teacher's own distribution from the labels, their rest spread evenly, in nats.
        bytes, full_bytes: of the labels, and of all logits as float16.
    """

    targets: int = 0
    mass: float = 0.0
    mass_min: float = 1.0
    gap: float = 0.0
    bytes: int = 0
    full_bytes: int = 0

    def add(self, other: Kept) -> None:
        """Count the targets of other shards too."""
        self.targets += other.targets
        self.mass += other.mass
        self.mass_min = min(self.mass_min, other.mass_min)
        self.gap += other.gap
        self.bytes += other.bytes
        self.full_bytes += other.full_bytes


class Teacher:
    """A Whisper model that says what it expects of clips that were prepared for another.

    Args:
        model: hub id or local folder.
        features: what the clips were prepared for.
        student: the model that they were prepared for, whose tokenizer is needed where its vocabulary differs.
        recordings: the folder that they were prepared from, needed where the teacher takes other features.
        dialect: of recordings that name none.

    Raises:
        LocalError: the teacher cannot be loaded, hears less at once, or needs recordings or the student's tokenizer.
    """

    def __init__(
        self,
        model: str,
        features: Features,
        student: str,
        *,
        revision: str | None = None,
        device: str = "cpu",
        recordings: Path | None = None,
        dialect: str = "cmn",
    ) -> None:
        self.frontend: Frontend = frontend(model, revision)
        self.features = features
        if self.frontend.window_seconds < features.window_seconds:
            raise LocalError(
                f"the teacher {model!r} hears {self.frontend.window_seconds:g} s at once, "
                f"but the shards were prepared for {features.window_seconds:g} s"
            )
        self.name = model if local_folder(model) is None or model in BUNDLED else Path(model).name
        self.weights = weights_digest(model, revision)
        self.model = load_whisper(model, revision).to(usable_device(device)).eval().requires_grad_(False)
        self.frames = 2 * int(self.frontend.config.max_source_positions)
        self.tokens = int(self.model.config.vocab_size)
        self._same_tokens = self.frontend.vocabulary == features.vocabulary
        self._same_mels = int(self.frontend.extractor.feature_size) == features.n_mels
        part = None if self._same_tokens and self._same_mels else frontend(student, None, features.window_seconds)
        if part is not None and part.vocabulary != features.vocabulary:
            raise LocalError(f"the shards were not prepared for {student!r}, which their index names")
        self.student = part or self.frontend
        mine, theirs = self.frontend.tokenizer.get_vocab(), self.student.tokenizer.get_vocab()
        self.to_student = translation(mine, theirs, self.tokens)
        self.from_student = translation(theirs, mine, int(self.student.config.vocab_size))
        self._unnamed = torch.from_numpy(self.to_student < 0).to(self.model.device)
        self._recordings = None
        if not self._same_mels:
            if recordings is None:
                raise LocalError(
                    f"the teacher {model!r} takes {self.frontend.extractor.feature_size} mel bands and the shards hold "
                    f"{features.n_mels}: name the folder that they were prepared from with --recordings"
                )
            self._recordings = Recordings(recordings, dialect, self.student)

    def hears(self, clip: Clip, dialect: str) -> Clip:
        """A clip as the teacher takes it.

        Raises:
            RefusedClip: no recording is that of the clip, or its transcript holds a token that the teacher lacks.
        """
        recordings = self._recordings
        mel = clip.mel if recordings is None else log_mel(recordings.of(clip), self.frontend.extractor)
        return Clip(mel, self.reads(clip.tokens, dialect), clip.seconds)

    def reads(self, tokens: Sequence[int], dialect: str) -> tuple[int, ...]:
        """A transcript by the teacher's ids, with its own token for the dialect's language.

        Raises:
            RefusedClip: it holds a token that the teacher lacks.
        """
        if self._same_tokens:
            return tuple(tokens)
        theirs, own = self.student.tokenizer, self.frontend.tokenizer
        spoken = theirs.convert_tokens_to_ids(language_token(theirs, dialect))
        ids = self._teacher_ids(np.asarray(tokens)).tolist()
        if tokens[LANGUAGE] == spoken:
            ids[LANGUAGE] = own.convert_tokens_to_ids(language_token(own, dialect))
        if min(ids) < 0:
            raise RefusedClip(f"its transcript holds token {tokens[ids.index(-1)]}, which the teacher does not have")
        return tuple(ids)

    @torch.inference_mode()
    def logs(self, heard: Sequence[Clip]) -> list[Tensor]:
        """Log-probabilities of all of its tokens at each clip's targets: float32, (targets, tokens) each."""
        batch = collate(heard, self.frames, self.model.config.pad_token_id).to(self.model.device)
        out = self.model(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids)
        logs = log_softmax(out.logits[batch.labels != IGNORED].float(), dim=-1)
        return list(torch.split(logs, [len(clip.tokens) - 1 for clip in heard]))

    def most_likely(self, logs: Tensor, top_k: int) -> Tensor:
        """Its own ids of the most likely tokens that the student has too: int64, (targets, top_k)."""
        return logs.masked_fill(self._unnamed, -torch.inf).topk(top_k).indices

    def label(self, logs: Tensor, top_k: int, kept: Kept) -> SoftLabels:
        """Labels of one clip by the student's ids; what they keep of the distributions is added to `kept`."""
        ids = self.most_likely(logs, top_k)
        groups = grouped(logs, ids)
        labels = SoftLabels(
            self.to_student[ids.cpu().numpy()].astype(np.int32),
            groups[:, :-1].cpu().numpy().astype(np.float16),
            groups[:, -1].cpu().numpy().astype(np.float32),
        )
        mass = groups[:, :-1].exp().sum(-1)
        size = labels.ids.nbytes + labels.logs.nbytes + labels.rest.nbytes
        gap = float(_gap(logs, ids, labels))
        kept.add(Kept(len(ids), float(mass.sum()), float(mass.min()), gap, size, 2 * logs.numel()))
        return labels

    def differs(self, logs: Tensor, labels: SoftLabels, tolerance: float) -> str | None:
        """What labels say that the teacher does not, as a sentence; None if they are its own."""
        names = torch.from_numpy(self._teacher_ids(labels.ids)).to(logs.device)
        if bool((names < 0).any()):
            return "they name a token that the teacher does not have"
        fresh = grouped(logs, names)
        said = stacked(labels).to(logs.device)
        allowed = tolerance + 2.0**-10 * said.abs()  # float16 rounds by half of that
        off = ((fresh - said).abs() - allowed).amax(-1)
        if float(off.max()) > 0:
            target = int(off.argmax())
            return f"at target {target} a log-probability is off by {float((fresh - said)[target].abs().max()):.3g}"
        least = logs.gather(-1, self.most_likely(logs, names.shape[1])).amin(-1)
        if bool((fresh[:, :-1].amin(-1) < least - 2 * tolerance).any()):
            return "they leave out a token that is likelier than one they name"
        return None

    def _teacher_ids(self, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """The teacher's ids of the student's; -1 where it has no such token."""
        known = ids < len(self.from_student)
        return np.where(known, self.from_student[np.where(known, ids, 0)], -1)


def _gap(logs: Tensor, ids: Tensor, labels: SoftLabels) -> Tensor:
    """Summed divergence of a teacher's distributions from what labels say, their rest spread evenly."""
    p = log_softmax(logs.double(), dim=-1)
    said = log_softmax(stacked(labels).to(logs.device).double(), dim=-1)
    spread = said[:, -1:] - math.log(logs.shape[1] - ids.shape[1])
    q = spread.expand_as(p).scatter(-1, ids, said[:, :-1])
    return (p.exp() * (p - q)).sum()
