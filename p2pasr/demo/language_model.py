"""Make a small language model for `p2pasr demo all`, since none comes with this package.

It reads a few hundred short texts and learns to copy them out: what it is given stutters, what it writes does not. From
more text than that, large language models learn by themselves to repeat what they have read, which is what a projector
builds on. It hears nothing: what is spoken, it learns of the projector alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from p2pasr.speech.pretrained import frontend
from p2pasr.tasks.whisper import IGNORED

MODEL: Final = "p2pasr/demo-base"
"""Whose tokenizer it has: each character of the synthetic phrases is one token."""

POSITIONS: Final = 96
REPEATS: Final = 3
"""Times that a stuttered character stands there at most, and one less, the spaces behind it."""

PROMPT: Final = "\n"
"""What stands between a stuttered text and its copy, and in its runs between sound and transcript."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the language model is made.

    Attributes:
        shuffled: the share of texts with their characters in any order, so that it copies and does not guess.
    """

    width: int = 128
    layers: int = 2
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 3e-3
    shuffled: float = 0.5
    seed: int = 0


def make_language_model(
    out: Path, texts: Sequence[str], recipe: Recipe, on_step: Callable[[int, int], None] | None = None
) -> None:
    """Train a Llama from scratch to copy texts, and write it with its tokenizer.

    Args:
        out: folder to write.
        on_step: called with (step, steps).
    """
    tokenizer = frontend(MODEL).tokenizer
    draw = random.Random(recipe.seed)  # noqa: S311 (drawn from a seed, so that it can be made again)
    space, prompt, end = _ids(tokenizer, " "), _ids(tokenizer, PROMPT), int(tokenizer.eos_token_id)
    read = [_ids(tokenizer, text) for text in texts]

    def exercise() -> tuple[list[int], list[int]]:
        ids = draw.choice(read)
        copied = draw.sample(ids, len(ids)) if draw.random() < recipe.shuffled else ids
        return [*stutter(copied, space, draw), *prompt], [*copied, end]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _model(recipe, len(tokenizer), end)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
        )
        for step in range(recipe.steps):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(model, [exercise() for _ in range(recipe.batch_size)], end))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            if on_step is not None:
                on_step(step + 1, recipe.steps)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def stutter(ids: Sequence[int], space: Sequence[int], draw: random.Random) -> list[int]:
    """A text as sound is: each token stands there one or more times, and there are pauses.

    Args:
        ids: its tokens.
        space: the tokens of a pause.
    """
    out = [*space] * draw.randrange(REPEATS)
    for token in ids:
        out += [token] * draw.randint(1, REPEATS) + [*space] * draw.randrange(REPEATS)
    return out


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _loss(model: Any, exercises: Sequence[tuple[list[int], list[int]]], filler: int) -> Tensor:
    """Mean cross entropy of what is to be written behind what is given."""
    rows = [torch.tensor([*given, *written]) for given, written in exercises]
    labels = [torch.tensor([*[IGNORED] * len(given), *written]) for given, written in exercises]
    logits = model(input_ids=pad_sequence(rows, True, filler)).logits[:, :-1]
    return cross_entropy(
        logits.flatten(0, 1), pad_sequence(labels, True, IGNORED)[:, 1:].flatten(), ignore_index=IGNORED
    )


def _model(recipe: Recipe, tokens: int, end: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokens,
            max_position_embeddings=POSITIONS,
            hidden_size=recipe.width,
            intermediate_size=2 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
        )
    )
