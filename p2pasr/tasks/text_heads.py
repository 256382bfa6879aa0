"""Heads about what a transcript says: a language model that picks among guesses, and phonemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss
from torch.nn.utils.rnn import pad_sequence

from p2pasr.speech.metrics import error_rates
from p2pasr.speech.phonemes import pronounce
from p2pasr.speech.shards import Clip
from p2pasr.speech.text import normalise
from p2pasr.tasks.conv_transformer import EncoderConfig, States, TextModel
from p2pasr.tasks.corruption import Corrupted, continuing_ids, corrupt, units_of, untouched
from p2pasr.tasks.heads import Example, Head, View, framed, padded_ids, text_tokens

GUESSES = 5
"""Guesses in each list that a language model is scored by; one of them, anywhere, is right."""

BLANK = 0


@dataclass(frozen=True, slots=True)
class Guess:
    """One of several transcripts that a recogniser holds possible.

    Attributes:
        tokens: the text's ids, without special tokens.
        score: the recogniser's log probability, in nats a token; 0 if it tells none.
    """

    tokens: tuple[int, ...]
    score: float = 0.0


class CorrectionHead(Head):
    """A causal language model of the run's transcripts that picks among guesses; it hears nothing.

    Args:
        vocabulary: number of token ids.
        layers: blocks that read.
        tokenizer: decodes transcripts, for error rates and the lexicon.
        lexicon: words that a transcript is the better for.
        bonus: what each occurrence of one counts, in nats a token.
    """

    hears, reads = False, True

    def __init__(
        self, config: EncoderConfig, vocabulary: int, layers: int, tokenizer: Any, lexicon: Sequence[str], bonus: float
    ) -> None:
        super().__init__()
        self.tokenizer, self.bonus = tokenizer, bonus
        self.lexicon = tuple(filter(None, map(normalise, lexicon)))
        self.continuing = continuing_ids(tokenizer)
        self.reader = TextModel(vocabulary, config, layers, causal=True)
        self.out = nn.Linear(config.width, vocabulary)

    def surprise(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Mean −log p of the tokens behind the first, (batch,), in nats; each framed as by :func:`framed`."""
        ids, lengths = padded_ids(tokens, self.device)
        read = self.reader(ids[:, :-1], lengths - 1)
        each = cross_entropy(self.out(read.values).float().transpose(1, 2), ids[:, 1:], reduction="none")
        return States(each[..., None], read.real).mean()[:, 0]

    @torch.inference_mode()
    def rescore(self, clip: Clip, guesses: Sequence[Guess]) -> list[float]:
        """How good each guess is: the recogniser's score, the language model's and the lexicon's together.

        Args:
            clip: tells which tokens begin and end a text.
            guesses: at least one.
        """
        surprises = self.surprise([framed(clip, guess.tokens) for guess in guesses]).tolist()
        texts = [normalise(self.tokenizer.decode(guess.tokens)) for guess in guesses]
        return [
            guess.score - surprise + self.bonus * sum(map(text.count, self.lexicon))
            for guess, surprise, text in zip(guesses, surprises, texts, strict=True)
        ]

    def view(self, examples: Sequence[Example]) -> View:
        """The examples and, to be scored by, for each guesses of which one is right, at a place that is drawn."""
        texts = [units_of(text_tokens(example.clip), self.continuing) for example in examples]
        pool = [unit for units in texts for unit in units]
        lists: list[list[Corrupted]] = []
        for units in [] if self.training else texts:
            guesses = [corrupt(units, pool) for _ in range(GUESSES - 1)]
            guesses.insert(int(torch.randint(GUESSES, (1,))), untouched(units))
            lists.append(guesses)
        return View((examples, lists))

    def losses(self, heard: States | None, target: tuple[Sequence[Example], Any]) -> Tensor:  # noqa: ARG002
        """Mean cross entropy of the tokens."""
        return self.surprise([framed(example.clip, text_tokens(example.clip)) for example in target[0]])

    def outcomes(
        self,
        heard: States | None,  # noqa: ARG002
        target: tuple[Sequence[Example], list[list[Corrupted]]],
    ) -> list[tuple[str, str, str]]:
        """What was said, the first guess and the best."""
        out = []
        for example, corrupted in zip(*target, strict=True):
            guesses = [Guess(one.tokens) for one in corrupted]
            totals = self.rescore(example.clip, guesses)
            best = guesses[totals.index(max(totals))]
            texts = (text_tokens(example.clip), guesses[0].tokens, best.tokens)
            out.append(tuple(self.tokenizer.decode(text) for text in texts))
        return out

    def scores(self, outcomes: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
        """Error rates of first guesses and of those that were picked."""
        said, first, best = zip(*outcomes, strict=True)
        if not any(map(normalise, said)):
            return {"cer_before": None, "cer_after": None, "clips": 0}
        before, after = error_rates(said, first), error_rates(said, best)
        return {"cer_before": before.cer, "cer_after": after.cer, "clips": before.clips}


class PhonemeHead(Head):
    """Phonemes by connectionist temporal classification (Graves et al. 2006).

    Args:
        pronunciations: dialect → character or word → its phonemes.
        dialects: of which an example's is one by its place.
        tokenizer: decodes transcripts.
    """

    def __init__(
        self,
        config: EncoderConfig,
        pronunciations: Mapping[str, Mapping[str, Sequence[str]]],
        dialects: Sequence[str],
        tokenizer: Any,
    ) -> None:
        super().__init__()
        self.pronunciations, self.dialects, self.tokenizer = pronunciations, tuple(dialects), tokenizer
        self.phonemes = sorted({p for lexicon in pronunciations.values() for word in lexicon.values() for p in word})
        self.ids = {phoneme: index for index, phoneme in enumerate(self.phonemes, start=BLANK + 1)}
        self.out = nn.Linear(config.width, len(self.phonemes) + 1)

    def decide(self, heard: States) -> Tensor:
        """Logits of no phoneme and of each, (batch, positions, phonemes + 1)."""
        logits: Tensor = self.out(heard.values)
        return logits

    def recognise(self, heard: States) -> list[list[str]]:
        """The likeliest phoneme of each position, without repetitions and blanks."""
        rows = self.decide(heard).argmax(2).tolist()
        lengths = heard.real.sum(1).tolist()
        found = []
        for row, length in zip(rows, lengths, strict=True):
            changes = [i for n, i in enumerate(row[:length]) if i != BLANK and (n == 0 or row[n - 1] != i)]
            found.append([self.phonemes[index - 1] for index in changes])
        return found

    def view(self, examples: Sequence[Example]) -> View:
        """The phonemes of each example; None where its text holds what nobody said how to pronounce."""
        return View([self._spoken(example) for example in examples])

    def losses(self, heard: States, target: Sequence[list[str] | None]) -> Tensor:
        """−log p of the phonemes, divided by their number; zero without any, or with more than fit the clip."""
        log_shares = self.decide(heard).float().log_softmax(2).transpose(0, 1).cpu()  # only there deterministic
        ids = [torch.tensor([self.ids[p] for p in phonemes or ()], dtype=torch.int64) for phonemes in target]
        lengths = torch.tensor(list(map(len, ids)))
        each = ctc_loss(
            log_shares,
            pad_sequence(ids, batch_first=True),
            heard.real.sum(1).cpu(),
            lengths,
            BLANK,
            reduction="none",
            zero_infinity=True,
        )
        return (each * (lengths > 0) / lengths.clamp_min(1)).to(self.device)

    def outcomes(self, heard: States, target: Sequence[list[str] | None]) -> list[tuple[str, str]]:
        """Phonemes spoken and phonemes recognised, of the examples whose phonemes are known."""
        pairs = zip(target, self.recognise(heard), strict=True)
        return [(" ".join(spoken), " ".join(found)) for spoken, found in pairs if spoken]

    def scores(self, outcomes: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Phoneme errors / phonemes spoken."""
        if not outcomes:
            return {"per": None, "clips": 0}
        spoken, found = map(list, zip(*outcomes, strict=True))
        return {"per": float(jiwer.wer(spoken, found)), "clips": len(outcomes)}

    def _spoken(self, example: Example) -> list[str] | None:
        if example.dialect < 0:
            return None
        text = normalise(self.tokenizer.decode(text_tokens(example.clip)))
        return pronounce(text, self.pronunciations.get(self.dialects[example.dialect], {}))
