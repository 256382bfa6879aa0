"""Labels by a teacher: they are what transformers computes, and what is not is found."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from p2pasr.demo import base as demo_base
from p2pasr.errors import LocalError
from p2pasr.speech.audio import RefusedClip
from p2pasr.speech.labels import SoftLabels, check_signature, signed_shard
from p2pasr.speech.prepare import ShardIndex, read_index, write_shard
from p2pasr.speech.pretrained import BUNDLED, Frontend
from p2pasr.speech.shards import Clip, Shard, pack_shard, read_shard
from p2pasr.tasks.labelling import LabelSettings, check_shards, check_transcript, label_shards
from p2pasr.tasks.teacher import Kept, Teacher, grouped, stacked
from p2pasr.tasks.whisper import collate

from .builders import make_identity
from .conftest import MODEL

WHO = make_identity(1)


@pytest.fixture(scope="module")
def teacher(shards: Path) -> Teacher:
    """The demo's model, for shards that were prepared for itself."""
    return Teacher(MODEL, read_index(shards).features, MODEL)


@pytest.fixture(scope="module")
def clips(shard_files: Sequence[Path]) -> list[Clip]:
    """Eight clips of one shard."""
    return list(read_shard(shard_files[0]).clips)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 128 mel bands and a token for Cantonese, as large-v3 has beside the others; untrained."""
    folder = tmp_path_factory.mktemp("models") / "large"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_base, "LANGUAGES", ("zh", "en", "yue"))
        tokenizer = demo_base.build_tokenizer()
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=128,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=200,
        max_target_positions=48,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=128, chunk_length=4).save_pretrained(folder)
    return folder


# --- distributions ------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 29))
def test_tokens_that_are_named_and_all_others_are_a_distribution(seed: int, width: int) -> None:
    logs = torch.randn(5, 30, generator=torch.Generator().manual_seed(seed)).mul(5).log_softmax(-1)
    ids = logs.topk(width).indices
    groups = grouped(logs, ids)

    assert groups.shape == (5, width + 1)
    assert torch.allclose(groups.exp().sum(-1), torch.ones(5), atol=1e-5)
    assert torch.equal(groups[:, :-1], logs.gather(-1, ids))


def test_labels_are_the_most_likely_tokens_of_the_plain_model(teacher: Teacher, clips: list[Clip]) -> None:
    plain = WhisperForConditionalGeneration.from_pretrained(BUNDLED[MODEL], dtype=torch.float32).eval()
    for clip in clips[:3]:
        batch = collate([clip], 300, plain.config.pad_token_id)
        with torch.no_grad():
            wanted = plain(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits[0]
        (logs,) = teacher.logs([teacher.hears(clip, "yue")])
        labels = teacher.label(logs, 10, Kept())
        values, ids = wanted.double().log_softmax(-1).topk(10)

        assert labels.ids.tolist() == ids.tolist()
        assert np.allclose(labels.logs, values.numpy(), atol=2e-3, rtol=2e-3)
        assert np.allclose(labels.rest, np.log1p(-values.exp().sum(-1).numpy()), atol=1e-3)


def test_more_tokens_keep_more_of_the_teacher(teacher: Teacher, clips: list[Clip]) -> None:
    (logs,) = teacher.logs(clips[:1])
    kept = []
    for width in (1, 4, 16, 64):
        kept.append(Kept())
        teacher.label(logs, width, kept[-1])

    assert all(one.mass < other.mass for one, other in itertools.pairwise(kept))
    assert all(one.gap > other.gap >= 0 for one, other in itertools.pairwise(kept))
    assert all(0 < one.mass_min <= one.mass / one.targets < 1.0001 for one in kept)
    assert kept[-1].bytes == kept[-1].targets * (64 * 6 + 4)
    assert kept[-1].full_bytes == kept[-1].targets * 2 * teacher.tokens


# --- folders ------------------------------------------------------------------------------------


def test_every_labelled_shard_is_its_shard_with_labels_and_a_signature(
    teacher: Teacher, shards: Path, labelled: Path, shard_files: Sequence[Path], labelled_files: Sequence[Path]
) -> None:
    assert len(labelled_files) == len(shard_files) == 3
    for before, after in zip(shard_files, labelled_files, strict=True):
        one, other = read_shard(before), read_shard(after)
        assert other.labelling is not None
        check_signature(after, other.labelling)
        assert (other.labelling.source, other.labelling.weights) == (before.stem, teacher.weights)
        assert other.labelling.name == MODEL
        assert (one.dialect, one.features) == (other.dialect, other.features)
        assert [c.tokens for c in one.clips] == [c.tokens for c in other.clips]
        assert all(a.mel.tobytes() == b.mel.tobytes() for a, b in zip(one.clips, other.clips, strict=True))
        assert all(c.labels is not None and len(c.labels.rest) == len(c.tokens) - 1 for c in other.clips)
    assert read_index(labelled).clips == read_index(shards).clips


def test_a_name_of_a_folder_does_not_go_into_shards(steady_base: Path, shards: Path) -> None:
    assert Teacher(str(steady_base), read_index(shards).features, MODEL).name == "steady"


def test_labelling_goes_on_where_it_stopped(
    teacher: Teacher, shards: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(labelled, out)
    (out / read_index(out).shards[1].file).unlink()
    asked: list[int] = []
    logs = Teacher.logs
    monkeypatch.setattr(Teacher, "logs", lambda self, heard: asked.append(len(heard)) or logs(self, heard))
    index, kept = label_shards(teacher, shards, out, LabelSettings(top_k=16), WHO)

    assert sum(asked) == 8
    assert kept.targets < sum(len(c.tokens) for e in index.shards for c in read_shard(out / e.file).clips)
    assert index == read_index(labelled) == read_index(out)
    label_shards(teacher, shards, out, LabelSettings(top_k=8), WHO)
    assert sum(asked) == 32


def test_labels_do_not_go_where_the_shards_are(teacher: Teacher, shards: Path) -> None:
    with pytest.raises(LocalError, match="name another folder"):
        label_shards(teacher, shards, shards, LabelSettings(), WHO)


def test_not_all_tokens_can_be_named(teacher: Teacher, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="cannot be named"):
        label_shards(teacher, shards, tmp_path, LabelSettings(top_k=teacher.tokens), WHO)


def test_clips_that_the_teacher_hears_otherwise_are_left_out(teacher: Teacher, shards: Path, tmp_path: Path) -> None:
    index, _ = label_shards(teacher, shards, tmp_path / "some", LabelSettings(max_cer=0.8), WHO)

    assert 0 < len(index.refused) < 24
    assert index.clips + len(index.refused) == 24
    assert all("against its transcript" in refusal.reason for refusal in index.refused)


def test_a_folder_of_which_no_clip_is_left_is_refused(large: Path, shards: Path, corpus: Path, tmp_path: Path) -> None:
    untrained = Teacher(str(large), read_index(shards).features, MODEL, recordings=corpus)
    with pytest.raises(LocalError, match=r"none of the 24 clips .* is left"):
        label_shards(untrained, shards, tmp_path, LabelSettings(max_cer=0.1), WHO)


@pytest.mark.parametrize(
    ("wanted", "heard", "max_cer", "good"),
    [
        ("我想喝水", "我想喝茶", 0.25, True),
        ("我想喝水", "我想喝茶", 0.24, False),
        ("我想喝水", "完全不同", None, True),
        ("我想喝水", "。", None, False),
        ("", "我想喝水", 0.1, True),
    ],
)
def test_a_transcript_is_near_enough_up_to_the_given_rate(
    wanted: str, heard: str, max_cer: float | None, good: bool
) -> None:
    if good:
        check_transcript(wanted, heard, max_cer)
    else:
        with pytest.raises(RefusedClip):
            check_transcript(wanted, heard, max_cer)


def test_a_student_may_learn_the_teachers_own_transcripts(
    teacher: Teacher, shards: Path, tmp_path: Path, base: Frontend
) -> None:
    index, _ = label_shards(teacher, shards, tmp_path, LabelSettings(pseudo_labels=True, top_k=4), WHO)
    for entry in index.shards:
        for clip in read_shard(tmp_path / entry.file).clips:
            assert clip.labels is not None
            assert len(clip.tokens) == len(clip.labels.ids) + 1
            text = clip.tokens[4:-1]
            assert list(text) == clip.labels.ids[3:-1, 0].tolist(), "greedy decoding is the likeliest at each place"
    assert check_shards(teacher, tmp_path, 1.0, 0.05, b"").differences == ()


# --- checking -----------------------------------------------------------------------------------


def relabelled(folder: Path, shard: Shard, number: int, labels: SoftLabels) -> Path:
    """A folder with one shard in which one clip's labels are others, signed by who made them up."""
    assert shard.labelling is not None
    cheat = make_identity(9)
    clips = [replace(clip, labels=labels) if i == number else clip for i, clip in enumerate(shard.clips)]
    labelling = replace(shard.labelling, peer=cheat.peer, signature="")
    data = signed_shard(pack_shard(clips, shard.dialect, shard.features, labelling), cheat)
    folder.mkdir(exist_ok=True)
    ShardIndex(MODEL, shard.features, [write_shard(folder, clips, shard.dialect, data)]).save(folder)
    return folder


