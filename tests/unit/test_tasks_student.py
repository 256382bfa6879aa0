"""Students: their shapes, what they start from, what a CTC head writes, and that one learns from nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    HubertConfig,
    HubertForCTC,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextEncoder

from p2pasr.errors import LocalError
from p2pasr.plan import measure, sketch
from p2pasr.protocol.manifest import RoundSection
from p2pasr.runs import shard_paths
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.pretrained import BUNDLED, weights_digest
from p2pasr.speech.shards import Clip, Features, pack_shard, read_shard
from p2pasr.speech.synthetic import write_corpus
from p2pasr.tasks import build, pin
from p2pasr.tasks.ctc import (
    SIZES,
    Alphabet,
    CtcConfig,
    CtcHeadConfig,
    CtcTask,
    ZipformerCtcConfig,
    encoder,
    standardised,
    text_of,
)
from p2pasr.tasks.encoders import ENCODERS
from p2pasr.tasks.student import (
    DistilWhisperTask,
    ScratchWhisperConfig,
    ScratchWhisperTask,
    StudentConfig,
    whisper_shape,
)
from p2pasr.tasks.whisper import pick_layers
from p2pasr.tasks.zipformer import ZipformerConfig, ZipformerForCTC

from .conftest import MODEL, plan, start_of
from .every_kind import CTC, DISTIL, STUDENT, ZIPFORMER

Shards = Sequence[Path]

SIZED = {"zipformer-ctc": ZIPFORMER}
"""Architectures whose configuration is none of layers, width and heads."""


def ctc(architecture: str) -> dict[str, Any]:
    """The configuration of a tiny student with a CTC head."""
    return {**SIZED.get(architecture, CTC), "architecture": architecture}


def tiny(architecture: str) -> Any:
    """An untrained encoder that hears 80 bands and knows 5 classes."""
    config = StudentConfig.model_validate(ctc(architecture)).root
    assert isinstance(config, CtcHeadConfig)
    return encoder(config, 80, 5).eval()


def student(shards: Shards, config: dict[str, Any], **options: Any) -> Any:
    """A student as a run would have it."""
    return build("student", pin("student", config, None, shards), seed=3, shards=shards, **options)


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model": MODEL}, "architecture"),
        ({"architecture": "zipformer", "model": MODEL}, "'transformer-ctc'"),
        ({**STUDENT, "architecture": "whisper", "heads": 5}, "width .32. must be a multiple of twice the heads .5."),
        ({**STUDENT, "architecture": "whisper", "freeze_encoder": True}, "an encoder that knows nothing"),
        ({**CTC, "architecture": "transformer-ctc", "width": 40}, "width: input should be a multiple of 16"),
        ({**CTC, "architecture": "transformer-ctc", "width": 48, "heads": 16}, "multiple of twice the heads"),
        ({**CTC, "architecture": "transformer-ctc", "pretrained": "x"}, "there is none for transformer-ctc"),
        ({**CTC, "architecture": "parakeet-ctc", "pretrained": "x"}, "brings its own layers, width and heads"),
        ({**CTC, "architecture": "hubert-ctc", "pretrained_weights": "0" * 64}, "pretrained, which is not given"),
        ({**CTC, "architecture": "hubert-ctc", "weights": "0" * 64}, "weights is of no use"),
        ({**ZIPFORMER, "pretrained": "x"}, "pretrained brings its own sizes"),
        ({**ZIPFORMER, "width": 32}, "width is not a known key"),
        ({**ZIPFORMER, "sizes": {"widths": [32, 48]}}, r"layers has 6 values for 2 stacks .widths."),
        ({**ZIPFORMER, "sizes": {"kernels": [31, 31, 15, 15, 15, 30]}}, "a kernel of 30 has no middle"),
        ({**ZIPFORMER, "sizes": {"channels": [8, 32]}}, "channels: .* at least 3 items"),
        ({**ZIPFORMER, "sizes": {"widths": [30] * 6}}, "multiple of 4"),
        ({**ZIPFORMER, "sizes": {"downsampling": [0] * 6}}, "greater than or equal to 1"),
        ({**CTC, "architecture": "hubert-ctc", "characters": "ba"}, "must ascend without repetition"),
        ({**CTC, "architecture": "hubert-ctc", "characters": "aa"}, "must ascend without repetition"),
        ({**CTC, "architecture": "hubert-ctc", "units": "bytes", "characters": "ab"}, "go with units: characters"),
        ({**DISTIL, "decoder_layers": [0, 2]}, r"the layers \[0, 2\] cannot be picked from the decoder's 2"),
        ({**DISTIL, "decoder_layers": [1, -1]}, "name each once, from 0 to 1"),
    ],
    ids=str,
)
def test_a_bad_configuration_gets_one_sentence(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence) as raised:
        build("student", {"characters": "ab", **config} if "units" in config else config, seed=1)
    assert "\n" not in str(raised.value)


def test_a_ctc_student_is_not_built_without_its_characters() -> None:
    with pytest.raises(LocalError, match="characters is not filled in; `p2pasr run new` takes them"):
        build("student", {**CTC, "architecture": "transformer-ctc"}, seed=1)


def test_characters_need_shards_to_be_taken_from() -> None:
    with pytest.raises(LocalError, match="hold no text"):
        pin("student", {**CTC, "architecture": "transformer-ctc"})


# --- shapes ---------------------------------------------------------------------------------------


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_whisper_student_has_73_million_parameters_by_default() -> None:
    config = ScratchWhisperConfig(architecture="whisper", model="openai/whisper-small")
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(whisper_shape(config, WhisperConfig(), 3000))
    assert (model.config.vocab_size, model.config.num_mel_bins) == (51_865, 80)
    assert parameters(model) == 72_593_920


@pytest.mark.parametrize(
    ("architecture", "millions"),
    [
        ("transformer-ctc", 162),
        ("parakeet-ctc", 111),
        ("wav2vec2-ctc", 94),
        ("hubert-ctc", 94),
        ("wav2vec2-bert-ctc", 586),
    ],
)
def test_the_default_ctc_students_are_of_the_documented_size(architecture: Any, millions: int) -> None:
    config = CtcConfig(architecture=architecture, model="openai/whisper-small")
    with torch.device("meta"):
        assert round(parameters(encoder(config, 80, 5001)) / 1e6) == millions


def test_a_zipformer_is_a_zipformer_s_by_default() -> None:
    config = ZipformerCtcConfig(architecture="zipformer-ctc", model="openai/whisper-small")
    with torch.device("meta"):
        assert round(parameters(encoder(config, 80, 5001)) / 1e6) == 23
        assert round(parameters(encoder(config, 80, 501)) / 1e6) == 22


def test_every_architecture_has_sizes() -> None:
    assert {*SIZES, *SIZED} == ENCODERS.keys()


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("frames", [3, 4, 17, 96, 97, 98, 99, 100])
def test_a_student_knows_how_many_logits_a_clip_gets(architecture: Any, frames: int) -> None:
    model = tiny(architecture)
    with torch.inference_mode():
        logits = model(torch.randn(1, frames, 80), torch.tensor([frames]))
    assert logits.shape == (1, model.time(frames), 5)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_padding_does_not_change_what_is_heard_of_a_clip(architecture: Any) -> None:
    torch.manual_seed(0)
    model = tiny(architecture)
    features = torch.randn(1, 96, 80)
    padded = torch.nn.functional.pad(features, (0, 0, 0, 64))
    with torch.inference_mode():
        alone = model(features, torch.tensor([96]))
        among = model(padded, torch.tensor([96]))[:, : alone.shape[1]]
    inner = slice(0, alone.shape[1] - 2)  # convolutions may look past the end
    torch.testing.assert_close(among[:, inner], alone[:, inner], rtol=1e-3, atol=1e-3)


# --- what is written ------------------------------------------------------------------------------

alphabets = st.text(min_size=1, max_size=20).map(lambda text: Alphabet("".join(sorted(set(text)))))


@given(alphabets, st.data())
def test_known_characters_are_written_back(alphabet: Alphabet, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from(alphabet.characters or "")))
    classes = alphabet.encode(text)
    assert all(0 < number < alphabet.size for number in classes)
    assert alphabet.decode(classes) == text
    assert not alphabet.unknown(text)


@given(alphabets, st.text())
def test_unknown_characters_are_left_out_and_named(alphabet: Alphabet, text: str) -> None:
    known = "".join(char for char in text if char in (alphabet.characters or ""))
    assert alphabet.decode(alphabet.encode(text)) == known
    assert set(alphabet.unknown(text)) == set(text) - set(known)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_write_every_text(text: str) -> None:
    assert Alphabet(None).decode(Alphabet(None).encode(text)) == text


@given(st.lists(st.integers(1, 256)))
def test_bytes_that_are_no_text_do_no_harm(classes: list[int]) -> None:
    assert isinstance(Alphabet(None).decode(classes), str)


def test_repeated_classes_and_blanks_are_no_characters(shard_files: Shards) -> None:
    task = student(shard_files, {**CTC, "architecture": "transformer-ctc"})
    clip = read_shard(shard_files[0]).clips[0]
    path = [0, 1, 1, 0, 1, 2, 2, 2, 0, 0]

    class Fixed(torch.nn.Module):
        def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor([[*path, 3, 3]]), task.alphabet.size).float()

        def time(self, frames: int) -> int:
            return len(path)

    task.model = Fixed()
    assert task.transcribe([clip]) == [task.alphabet.decode([1, 1, 2])]


def test_a_ctc_student_learns_the_scored_form_of_the_shards_characters(shard_files: Shards) -> None:
    task = student(shard_files, {**CTC, "architecture": "transformer-ctc"})
    texts = [text_of(clip, task.frontend.tokenizer) for path in shard_files for clip in read_shard(path).clips]
    assert task.config.characters == "".join(sorted(set("".join(texts))))
    assert [task.alphabet.decode(example.target) for example in task.examples(shard_files)] == texts


def test_held_out_shards_may_hold_characters_that_nobody_learned(shard_files: Shards) -> None:
    config = pin("student", {**CTC, "architecture": "transformer-ctc", "characters": "一"}, None, shard_files)
    task = build("student", config, seed=1)
    assert task.evaluate(None, shard_files)["clips"] == 24
    with pytest.raises(LocalError, match=r"holds characters that task.config.characters does not list"):
        build("student", config, seed=1, shards=shard_files)


# --- features and losses --------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(2, 300))
def test_features_have_no_mean_and_unit_variance_whatever_the_scale_of_logarithms(seed: int, frames: int) -> None:
    mel = np.random.default_rng(seed).normal(size=(8, frames)).astype(np.float32)
    out = standardised(mel)
    np.testing.assert_allclose(out.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(out.std(axis=1), 1, atol=1e-2)
    np.testing.assert_allclose(standardised(4 * mel - 3), out, atol=2e-3)


def test_a_band_of_silence_is_zero() -> None:
    assert not standardised(np.full((4, 9), -1.5, dtype=np.float16)).any()


def hasty(shard: Path, out: Path, kept: int) -> Path:
    """A shard in which all but the first few clips are cut to 60 ms."""
    made = read_shard(shard)
    clips = [
        clip if place < kept else Clip(clip.mel[:, :6], clip.tokens, clip.seconds)
        for place, clip in enumerate(made.clips)
    ]
    out.write_bytes(pack_shard(clips, made.dialect, made.features))
    return out


def test_clips_that_no_path_can_write_are_left_out_and_counted(shard_files: Shards, tmp_path: Path) -> None:
    shard = hasty(shard_files[0], tmp_path / "shard", kept=6)
    task = student([shard], {**CTC, "architecture": "transformer-ctc"})
    assert len(task.examples([shard])) == 6
    assert task.evaluate(None, [shard])["too_fast"] == 2
    _, report = task.segment(start_of(task), [shard], plan(steps=2, samples=6))
    assert np.isfinite(report.loss)


def test_a_shard_that_is_mostly_too_fast_is_refused(shard_files: Shards, tmp_path: Path) -> None:
    shard = hasty(shard_files[0], tmp_path / "shard", kept=3)
    with pytest.raises(LocalError, match="5 of 8 transcripts have more characters than transformer-ctc writes"):
        student([shard], {**CTC, "architecture": "transformer-ctc"})


def test_the_loss_is_that_of_each_clip_alone(shard_files: Shards) -> None:
    task = student(shard_files, {**STUDENT, "layers": 1, "architecture": "wav2vec2-bert-ctc", "dropout": 0.0})
    task.set_params(task.initial_params())
    task.model.eval()
    examples = task.examples(shard_files[:1])
    with torch.no_grad():
        together = float(task.loss(examples))
        apart = sum(float(task.loss([example])) for example in examples)
    assert together == pytest.approx(apart, rel=1e-3)


def test_shards_for_another_model_are_refused(shard_files: Shards, tmp_path: Path) -> None:
    made = read_shard(shard_files[0])
    other = tmp_path / "shard"
    other.write_bytes(pack_shard(made.clips, made.dialect, Features(80, 3.0, "00" * 32)))
    with pytest.raises(LocalError, match="was prepared for other features"):
        student([other], {**CTC, "architecture": "transformer-ctc"})


def test_masks_are_for_training_only(shard_files: Shards) -> None:
    blind = {"frequency_masks": 8, "frequency_bins": 80, "time_masks": 8, "time_share": 1.0, "time_frames": 3000}
    for config in (
        {**STUDENT, "layers": 1, "architecture": "transformer-ctc"},
        {**STUDENT, "architecture": "whisper", "encoder_layers": 1, "decoder_layers": 1},
    ):
        plain, masked = student(shard_files, config), student(shard_files, {**config, "spec_augment": blind})
        assert plain.evaluate(None, shard_files[:1]) == masked.evaluate(None, shard_files[:1])
        ends = [task.segment(start_of(task), shard_files, plan(steps=1))[1].loss for task in (plain, masked)]
        assert ends[0] != ends[1]


def short_of_memory(task: CtcTask, most: int) -> CtcTask:
    """The same task on a machine that has room for so many examples at once."""
    loss = task.loss

    def limited(examples: Sequence[Any]) -> torch.Tensor:
        total = loss(examples)
        if len(examples) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return total

    task.loss = limited  # type: ignore[method-assign]
    return task


def test_a_batch_that_is_trained_in_pieces_hides_the_same(shard_files: Shards) -> None:
    config = {**CTC, "architecture": "transformer-ctc", "dropout": 0.0}
    pieces = student(shard_files, {**config, "micro_batch": 2})
    wanted, _ = pieces.segment(start_of(pieces), shard_files, plan(steps=2, samples=8))
    task = short_of_memory(student(shard_files, config), 2)
    assert task.segment(start_of(task), shard_files, plan(steps=2, samples=8))[0].pack() == wanted.pack()


@pytest.mark.parametrize("architecture", ["transformer-ctc", "parakeet-ctc"])
def test_a_student_that_drops_out_is_not_cut_otherwise_than_the_run_says(
    architecture: str, shard_files: Shards
) -> None:
    task = short_of_memory(student(shard_files, {**CTC, "architecture": architecture}), 2)
    with pytest.raises(LocalError, match=r"start the run with task\.config\.micro_batch: 4"):
        task.segment(start_of(task), shard_files, plan(steps=1, samples=8))


@pytest.mark.parametrize("architecture", ENCODERS)
def test_a_students_memory_can_be_planned(architecture: str, shard_files: Shards) -> None:
    task = student(shard_files, {**ctc(architecture), "dropout": 0.0})
    sketched = sketch("student", task.config.model_dump(mode="json"))
    found = measure(task, sketched, shard_files, RoundSection(rounds=1, samples_per_step=4), steps=1)
    assert 0.8 < found.taken / found.planned < 1.25  # at this size what the loss takes on the CPU weighs


def test_running_statistics_are_neither_moved_nor_averaged(shard_files: Shards) -> None:
    task = student(shard_files, {**CTC, "architecture": "parakeet-ctc"})
    before = {name: buffer.clone() for name, buffer in task.model.named_buffers()}
    task.segment(start_of(task), shard_files, plan(steps=2))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in task.model.named_buffers())


# --- what students start from ---------------------------------------------------------------------


def test_a_whisper_student_takes_no_weights_of_the_model_that_it_names(shard_files: Shards, tmp_path: Path) -> None:
    without = tmp_path / "frontend"
    shutil.copytree(BUNDLED[MODEL], without)
    (without / "model.safetensors").unlink()
    config = {**STUDENT, "architecture": "whisper", "encoder_layers": 1, "decoder_layers": 1}
    task = build("student", pin("student", config, str(without)), seed=1, model=str(without), shards=shard_files)
    assert isinstance(task, ScratchWhisperTask)
    assert task.whisper.config.d_model == 32


def test_an_exported_whisper_student_writes_in_the_language_it_is_asked_for(
    shard_files: Shards, tmp_path: Path
) -> None:
    named = tmp_path / "named"
    shutil.copytree(BUNDLED[MODEL], named)
    settings = json.loads((named / "generation_config.json").read_text(encoding="utf-8"))
    (named / "generation_config.json").write_text(json.dumps({**settings, "alignment_heads": [[1, 0]]}))
    config = {**STUDENT, "architecture": "whisper", "model": str(named), "encoder_layers": 1, "decoder_layers": 1}
    task = student(shard_files, config)
    task.export(task.initial_params(), tmp_path / "out", {})
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    features = torch.randn(1, 80, 300)

    for language in ("zh", "en"):
        written = plain.generate(features, language=language, task="transcribe", return_dict_in_generate=True)
        start = [settings["decoder_start_token_id"], settings["lang_to_id"][f"<|{language}|>"]]
        assert written["sequences"][0, :2].tolist() == start
    assert getattr(plain.generation_config, "alignment_heads", None) is None


def test_a_whisper_student_of_a_model_that_says_nothing_of_languages_is_trained_all_the_same(
    shard_files: Shards, tmp_path: Path
) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(BUNDLED[MODEL], silent)
    (silent / "generation_config.json").unlink()
    config = {**STUDENT, "architecture": "whisper", "encoder_layers": 1, "decoder_layers": 1}
    ours, theirs = student(shard_files, config), student(shard_files, {**config, "model": str(silent)})
    assert theirs.initial_params().keys() == ours.initial_params().keys()
    assert all(np.array_equal(value, ours.initial_params()[name]) for name, value in theirs.initial_params().items())


def test_a_distilled_student_starts_as_the_teacher_with_fewer_layers(shard_files: Shards, tmp_path: Path) -> None:
    teacher = WhisperForConditionalGeneration(
        WhisperConfig.from_pretrained(BUNDLED[MODEL], decoder_layers=4, encoder_layers=1, dtype="float32")
    )
    shutil.copytree(BUNDLED[MODEL], tmp_path / "teacher")
    teacher.save_pretrained(tmp_path / "teacher")
    task = student(shard_files, {**DISTIL, "model": str(tmp_path / "teacher"), "decoder_layers": [0, 2, -1]})
    assert isinstance(task, DistilWhisperTask)
    theirs = teacher.model.decoder.layers
    for layer, place in zip(task.whisper.model.decoder.layers, (0, 2, 3), strict=True):
        assert torch.equal(layer.fc1.weight, theirs[place].fc1.weight)
    assert not any(name.startswith("model.encoder") for name in task.initial_params())

    task.export(task.initial_params(), tmp_path / "out", {})
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert plain.config.decoder_layers == len(plain.model.decoder.layers) == 3
    assert json.loads((tmp_path / "out" / "p2pasr.json").read_text(encoding="utf-8"))["decoder_layers"] == [0, 2, -1]
    features = torch.randn(1, 80, 300)
    ids = torch.tensor([[340, 341]])
    task.model.eval()
    with torch.no_grad():
        ours = task.model(input_features=features, decoder_input_ids=ids).logits
        assert torch.equal(plain(input_features=features, decoder_input_ids=ids).logits, ours)


def test_all_layers_kept_is_the_teacher() -> None:
    teacher = WhisperForConditionalGeneration.from_pretrained(BUNDLED[MODEL], dtype=torch.float32).eval()
    features, ids = torch.randn(1, 80, 300), torch.tensor([[340, 341]])
    with torch.no_grad():
        before = teacher(input_features=features, decoder_input_ids=ids).logits
        student = pick_layers(teacher, None, [0, 1])
        assert torch.equal(student(input_features=features, decoder_input_ids=ids).logits, before)


BODY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
CONV: dict[str, Any] = {"conv_dim": (24, 24), "conv_stride": (2, 2), "conv_kernel": (3, 3)}


def parakeet(mels: int = 80) -> ParakeetForCTC:
    body = ParakeetEncoderConfig(**BODY, subsampling_conv_channels=16, num_mel_bins=mels)
    return ParakeetForCTC(ParakeetCTCConfig(vocab_size=9, encoder_config=body.to_dict(), pad_token_id=8))


CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "parakeet-ctc": parakeet,
    "wav2vec2-ctc": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=9, **BODY, **CONV)),
    "hubert-ctc": lambda: HubertForCTC(HubertConfig(vocab_size=9, **BODY, **CONV)),
    "wav2vec2-bert-ctc": lambda: Wav2Vec2BertForCTC(Wav2Vec2BertConfig(vocab_size=9, **BODY)),
    "zipformer-ctc": lambda: ZipformerForCTC(ZipformerConfig(9, 80, ZIPFORMER["sizes"])),
}
"""Architecture → a little model such as a hub would have."""


@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_a_pretrained_student_keeps_all_but_what_is_new(architecture: str, shard_files: Shards, tmp_path: Path) -> None:
    torch.manual_seed(5)
    checkpoint = CHECKPOINTS[architecture]()
    checkpoint.save_pretrained(tmp_path)
    config = {"model": MODEL, "warmup_steps": 0, "architecture": architecture, "pretrained": str(tmp_path)}
    pinned = pin("student", config, None, shard_files)
    assert pinned["pretrained_weights"] == weights_digest(str(tmp_path))
    one, two = (build("student", pinned, seed=3, shards=shard_files) for _ in range(2))
    start = one.initial_params()
    assert all(value.tobytes() == two.initial_params()[name].tobytes() for name, value in start.items())
    theirs = {f"net.{name}": value.detach().numpy() for name, value in checkpoint.named_parameters()}
    new = [name for name in start if name not in theirs or start[name].shape != theirs[name].shape]
    assert all("head" in name or "feature_extractor" in name for name in new)
    kept = [name for name in start if name not in new]
    assert len(kept) > 10
    assert all(np.array_equal(start[name], theirs[name]) for name in kept)
    end, _ = one.segment(start_of(one), shard_files, plan(steps=2))
    assert end.pack() == two.segment(start_of(two), shard_files, plan(steps=2))[0].pack()

    parts = dict(checkpoint.named_parameters())
    with torch.no_grad():
        next(iter(parts.values())).add_(1)
    checkpoint.save_pretrained(tmp_path)
    with pytest.raises(LocalError, match="are not those this run was made with"):
        build("student", pinned, seed=3)


def test_a_checkpoint_of_another_architecture_is_refused(shard_files: Shards, tmp_path: Path) -> None:
    CHECKPOINTS["hubert-ctc"]().save_pretrained(tmp_path)
    config = {"model": MODEL, "architecture": "wav2vec2-bert-ctc", "pretrained": str(tmp_path)}
    with pytest.raises(LocalError, match=r"cannot be loaded|is no Wav2Vec2BertForCTC"):
        student(shard_files, config)


def test_a_checkpoint_that_hears_other_bands_is_refused(shard_files: Shards, tmp_path: Path) -> None:
    parakeet(mels=128).save_pretrained(tmp_path)
    config = {"model": MODEL, "architecture": "parakeet-ctc", "pretrained": str(tmp_path)}
    with pytest.raises(LocalError, match=r"hears 128 mel bands and the shards' features .* have 80"):
        student(shard_files, config)


def test_a_missing_checkpoint_is_one_sentence(shard_files: Shards) -> None:
    config = {"model": MODEL, "architecture": "parakeet-ctc", "pretrained": "nobody/nothing"}
    with pytest.raises(LocalError, match="nobody/nothing"):
        student(shard_files, config)


# --- export ---------------------------------------------------------------------------------------


def heard(task: CtcTask, clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised features of a clip, (1, frames, mels), and the student's logits."""
    features = torch.from_numpy(standardised(clip.mel)).T[None]
    task.model.eval()
    with torch.no_grad():
        return features, task.model(features, torch.tensor([features.shape[1]]))


