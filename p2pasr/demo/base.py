"""Make the demo's base model: a Whisper of 1.3 million parameters that knows synthetic Mandarin.

`p2pasr demo make-base` runs this and writes the folder that is committed as `p2pasr/demo/base`, so
that the demo can adapt a model without downloading one.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from p2pasr.speech import synthetic
from p2pasr.speech.metrics import ErrorRates, error_rates
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.shards import Clip, read_shard
from p2pasr.tasks.determinism import sample_batches
from p2pasr.tasks.whisper import collate, token_losses, transcribe

FOLDER = Path(__file__).parent / "base"
"""Where the committed model lies."""

WINDOW_SECONDS = 3
LANGUAGES = ("zh", "en")
TEXT_POSITIONS = 48


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the base model is trained; the defaults made the committed one."""

    clips: int = 6000
    people: int = 96
    test_clips: int = 400
    test_people: int = 20
    steps: int = 2500
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 150
    seed: int = 0


def alphabet() -> str:
    """Every Chinese character of the synthetic phrases, each a token of its own."""
    return "".join(dict.fromkeys("".join((*synthetic.OPENINGS, *synthetic.ACTIONS, synthetic.DIGITS))))


def build_tokenizer() -> WhisperTokenizer:
    """A byte-level Whisper tokenizer whose merges make each known character one token.

    Other text falls back to single bytes, so every transcript can be written. Special, language,
    task and timestamp tokens follow in Whisper's order; `yue` is absent, as in whisper-small.
    """
    as_char = bytes_to_unicode()
    vocabulary = [as_char[byte] for byte in range(256)]
    merges: list[tuple[str, str]] = []
    for char in alphabet():
        left, *rest = (as_char[byte] for byte in char.encode())
        for piece in rest:
            merges.append((left, piece))
            left += piece
    merges = list(dict.fromkeys(merges))
    vocabulary += dict.fromkeys(left + right for left, right in merges)
    tokenizer = WhisperTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)
    languages = [f"<|{language}|>" for language in LANGUAGES]
    others = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    tokenizer.add_special_tokens(
        {
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": ["<|startoftranscript|>", *languages, *others, "<|notimestamps|>"],
        }
    )
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(WINDOW_SECONDS * 50 + 1)])
    return tokenizer


def build_model(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """The untrained model: d_model 128, 3 encoder and 2 decoder layers, a window of 3 seconds."""
    token = tokenizer.convert_tokens_to_ids
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=128,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_source_positions=WINDOW_SECONDS * 50,
        max_target_positions=TEXT_POSITIONS,
        dropout=0.1,
        decoder_start_token_id=token("<|startoftranscript|>"),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_length=TEXT_POSITIONS,
        is_multilingual=True,
        lang_to_id={f"<|{language}|>": token(f"<|{language}|>") for language in LANGUAGES},
        task_to_id={task: token(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=token("<|notimestamps|>"),
        prev_sot_token_id=token("<|startofprev|>"),
        return_timestamps=False,
    )
    return model


def make_base(out: Path, recipe: Recipe, on_step: Callable[[int, int, float], None] | None = None) -> ErrorRates:
    """Train the base model on synthetic Mandarin and write it as float16 with its model card.

    Args:
        out: folder to write.
        on_step: called with (step, steps, loss).

    Returns:
        The error rates of the model as written, on speakers it has not heard.
    """
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW_SECONDS).save_pretrained(out)

    with tempfile.TemporaryDirectory(prefix="p2pasr-base-") as folder:
        train = _clips(out, Path(folder) / "train", "cmn", "train", recipe.clips, recipe.people)
        test = _clips(out, Path(folder) / "test", "cmn", "test", recipe.test_clips, recipe.test_people)
        foreign = _clips(out, Path(folder) / "yue", "yue", "test", recipe.test_clips, recipe.test_people)
        _train(model, train, recipe, on_step)
        model.half().save_pretrained(out)
        model = WhisperForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
        rates = _score(model, tokenizer, test)
        abroad = _score(model, tokenizer, foreign)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    card = _card(recipe, parameters, rates, abroad, time.monotonic() - started)
    (out / "README.md").write_text(card, encoding="utf-8")
    return rates


def _clips(model: Path, folder: Path, dialect: str, split: str, clips: int, people: int) -> list[Clip]:
    synthetic.write_corpus(folder / "in", dialect=dialect, split=split, clips=clips, people=people, seed=7)
    index = prepare(folder / "in", folder / "out", Settings(str(model), dialect=dialect, clips_per_shard=250))
    return [clip for shard in index.shards for clip in read_shard(folder / "out" / shard.file).clips]


def _train(
    model: WhisperForConditionalGeneration,
    clips: list[Clip],
    recipe: Recipe,
    on_step: Callable[[int, int, float], None] | None,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def scale(step: int) -> float:
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        progress = (step - recipe.warmup_steps) / max(recipe.steps - recipe.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    batches = sample_batches(len(clips), recipe.batch_size, recipe.seed.to_bytes(8, "big"))
    model.train()
    for step in range(recipe.steps):
        chosen = [clips[index] for index in next(batches)]
        batch = collate(chosen, WINDOW_SECONDS * 100, model.config.pad_token_id)
        total, tokens = token_losses(model, batch)
        loss = total / tokens
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step + 1, recipe.steps, float(loss.detach()))


def _score(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, clips: list[Clip]) -> ErrorRates:
    wanted = [tokenizer.decode(clip.tokens, skip_special_tokens=True) for clip in clips]
    return error_rates(wanted, transcribe(model, tokenizer, clips, WINDOW_SECONDS * 100))


def _card(recipe: Recipe, parameters: int, rates: ErrorRates, abroad: ErrorRates, seconds: float) -> str:
    return f"""---
license: apache-2.0
language: zh
pipeline_tag: automatic-speech-recognition
---
# A small Whisper for demonstrations

{parameters:,} parameters, a window of {WINDOW_SECONDS} s, trained from scratch on **synthetic** Mandarin: phrases
such as 我想喝水 and 帮我开灯 and strings of digits, spoken by espeak-ng. It exists so that p2pasr's demo and tests
can adapt a real Whisper without a download. It does not recognise people.

Made by `p2pasr demo make-base`: {recipe.clips:,} clips of {recipe.people} synthetic speakers, {recipe.steps:,} steps of
{recipe.batch_size}, AdamW with a peak learning rate of {recipe.learning_rate:g}, seed {recipe.seed}, {seconds:.0f} s on
{torch.get_num_threads()} CPU threads; saved as float16.

| test set (speakers not in training) | clips | CER |
|---|---|---|
| Mandarin | {rates.clips} | {rates.cer:.1%} |
| Cantonese, never heard in training | {abroad.clips} | {abroad.cer:.1%} |
"""