def test_honest_labels_are_found_to_be_so(teacher: Teacher, labelled: Path) -> None:
    checked = check_shards(teacher, labelled, 1.0, 0.05, b"key")

    assert (checked.clips, checked.of, checked.differences) == (24, 24, ())


@pytest.mark.parametrize(("rate", "clips"), [(0.0, 3), (0.05, 3), (0.25, 6), (1.0, 24)])
def test_at_least_one_clip_of_each_shard_is_drawn(teacher: Teacher, labelled: Path, rate: float, clips: int) -> None:
    assert check_shards(teacher, labelled, rate, 0.05, b"key").clips == clips


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 7), place=st.integers(0, 99), how=st.sampled_from(["raise", "swap", "rest", "replace"]))
def test_labels_that_are_made_up_are_found_and_their_author_named(
    teacher: Teacher, labelled_files: Sequence[Path], tmp_path: Path, number: int, place: int, how: str
) -> None:
    shard = read_shard(labelled_files[0])
    old = shard.clips[number].labels
    assert old is not None
    new = SoftLabels(old.ids.copy(), old.logs.copy(), old.rest.copy())
    row = place % len(new.rest)
    if how == "raise":
        new.logs[row, place % 16] += 1
    elif how == "swap":
        new.ids[row, [0, 1]] = new.ids[row, [1, 0]]
    elif how == "rest":
        new.rest[row] -= 2
    else:
        new.ids[row, -1] = next(index for index in range(teacher.tokens - 1, 0, -1) if index not in new.ids[row])
    folder = relabelled(tmp_path / "false", shard, number, new)
    (difference,) = check_shards(teacher, folder, 1.0, 0.05, b"key").differences

    assert (difference.clip, difference.shard) == (number, read_index(folder).shards[0].file)
    assert difference.peer == make_identity(9).peer