def test_an_exported_transformer_gives_the_same_logits_through_plain_transformers(
    shard_files: Shards, tmp_path: Path
) -> None:
    task = student(shard_files, {**CTC, "architecture": "transformer-ctc"})
    task.export(task.initial_params(), tmp_path, {"round": 1})
    features, logits = heard(task, read_shard(shard_files[0]).clips[0])
    plain = Speech2TextEncoder.from_pretrained(tmp_path).eval()
    head = load_file(tmp_path / "ctc_head.safetensors")
    with torch.no_grad():
        hidden = plain(features, attention_mask=torch.ones(features.shape[:2], dtype=torch.long)).last_hidden_state
    torch.testing.assert_close(hidden @ head["weight"].T + head["bias"], logits)
    notes = json.loads((tmp_path / "p2pasr.json").read_text(encoding="utf-8"))
    assert (notes["blank"], notes["characters"]) == (0, task.config.characters)


def test_an_exported_parakeet_gives_the_same_logits_through_plain_transformers(
    shard_files: Shards, tmp_path: Path
) -> None:
    task = student(shard_files, {**CTC, "architecture": "parakeet-ctc"})
    task.export(task.initial_params(), tmp_path, {})
    features, logits = heard(task, read_shard(shard_files[0]).clips[0])
    plain = ParakeetForCTC.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = plain(features, attention_mask=torch.ones(features.shape[:2], dtype=torch.bool)).logits
    torch.testing.assert_close(theirs, logits)


