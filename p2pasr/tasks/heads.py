"""What a feature model decides from an encoder's states: each head's view of a batch, its loss and its scores.

A head changes a batch to its own view of it, loses on that and turns it into outcomes; scores are made of the outcomes
of all batches. All draws are torch's on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

from p2pasr.speech.shards import SPEAKER_HASH_BYTES, Clip
from p2pasr.tasks.conv_transformer import SUBSAMPLING, EncoderConfig, States, TextModel
from p2pasr.tasks.corruption import compared, corrupt, units_of, untouched
from p2pasr.tasks.noise import loudness, make_noisy, pooled, span_mask
from p2pasr.tasks.scores import area_under_roc, calibration_error, confusion, equal_error_rate, misses_at
from p2pasr.tasks.whisper import PREFIX_TOKENS

UNKNOWN = -1
"""Class of an example whose class is not among the run's; nothing is learned from it."""

NOBODY = bytes(SPEAKER_HASH_BYTES)

FALSE_ALARM_RATES = (0.01, 0.05, 0.2)
"""Points of the detection error trade-off that are told."""

MAX_TRIAL_CLIPS = 1000
"""Clips of which every pair is a trial of a speaker's embedding."""


@dataclass(frozen=True, slots=True)
class Example:
    """A clip with what its shard and the run's configuration say about it.

    Attributes:
        dialect, speaker: their places among the run's, or :data:`UNKNOWN`.
    """

    clip: Clip
    dialect: int = UNKNOWN
    speaker: int = UNKNOWN


@dataclass(frozen=True, slots=True)
class Sound:
    """Clips padded with zeros.

    Attributes:
        mels: float32, (batch, n_mels, frames).
        frames: int64, (batch,), true lengths.
    """

    mels: Tensor
    frames: Tensor

    @classmethod
    def of(cls, mels: Sequence[Tensor]) -> Sound:
        """Pad log-mels, each float32, (n_mels, frames)."""
        frames = torch.tensor([mel.shape[1] for mel in mels])
        return cls(pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2).contiguous(), frames)

    def to(self, device: torch.device) -> Sound:
        """The same on another device."""
        return Sound(self.mels.to(device), self.frames.to(device))


@dataclass(frozen=True, slots=True)
class View:
    """What a head makes of a batch: a sound of its own, if it changes the clips', and what is to be learned."""

    target: Any
    sound: Sound | None = None


class Head(nn.Module):
    """One decision. :meth:`losses` and :meth:`outcomes` take the states of the view's sound, and its target."""

    hears: ClassVar[bool] = True
    """Whether it needs the encoder."""
    reads: ClassVar[bool] = False
    """Whether it needs a text; those that do not implement :meth:`decide`."""

    def decide(self, heard: States) -> Tensor:
        """What a head that reads nothing makes of sounds."""
        raise NotImplementedError

    def view(self, examples: Sequence[Example]) -> View:
        """What is to be learned from a batch; draws what is drawn."""
        raise NotImplementedError

    def losses(self, heard: States, target: Any) -> Tensor:
        """Loss of each example, (batch,)."""
        raise NotImplementedError

    def outcomes(self, heard: States, target: Any) -> list[Any]:
        """What :meth:`scores` needs to know of each example."""
        raise NotImplementedError

    def scores(self, outcomes: Sequence[Any]) -> dict[str, Any]:
        """How good the decisions were, as plain numbers; None where the examples do not tell."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the head computes."""
        return next(self.parameters()).device


