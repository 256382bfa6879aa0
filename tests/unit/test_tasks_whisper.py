"""Batches, the loss and greedy decoding, checked against plain torch and transformers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperForConditionalGeneration

from p2pasr.speech.mel import restore
from p2pasr.speech.pretrained import BUNDLED, Frontend
from p2pasr.speech.shards import Clip, read_shard
from p2pasr.tasks.determinism import sample_batches
from p2pasr.tasks.whisper import IGNORED, Batch, collate, greedy, token_losses, transcribe

from .conftest import MODEL

FRAMES = 300


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    """The demo's model as transformers loads it."""
    return WhisperForConditionalGeneration.from_pretrained(BUNDLED[MODEL], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def clips(shard_files: Sequence[Path]) -> list[Clip]:
    """Sixteen clips of two shards."""
    return [clip for path in shard_files[:2] for clip in read_shard(path).clips]


def features(clips: Sequence[Clip]) -> torch.Tensor:
    return torch.from_numpy(np.stack([restore(clip.mel, FRAMES) for clip in clips]).astype(np.float32))


# --- batches ------------------------------------------------------------------------------------


@given(clips=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.binary(min_size=32, max_size=32))
def test_every_clip_is_drawn_once_before_any_is_drawn_again(clips: int, batch_size: int, seed: bytes) -> None:
    batches = list(itertools.islice(sample_batches(clips, batch_size, seed), 10))

    drawn = [index for batch in batches for index in batch]
    assert all(len(batch) == batch_size for batch in batches)
    for start in range(0, len(drawn) - clips + 1, clips):
        assert sorted(drawn[start : start + clips]) == list(range(clips))


def test_every_pass_has_an_order_of_its_own() -> None:
    first, second = itertools.islice(sample_batches(30, 30, bytes(32)), 2)

    assert first != second
    assert first == next(sample_batches(30, 30, bytes(32)))
    assert first != next(sample_batches(30, 30, bytes([1]) * 32))


def clip(tokens: Sequence[int], frames: int = 20) -> Clip:
    mel = np.full((80, frames), 0.5, np.float16)
    mel[:, -1] = 0.75
    return Clip(mel, tuple(tokens), frames / 100)


def test_the_decoder_reads_all_but_the_last_token_and_writes_all_but_the_first() -> None:
    batch = collate([clip([7, 1, 2, 9]), clip([7, 9])], FRAMES, pad_id=9)

    assert batch.decoder_input_ids.tolist() == [[7, 1, 2], [7, 9, 9]]
    assert batch.labels.tolist() == [[1, 2, 9], [9, IGNORED, IGNORED]]
    assert batch.labels.dtype == batch.decoder_input_ids.dtype == torch.int64


def test_the_token_that_ends_a_transcript_is_learned_although_it_also_pads() -> None:
    batch = collate([clip([7, 1, 9]), clip([7, 1, 1, 1, 9])], FRAMES, pad_id=9)

    assert (batch.labels == 9).sum() == 2
    assert (batch.labels == IGNORED).sum() == 2


def test_features_are_padded_to_the_window_with_each_clips_last_frame() -> None:
    batch = collate([clip([7, 9], frames=20), clip([7, 9], frames=FRAMES)], FRAMES, pad_id=9)

    assert batch.features.shape == (2, 80, FRAMES)
    assert batch.features.dtype == torch.float32
    assert (batch.features[0, :, :19] == 0.5).all()
    assert (batch.features[0, :, 19:] == 0.75).all()
    assert (batch.features[1, :, :-1] == 0.5).all()


# --- loss ---------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers(model: WhisperForConditionalGeneration, clips: list[Clip]) -> None:
    batch = collate(clips, FRAMES, model.config.pad_token_id)
    with torch.no_grad():
        total, tokens = token_losses(model, batch)
        theirs = model(
            input_features=batch.features, decoder_input_ids=batch.decoder_input_ids, labels=batch.labels
        ).loss

    assert tokens == sum(len(c.tokens) - 1 for c in clips)
    assert total.dtype == torch.float32
    assert float(total) / tokens == pytest.approx(float(theirs), rel=1e-5)


def test_the_loss_of_a_batch_is_the_sum_over_its_clips(
    model: WhisperForConditionalGeneration, clips: list[Clip]
) -> None:
    pad = model.config.pad_token_id
    with torch.no_grad():
        together, _ = token_losses(model, collate(clips, FRAMES, pad))
        alone = sum(float(token_losses(model, collate([c], FRAMES, pad))[0]) for c in clips)

    assert float(together) == pytest.approx(alone, rel=1e-4)


def test_a_batch_moves_to_a_device_as_a_whole(clips: list[Clip]) -> None:
    moved = collate(clips[:2], FRAMES, 0).to(torch.device("meta"))

    assert isinstance(moved, Batch)
    assert {t.device.type for t in (moved.features, moved.decoder_input_ids, moved.labels)} == {"meta"}


# --- decoding -----------------------------------------------------------------------------------


@torch.no_grad()
def slowly(model: WhisperForConditionalGeneration, clip: Clip) -> list[int]:
    """Greedy decoding of one clip without a cache: the whole text through the model for every token."""
    ids = list(clip.tokens[:4])
    while len(ids) < model.config.max_target_positions:
        logits = model(input_features=features([clip]), decoder_input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            return ids[4:-1]
    return ids[4:]


def test_greedy_decoding_takes_the_likeliest_token_each_time(
    model: WhisperForConditionalGeneration, clips: list[Clip]
) -> None:
    assert greedy(model, features(clips), clips[0].tokens[:4]) == [slowly(model, c) for c in clips]


def test_text_without_an_end_stops_at_the_models_longest(model: WhisperForConditionalGeneration) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 80, FRAMES)).astype(np.float32))
    end = model.config.eos_token_id
    model.config.eos_token_id = -1  # no token: nothing ends
    try:
        rows = greedy(model, noise, [340, 341, 344, 348])
    finally:
        model.config.eos_token_id = end

    assert [len(row) for row in rows] == [model.config.max_target_positions - 4] * 2


def test_transcripts_come_in_the_order_of_their_clips(
    model: WhisperForConditionalGeneration, base: Frontend, clips: list[Clip]
) -> None:
    english = base.tokenizer.convert_tokens_to_ids("<|en|>")
    mixed = [
        Clip(c.mel, (c.tokens[0], english, *c.tokens[2:]), c.seconds) if number % 3 == 0 else c
        for number, c in enumerate(clips)
    ]
    calls: list[tuple[int, int]] = []

    heard = transcribe(
        model, base.tokenizer, mixed, FRAMES, batch_size=4, on_progress=lambda done, total: calls.append((done, total))
    )

    wanted = [base.tokenizer.decode(slowly(model, c), skip_special_tokens=True).strip() for c in mixed]
    assert heard == wanted
    assert len({*heard}) > 4
    assert [total for _, total in calls] == [16] * len(calls)
    assert [done for done, _ in calls] == [4, 6, 10, 14, 16]


def test_transcribing_nothing_gives_nothing(model: WhisperForConditionalGeneration, base: Frontend) -> None:
    assert transcribe(model, base.tokenizer, [], FRAMES) == []