def test_an_exported_wav2vec2_takes_its_front_end_from_the_same_file(shard_files: Shards, tmp_path: Path) -> None:
    task = student(shard_files, {**CTC, "architecture": "wav2vec2-ctc"})
    task.export(task.initial_params(), tmp_path, {})
    features, logits = heard(task, read_shard(shard_files[0]).clips[0])

    weights = load_file(tmp_path / "model.safetensors")
    plain = Wav2Vec2ForCTC.from_pretrained(tmp_path, ignore_mismatched_sizes=True).eval()
    prefix = "wav2vec2.feature_extractor.conv."
    conv = torch.nn.functional.conv1d(
        features.transpose(1, 2), weights[prefix + "weight"], weights[prefix + "bias"], stride=2
    )
    with torch.no_grad():
        hidden, _ = plain.wav2vec2.feature_projection(torch.nn.functional.gelu(conv).transpose(1, 2))
        theirs = plain.lm_head(plain.wav2vec2.encoder(hidden).last_hidden_state)
    torch.testing.assert_close(theirs, logits)


def test_an_exported_zipformer_gives_the_same_logits_from_its_folder(shard_files: Shards, tmp_path: Path) -> None:
    task = student(shard_files, ZIPFORMER)
    task.export(task.initial_params(), tmp_path, {})
    features, logits = heard(task, read_shard(shard_files[0]).clips[0])
    plain = ZipformerForCTC.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(plain(features).logits, logits)