def test_a_less_likely_token_in_place_of_a_likely_one_is_found_though_its_probability_is_right(
    teacher: Teacher, labelled_files: Sequence[Path], tmp_path: Path
) -> None:
    shard = read_shard(labelled_files[0])
    (logs,) = teacher.logs([teacher.hears(shard.clips[0], "yue")])
    order = logs.argsort(-1, descending=True)
    ids = torch.cat([order[:, 1:16], order[:, 40:41]], dim=-1)  # the likeliest hides among the others
    groups = grouped(logs, ids).numpy()
    made_up = SoftLabels(
        ids.numpy().astype(np.int32), groups[:, :-1].astype(np.float16), groups[:, -1].astype(np.float32)
    )
    folder = relabelled(tmp_path / "false", shard, 0, made_up)
    (difference,) = check_shards(teacher, folder, 1.0, 0.05, b"key").differences

    assert "leave out a token" in difference.reason


def test_labels_of_another_teacher_are_not_checked_against_this_one(
    large: Path, corpus: Path, labelled: Path, shards: Path
) -> None:
    other = Teacher(str(large), read_index(shards).features, MODEL, recordings=corpus)
    with pytest.raises(LocalError, match="another teacher"):
        check_shards(other, labelled, 1.0, 0.05, b"key")