class AccentHead(Head):
    """Which of the run's dialects is spoken."""

    def __init__(self, config: EncoderConfig, dialects: Sequence[str]) -> None:
        super().__init__()
        self.dialects = tuple(dialects)
        self.out = nn.Linear(2 * config.width, len(dialects))

    def decide(self, heard: States) -> Tensor:
        """Logits, (batch, dialects)."""
        logits: Tensor = self.out(heard.statistics())
        return logits

    def view(self, examples: Sequence[Example]) -> View:
        """See :meth:`Head.view`."""
        return View(torch.tensor([example.dialect for example in examples]))

    def losses(self, heard: States, target: Tensor) -> Tensor:
        """Cross entropy."""
        return _known_cross_entropy(self.decide(heard), target)

    def outcomes(self, heard: States, target: Tensor) -> list[tuple[int, int]]:
        """Dialect spoken, dialect recognised."""
        return list(zip(target.tolist(), self.decide(heard).argmax(1).tolist(), strict=True))

    def scores(self, outcomes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Share that is right, and spoken → recognised → clips."""
        known = [pair for pair in outcomes if pair[0] != UNKNOWN]
        counts = confusion([truth for truth, _ in known], [guess for _, guess in known], len(self.dialects))
        rows = {
            spoken: dict(zip(self.dialects, row, strict=True))
            for spoken, row in zip(self.dialects, counts.tolist(), strict=True)
        }
        return {
            "accuracy": float(np.trace(counts) / len(known)) if known else None,
            "clips": len(known),
            "confusion": rows,
        }


class SpeakerHead(Head):
    """A direction that tells speakers apart, learned by naming the run's (additive margin, Wang et al. 2018)."""

    scale, margin = 30.0, 0.2

    def __init__(self, config: EncoderConfig, speakers: int, size: int) -> None:
        super().__init__()
        self.out = nn.Linear(2 * config.width, size)
        self.speakers = nn.Parameter(torch.empty(speakers, size))

    def decide(self, heard: States) -> Tensor:
        """Unit vectors, (batch, size); the cosine of two says how alike the speakers are."""
        return normalize(self.out(heard.statistics()), dim=1)

    def view(self, examples: Sequence[Example]) -> View:
        """See :meth:`Head.view`."""
        return View((torch.tensor([e.speaker for e in examples]), [e.clip.speaker for e in examples]))

    def losses(self, heard: States, target: tuple[Tensor, list[bytes]]) -> Tensor:
        """Cross entropy of scaled cosines, after the speaker's own was lowered by the margin."""
        speaker = target[0].to(self.device)
        cosines = self.decide(heard) @ normalize(self.speakers, dim=1).T
        own = torch.arange(cosines.shape[1], device=self.device)[None] == speaker[:, None]
        return _known_cross_entropy(self.scale * (cosines - self.margin * own), speaker)

    def outcomes(self, heard: States, target: tuple[Tensor, list[bytes]]) -> list[tuple[np.ndarray, bytes]]:
        """Embedding, speaker."""
        return list(zip(self.decide(heard).double().cpu().numpy(), target[1], strict=True))

    def scores(self, outcomes: Sequence[tuple[np.ndarray, bytes]]) -> dict[str, Any]:
        """Equal error rate over all pairs of drawn clips whose speakers are known by their hashes."""
        known = [pair for pair in outcomes if pair[1] != NOBODY]
        drawn = torch.randperm(len(known))[:MAX_TRIAL_CLIPS].tolist()
        names = [known[index][1] for index in drawn]
        if len(set(names)) < 2 or len(set(names)) == len(names):
            return {"eer": None, "same": 0, "different": 0}
        vectors = np.stack([known[index][0] for index in drawn])
        one, two = np.triu_indices(len(drawn), 1)
        place = np.unique(np.array([name.hex() for name in names]), return_inverse=True)[1]
        same = place[one] == place[two]
        cosines = (vectors @ vectors.T)[one, two]
        eer = equal_error_rate(cosines[same], cosines[~same])
        return {"eer": eer, "same": int(same.sum()), "different": int((~same).sum())}


class VadHead(Head):
    """Where somebody speaks and where there is noise, in steps of 40 ms.

    Clips are put between silences and partly under noise, so that both are known: speech is where the clip itself
    was within 30 dB of its loudest, and noise where it was added.
    """

    most_padding, quietest_snr, loudest_snr = 100, 0.0, 25.0
    sounds = ("speech", "noise")

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.out = nn.Linear(config.width, len(self.sounds))

    def decide(self, heard: States) -> Tensor:
        """Logits of speech and noise, (batch, positions, 2)."""
        logits: Tensor = self.out(heard.values)
        return logits

    def view(self, examples: Sequence[Example]) -> View:
        """Noisy sounds; bool, (batch, positions, 2); their loudness, (batch, positions)."""
        noisy = [
            make_noisy(mel_of(example.clip), self.most_padding, self.quietest_snr, self.loudest_snr)
            for example in examples
        ]
        labels = [torch.stack([pooled(n.speech, SUBSAMPLING), pooled(n.noise, SUBSAMPLING)], dim=1) for n in noisy]
        levels = [loudness(n.mel)[::SUBSAMPLING] for n in noisy]
        target = pad_sequence(labels, batch_first=True), pad_sequence(levels, batch_first=True)
        return View(target, Sound.of([n.mel for n in noisy]))

    def losses(self, heard: States, target: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy, averaged over the positions."""
        labels = target[0].to(self.device, torch.float32)
        each = binary_cross_entropy_with_logits(self.decide(heard).float(), labels, reduction="none")
        return States(each, heard.real).mean().sum(1)

    def outcomes(self, heard: States, target: tuple[Tensor, Tensor]) -> list[np.ndarray]:
        """(positions, 5): scores of speech and noise, whether there are any, loudness."""
        scored = torch.cat([self.decide(heard).cpu(), target[0].float(), target[1][..., None]], dim=2)
        return [row[real].double().numpy() for row, real in zip(scored, heard.real.cpu(), strict=True)]

    def scores(self, outcomes: Sequence[np.ndarray]) -> dict[str, Any]:
        """The trade-off of misses and false alarms, beside that of a threshold on loudness alone."""
        rows = np.concatenate(outcomes)
        out = {}
        for index, sound in enumerate(self.sounds):
            there = rows[:, 2 + index] > 0
            out[sound] = {
                **_trade_off(rows[there, index], rows[~there, index]),
                "eer_of_loudness": _trade_off(rows[there, 4], rows[~there, 4])["eer"],
                "positions": len(rows),
            }
        return out


class MaskedHead(Head):
    """Log-mels where they were masked: what an encoder can learn from speech that nobody has written down."""

    def __init__(self, config: EncoderConfig, n_mels: int, share: float, span: int, norm: str) -> None:
        super().__init__()
        self.n_mels, self.share, self.span, self.power = n_mels, share, span, {"l1": 1, "l2": 2}[norm]
        self.out = nn.Linear(config.width, SUBSAMPLING * n_mels)

    def decide(self, heard: States) -> Tensor:
        """Log-mels, (batch, frames, n_mels), with up to three frames more than there are."""
        made: Tensor = self.out(heard.values)
        return made.reshape(made.shape[0], -1, self.n_mels)  # len() would fix the size of an exported batch

    def view(self, examples: Sequence[Example]) -> View:
        """Sounds with spans set to zero; the sounds; bool, (batch, frames), where they were masked."""
        mels = [mel_of(example.clip) for example in examples]
        masks = [span_mask(mel.shape[1], self.share, self.span) for mel in mels]
        masked = Sound.of([mel * ~mask for mel, mask in zip(mels, masks, strict=True)])
        return View((Sound.of(mels), pad_sequence(masks, batch_first=True)), masked)

    def losses(self, heard: States, target: tuple[Sound, Tensor]) -> Tensor:
        """Mean distance over the masked frames, or mean squared distance."""
        return self._distances(heard, target, self.power)

    def outcomes(self, heard: States, target: tuple[Sound, Tensor]) -> list[tuple[float, float]]:
        """Mean distance and mean squared distance."""
        return list(zip(*(self._distances(heard, target, power).tolist() for power in (1, 2)), strict=True))

    def scores(self, outcomes: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """Means over the clips, in units of Whisper's log-mels, of which one is 40 dB."""
        l1, l2 = np.mean(outcomes, axis=0).tolist()
        return {"l1": l1, "l2": l2, "clips": len(outcomes)}

    def _distances(self, heard: States, target: tuple[Sound, Tensor], power: int) -> Tensor:
        wanted, masked = target[0].mels.transpose(1, 2).to(self.device), target[1].to(self.device)
        distance = (self.decide(heard).float()[:, : wanted.shape[1]] - wanted).abs() ** power
        return States(distance, masked).mean().mean(1)


class ConfidenceHead(Head):
    """Whether a transcript says what was spoken, token by token; it is as sure as it is of its worst token.

    What it learns from are the run's transcripts, of which half are made wrong: by substituting and leaving out, which
    may be seen from the text alone, or by taking those of other clips, which can only be heard.
    """

    reads = True

    def __init__(self, config: EncoderConfig, vocabulary: int, layers: int, continuing: frozenset[int]) -> None:
        super().__init__()
        self.continuing = continuing
        self.reader = TextModel(vocabulary, config, layers, hears=True)
        self.out = nn.Linear(config.width, 1)

    def logits(self, heard: States, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """How likely each token is right, and the end behind them.

        Args:
            tokens: from ``<|startoftranscript|>`` to ``<|endoftext|>``, without what stands between the first and
                the text.

        Returns:
            logits, (batch, tokens but the first), and whether they are real.
        """
        ids, lengths = padded_ids(tokens, self.device)
        read = self.reader(ids, lengths, heard)
        return self.out(read.values)[..., 0].float()[:, 1:], read.real[:, 1:]

    def sureness(self, heard: States, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Logit of each transcript's being right, (batch,)."""
        logits, real = self.logits(heard, tokens)
        return logits.masked_fill(~real, math.inf).amin(1)

    def view(self, examples: Sequence[Example]) -> View:
        """Transcripts, for each of their tokens whether it is wrong, and what kind each is.

        Half are right, a quarter has errors and a quarter is another clip's, if there is one that differs.
        """
        texts = [units_of(text_tokens(example.clip), self.continuing) for example in examples]
        pool = [unit for units in texts for unit in units]
        made, kinds = [], []
        for units, (kind, which) in zip(texts, torch.rand(len(texts), 2).tolist(), strict=True):
            others = [other for other in texts if other != units]
            if kind < 0.5 or not units:
                made.append(untouched(units))
                kinds.append("right")
            elif kind < 0.75 or not others:
                made.append(corrupt(units, pool))
                kinds.append("errors")
            else:
                made.append(compared(others[int(which * len(others))], units))
                kinds.append("other clips")
        tokens = [framed(example.clip, one.tokens) for example, one in zip(examples, made, strict=True)]
        return View((tokens, [one.wrong_tokens for one in made], kinds))

    def losses(self, heard: States, target: tuple[list[tuple[int, ...]], list[tuple[bool, ...]], list[str]]) -> Tensor:
        """Cross entropy of the tokens, averaged, and of the worst."""
        tokens, wrong, _ = target
        logits, real = self.logits(heard, tokens)
        right = ~pad_sequence([torch.tensor(flags) for flags in wrong], batch_first=True).to(self.device)
        each = binary_cross_entropy_with_logits(logits, right.float(), reduction="none")
        worst = logits.masked_fill(~real, math.inf).amin(1)
        whole = binary_cross_entropy_with_logits(worst, (right | ~real).all(1).float(), reduction="none")
        return States(each[..., None], real).mean()[:, 0] + whole

    def outcomes(
        self, heard: States, target: tuple[list[tuple[int, ...]], list[tuple[bool, ...]], list[str]]
    ) -> list[tuple[float, str]]:
        """Logit, kind of transcript."""
        tokens, _, kinds = target
        return list(zip(self.sureness(heard, tokens).tolist(), kinds, strict=True))

    def scores(self, outcomes: Sequence[tuple[float, str]]) -> dict[str, Any]:
        """Areas under the curve, and how far probabilities are from how often they are right."""
        logits, kinds = np.array([one for one, _ in outcomes]), np.array([one for _, one in outcomes])
        right = kinds == "right"

        def area(wrong: np.ndarray) -> float | None:
            return area_under_roc(logits[right], logits[wrong]) if right.any() and wrong.any() else None

        return {
            "auroc": area(~right),
            "auroc_of_errors": area(kinds == "errors"),
            "auroc_of_other_clips": area(kinds == "other clips"),
            "ece": calibration_error(1 / (1 + np.exp(-logits)), right),
            "clips": len(right),
        }


def text_tokens(clip: Clip) -> tuple[int, ...]:
    """A clip's transcript: its tokens without those that stand before and behind the text."""
    return clip.tokens[PREFIX_TOKENS:-1]


def framed(clip: Clip, text: Sequence[int]) -> tuple[int, ...]:
    """A text between the tokens that begin and end the clip's own."""
    return (clip.tokens[0], *text, clip.tokens[-1])


def padded_ids(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids, int64, (batch, tokens), padded with zeros, and their lengths."""
    ids = pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
    return ids.to(device), torch.tensor([len(row) for row in tokens], device=device)


def mel_of(clip: Clip) -> Tensor:
    """A clip's log-mels, float32, (n_mels, frames)."""
    return torch.from_numpy(np.asarray(clip.mel, dtype=np.float32))


def _known_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of each example, (batch,); zero for those whose class is unknown."""
    return cross_entropy(logits.float(), classes.to(logits.device), ignore_index=UNKNOWN, reduction="none")


def _trade_off(positives: np.ndarray, negatives: np.ndarray) -> dict[str, float | None]:
    """Equal error rate, and misses at a few rates of false alarms; None where there is only one kind."""
    told = len(positives) > 0 and len(negatives) > 0
    points: dict[str, float | None] = {"eer": equal_error_rate(positives, negatives) if told else None}
    for rate in FALSE_ALARM_RATES:
        points[f"misses_at_{rate:.0%}"] = misses_at(positives, negatives, rate) if told else None
    return points