# --- learning -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shards]:
    """Synthetic Mandarin: 240 clips of eight voices to learn from, 32 of four others to be scored on."""
    folder, files = tmp_path_factory.mktemp("spoken"), {}
    for split, clips, people in (("train", 240, 8), ("test", 32, 4)):
        write_corpus(folder / split, dialect="cmn", split=split, clips=clips, people=people)
        prepare(folder / split, folder / f"{split}-shards", Settings(MODEL, dialect="cmn"))
        files[split] = shard_paths(folder / f"{split}-shards")
    return files


LEARNERS: dict[str, tuple[dict[str, Any], int]] = {
    "transformer-ctc": ({"layers": 2, "width": 128, "heads": 4, "learning_rate": 2e-3, "warmup_steps": 40}, 160),
    "zipformer-ctc": (
        {
            "sizes": {
                "layers": [1, 1],
                "widths": [96, 128],
                "downsampling": [1, 2],
                "heads": [4, 4],
                "feedforwards": [192, 256],
                "kernels": [15, 15],
                "channels": [4, 8, 8],
            },
            "learning_rate": 4e-3,
            "warmup_steps": 20,
        },
        120,
    ),
}
"""Architecture → a shape that learns within half a minute, and the steps of 16 clips that it takes."""


@pytest.mark.parametrize("architecture", LEARNERS)
def test_a_student_learns_from_nothing_to_transcribe_voices_it_never_heard(
    architecture: str, spoken: dict[str, Shards]
) -> None:
    """Who writes nothing has a character error rate of 1; the Transformer came to 0.25 and the Zipformer to 0.32."""
    config, steps = LEARNERS[architecture]
    task = student(spoken["train"], {"model": MODEL, "architecture": architecture, "dropout": 0.0, **config})
    at = start_of(task)
    for number in range(4):
        part = plan(steps=steps // 4, samples=16, seed=number, first=steps // 4 * number, total=steps)
        at, _ = task.segment(at, spoken["train"], part)
    assert task.evaluate(None, spoken["test"])["cer"] > 0.9
    assert task.evaluate(at.params, spoken["test"])["cer"] < 0.65