def test_shards_without_labels_are_not_checked(teacher: Teacher, shards: Path) -> None:
    with pytest.raises(LocalError, match="no teacher's labels"):
        check_shards(teacher, shards, 1.0, 0.05, b"key")


# --- other vocabularies and features ------------------------------------------------------------


def test_a_teacher_with_other_mels_needs_the_recordings(large: Path, shards: Path) -> None:
    with pytest.raises(LocalError, match=r"takes 128 mel bands and the shards hold 80.*--recordings"):
        Teacher(str(large), read_index(shards).features, MODEL)


def test_a_teacher_that_hears_less_cannot_label(shards: Path) -> None:
    with pytest.raises(LocalError, match="hears 3 s at once, but the shards were prepared for 5 s"):
        Teacher(MODEL, replace(read_index(shards).features, window_seconds=5.0), MODEL)


def test_a_teacher_with_other_mels_and_tokens_labels_by_the_students_ids(
    large: Path, shards: Path, corpus: Path, tmp_path: Path, base: Frontend
) -> None:
    teacher = Teacher(str(large), read_index(shards).features, MODEL, recordings=corpus)
    index, kept = label_shards(teacher, shards, tmp_path, LabelSettings(top_k=16), WHO)
    own = WhisperTokenizer.from_pretrained(large)
    theirs = base.tokenizer
    plain = WhisperForConditionalGeneration.from_pretrained(large, dtype=torch.float32).eval()
    assert (index.clips, index.refused) == (24, [])
    assert own.convert_tokens_to_ids("<|0.00|>") == theirs.convert_tokens_to_ids("<|0.00|>") + 1

    shard = read_shard(tmp_path / index.shards[0].file)
    for clip in shard.clips[:3]:
        heard = teacher.hears(clip, "yue")
        names = own.convert_ids_to_tokens(list(heard.tokens))
        assert names[1] == "<|yue|>", "the teacher's own language token"
        assert names[:1] + names[2:] == [
            name for i, name in enumerate(theirs.convert_ids_to_tokens(list(clip.tokens))) if i != 1
        ]
        assert heard.mel.shape == (128, clip.mel.shape[1])
        batch = collate([heard], 400, plain.config.pad_token_id)
        with torch.no_grad():
            logits = plain(input_features=batch.features, decoder_input_ids=batch.decoder_input_ids).logits[0]
        assert clip.labels is not None
        for row, logs in enumerate(logits.log_softmax(-1)):
            ranked = [own.convert_ids_to_tokens(int(index)) for index in logs.argsort(descending=True)]
            wanted = [name for name in ranked if name != "<|yue|>"][:16]
            assert theirs.convert_ids_to_tokens(clip.labels.ids[row].tolist()) == wanted
    total = stacked(shard.clips[0].labels).exp().sum(-1)  # type: ignore[arg-type]
    assert torch.allclose(total, torch.ones(len(total)), atol=2e-3), "what cannot be named is in the rest"
    assert kept.mass_min < 1
    assert check_shards(teacher, tmp_path, 1.0, 0.05, b"key").differences == ()


def test_a_clip_of_no_recording_is_left_out(large: Path, shards: Path, corpus: Path, clips: list[Clip]) -> None:
    teacher = Teacher(str(large), read_index(shards).features, MODEL, recordings=corpus)
    with pytest.raises(RefusedClip, match="no recording"):
        teacher.hears(replace(clips[0], seconds=1.2345), "yue")
    with pytest.raises(RefusedClip, match="no recording"):
        teacher.hears(replace(clips[0], mel=clips[0].mel + np.float16(1)), "yue")


def test_a_transcript_with_a_token_that_the_teacher_lacks_is_left_out(
    large: Path, shards: Path, corpus: Path, clips: list[Clip]
) -> None:
    teacher = Teacher(str(large), read_index(shards).features, MODEL, recordings=corpus)
    teacher.from_student[clips[0].tokens[5]] = -1
    with pytest.raises(RefusedClip, match=f"token {clips[0].tokens[5]}, which the teacher does not have"):
        teacher.reads(clips[0].tokens, "yue")
    with pytest.raises(RefusedClip, match="token 70000, which"):
        teacher.reads((*clips[1].tokens, 70_000), "yue")
