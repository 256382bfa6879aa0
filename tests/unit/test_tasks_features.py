"""Small models around a recogniser: each head learns from synthetic speech what it is then asked about strangers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2pasr.cli import app
from p2pasr.errors import LocalError
from p2pasr.plan import sketch
from p2pasr.runs import shard_paths
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.pretrained import file_digest
from p2pasr.speech.shards import read_shard
from p2pasr.speech.synthetic import ACTIONS, DIGITS, OPENINGS, write_corpus
from p2pasr.tasks import Checkpoint, build, pin
from p2pasr.tasks.features import FeaturesTask, load_features
from p2pasr.tasks.heads import UNKNOWN, Example, Sound, mel_of
from p2pasr.tasks.routing import Adapter, Router, choose, read_adapters
from p2pasr.tasks.text_heads import Guess

from .conftest import MODEL, plan, start_of

SMALL = {"width": 48, "layers": 2, "feedforward": 96}

SPELLING = {dialect: {char: [char] for char in "".join((*OPENINGS, *ACTIONS, DIGITS))} for dialect in ("cmn", "yue")}
"""Every character a phoneme of its own, so that no library is needed."""

SHARDS = dict[str, Sequence[Path]]


def dialects(folder: Path, split: str, clips: int, people: int) -> Sequence[Path]:
    """Shards of Mandarin and Cantonese by the same speakers, one a dialect."""
    rows = []
    for dialect in ("cmn", "yue"):
        labels = write_corpus(folder / "corpus", dialect=dialect, split=split, clips=clips, people=people)
        rows += json.loads(labels.read_text(encoding="utf-8"))
    labels.write_text(json.dumps(rows), encoding="utf-8")
    prepare(folder / "corpus", folder / "shards", Settings(MODEL, clips_per_shard=clips))
    return shard_paths(folder / "shards")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> SHARDS:
    """144 clips by 24 speakers to train on, 48 by six others."""
    folder = tmp_path_factory.mktemp("dialects")
    return {
        "train": dialects(folder / "train", "train", 72, 24),
        "test": dialects(folder / "test", "test", 24, 6),
    }


def made(heads: Sequence[str], shards: Sequence[Path], **config: Any) -> FeaturesTask:
    """A small task."""
    settings = {"model": MODEL, "heads": heads, "encoder": SMALL, "warmup_steps": 10, "learning_rate": 4e-3, **config}
    task = build("features", pin("features", settings, None, shards), seed=3, shards=shards)
    assert isinstance(task, FeaturesTask)
    return task


def learn(task: FeaturesTask, shards: Sequence[Path], steps: int) -> Checkpoint:
    """Train in segments of twenty steps."""
    at = start_of(task)
    for index in range(steps // 20):
        at, _ = task.segment(at, shards, plan(steps=20, samples=16, seed=index, first=20 * index, total=steps))
    return at


# --- learning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(spoken: SHARDS) -> tuple[FeaturesTask, Checkpoint]:
    """A model that was taught three things at once by 160 steps."""
    task = made(["accent", "vad", "masked"], spoken["train"], head_weights={"accent": 2.0})
    return task, learn(task, spoken["train"], 160)


@pytest.fixture(scope="module")
def scores(learned: tuple[FeaturesTask, Checkpoint], spoken: SHARDS) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Its scores before and after, on strangers."""
    task, end = learned
    return task.evaluate(None, spoken["test"]), task.evaluate(end.params, spoken["test"])


Scores = tuple[Mapping[str, Any], Mapping[str, Any]]


def test_the_accent_of_strangers_is_told(scores: Scores) -> None:
    before, after = (one["accent"] for one in scores)
    assert before["accuracy"] <= 0.7
    assert after["accuracy"] >= 0.8
    assert {spoken: sum(row.values()) for spoken, row in after["confusion"].items()} == {"cmn": 24, "yue": 24}
    right = sum(after["confusion"][dialect][dialect] for dialect in ("cmn", "yue"))
    assert right / after["clips"] == after["accuracy"]


def test_strangers_are_told_apart_by_their_voices(spoken: SHARDS) -> None:
    task = made(["speaker"], spoken["train"])
    end = learn(task, spoken["train"], 160)
    before, after = (task.evaluate(params, spoken["test"])["speaker"] for params in (None, end.params))
    assert after["same"] + after["different"] == 48 * 47 // 2
    assert after["same"] == 6 * 8 * 7 // 2
    assert after["eer"] <= 0.8 * before["eer"]


def test_speech_and_noise_are_found_better_than_by_loudness(scores: Scores) -> None:
    for sound in ("speech", "noise"):
        after = scores[1]["vad"][sound]
        assert after["eer"] <= 0.7 * after["eer_of_loudness"]
        assert 1 >= after["misses_at_1%"] >= after["misses_at_5%"] >= after["misses_at_20%"]
        assert after["misses_at_20%"] <= 0.1
        assert after["positions"] > 48 * 25


def test_masked_sound_is_guessed_from_what_is_around_it(scores: Scores) -> None:
    before, after = (one["masked"] for one in scores)
    assert after["l1"] <= 0.5 * before["l1"]
    assert after["l2"] <= 0.5 * before["l2"]


@pytest.fixture(scope="module")
def listening(spoken: SHARDS) -> tuple[FeaturesTask, Checkpoint]:
    """A model that was taught Mandarin phonemes and whether transcripts are right by 300 steps."""
    shards = spoken["train"][:1]
    settings = {"encoder": {**SMALL, "width": 64, "dropout": 0.0}, "text_layers": 1, "pronunciations": SPELLING}
    task = made(["confidence", "phoneme"], shards, **settings)
    return task, learn(task, shards, 300)


def test_wrong_transcripts_of_what_was_learned_are_told_by_listening(
    listening: tuple[FeaturesTask, Checkpoint], spoken: SHARDS
) -> None:
    task, end = listening
    scores = task.evaluate(end.params, spoken["train"][:1])["confidence"]
    assert scores["auroc"] >= 0.8
    assert scores["auroc_of_other_clips"] >= 0.85
    assert 0 < scores["ece"] < 0.3

    clips = read_shard(spoken["train"][0]).clips
    own = task.model.confidences(clips, [clip.tokens[4:-1] for clip in clips])
    others = task.model.confidences(clips, [clip.tokens[4:-1] for clip in (*clips[5:], *clips[:5])])
    assert np.mean(own) >= np.mean(others) + 0.3


def test_the_phonemes_of_strangers_are_recognised(listening: tuple[FeaturesTask, Checkpoint], spoken: SHARDS) -> None:
    task, end = listening
    before, after = (task.evaluate(params, spoken["test"][:1])["phoneme"] for params in (None, end.params))
    assert before["clips"] == after["clips"] == 24
    assert after["per"] <= 0.75 < before["per"]


def test_a_language_model_picks_better_guesses(spoken: SHARDS) -> None:
    task = made(["correction"], spoken["train"])
    end = learn(task, spoken["train"], 80)
    before, after = (task.evaluate(params, spoken["test"])["correction"] for params in (None, end.params))
    assert before["cer_before"] == after["cer_before"] > 0.2
    assert after["cer_after"] <= 0.7 * after["cer_before"]


def test_words_of_the_lexicon_and_a_recognisers_scores_decide_too(spoken: SHARDS) -> None:
    tokens = [read_shard(spoken["test"][0]).clips[index].tokens[4:-1] for index in (0, 1)]
    clip = read_shard(spoken["test"][0]).clips[0]
    plain = made(["correction"], spoken["train"])
    word = plain.model.heads["correction"].tokenizer.decode(tokens[1])
    favouring = made(["correction"], spoken["train"], lexicon=[word], lexicon_bonus=7.0)
    for task in (plain, favouring):
        task.set_params(task.initial_params())
        task.model.eval()
    guesses = [Guess(tokens[0], -1.0), Guess(tokens[1], -2.0)]
    one, two = plain.model.rescore(clip, guesses), favouring.model.rescore(clip, guesses)
    assert two == [one[0], pytest.approx(one[1] + 7.0)]
    unscored = plain.model.rescore(clip, [Guess(guess.tokens) for guess in guesses])
    assert one == [pytest.approx(unscored[0] - 1), pytest.approx(unscored[1] - 2)]


# --- export -------------------------------------------------------------------------------------


def test_an_export_decides_as_the_task_does_also_where_this_package_is_not(
    learned: tuple[FeaturesTask, Checkpoint], spoken: SHARDS, tmp_path: Path
) -> None:
    task, end = learned
    task.export(end.params, tmp_path, {"round": 3})
    clips = read_shard(spoken["test"][0]).clips[:3]
    model = load_features(tmp_path)
    task.model.eval()
    assert model.dialect_probabilities(clips) == task.model.dialect_probabilities(clips)
    assert load_file(tmp_path / "model.safetensors").keys() == task.trained.keys()

    program = torch.export.load(tmp_path / "model.pt2").module()
    sound = Sound.of([mel_of(clip) for clip in clips])
    decided = program(sound.mels, sound.frames)
    assert decided.keys() == {"accent", "vad", "masked"}
    shares = torch.tensor([list(row.values()) for row in model.dialect_probabilities(clips)])
    torch.testing.assert_close(decided["accent"].softmax(1), shares, atol=1e-4, rtol=1e-4)
    for row, activity, clip in zip(decided["vad"], model.activity(clips), clips, strict=True):
        assert activity.shape == (-(-clip.mel.shape[1] // 4), 2)
        torch.testing.assert_close(torch.sigmoid(row[: len(activity)]), activity, atol=1e-4, rtol=1e-4)


def test_a_folder_that_holds_no_feature_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="holds no model of the task features"):
        load_features(tmp_path)


def test_what_a_model_was_not_taught_it_does_not_answer(
    learned: tuple[FeaturesTask, Checkpoint], spoken: SHARDS
) -> None:
    clips = read_shard(spoken["test"][0]).clips[:1]
    with pytest.raises(LocalError, match="no head 'phoneme', only accent, vad, masked"):
        learned[0].model.phonemes(clips)


# --- a pretrained encoder -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(learned: tuple[FeaturesTask, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder."""
    folder = tmp_path_factory.mktemp("exported")
    learned[0].export(learned[1].params, folder, {})
    return folder


def test_training_starts_from_an_exported_encoder_and_from_heads_of_the_seed(exported: Path, spoken: SHARDS) -> None:
    held = load_file(exported / "model.safetensors")
    fresh = made(["vad", "masked"], spoken["train"])
    task = made(["vad", "masked"], spoken["train"], pretrained=str(exported))
    start = task.initial_params()

    assert task.config.pretrained_weights == file_digest(exported / "model.safetensors")
    assert start.keys() == fresh.initial_params().keys()
    for name, value in start.items():
        expected = held[name].numpy() if name.startswith("encoder.") else fresh.initial_params()[name]
        assert value.dtype == np.float32
        assert np.array_equal(value, expected)


def test_two_tasks_from_one_encoder_train_the_same_bits(exported: Path, spoken: SHARDS) -> None:
    one, other = (made(["vad"], spoken["train"], pretrained=str(exported)) for _ in range(2))
    ends = [task.segment(start_of(task), spoken["train"], plan())[0].pack() for task in (one, other, one)]

    assert ends[0] == ends[1] == ends[2]


def test_sound_that_was_masked_is_guessed_sooner_by_an_encoder_that_did_so_before(
    exported: Path, spoken: SHARDS
) -> None:
    losses = []
    for pretrained in (None, str(exported)):
        task = made(["masked"], spoken["train"], pretrained=pretrained)
        losses.append(task.segment(start_of(task), spoken["train"], plan(steps=20, samples=16))[1].loss)
    assert losses[1] < 0.95 * losses[0]


def test_a_sketch_of_a_pretrained_task_needs_no_weights(exported: Path, spoken: SHARDS) -> None:
    config = made(["vad"], spoken["train"], pretrained=str(exported)).config
    sketched = sketch("features", {**config.model_dump(mode="json"), "pretrained": "/nowhere"})

    assert sketched.initial_params() == {}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"pretrained_weights": "0" * 64}, r"pretrained_weights is the digest of pretrained, which is not given"),
        (
            {"pretrained": MODEL},
            r"^task\.config\.pretrained: 'p2pasr/demo-base' is an export of no task of kind features",
        ),
        ({"heads": ["correction"], "pretrained": "EXPORTED"}, r"names an encoder, and none of correction hears$"),
        (
            {"encoder": {**SMALL, "attention_heads": 2}, "pretrained": "EXPORTED"},
            r"has another form than task\.config\.encoder; give that width: 48, layers: 2, attention_heads: 4, feed",
        ),
    ],
)
def test_an_encoder_that_nothing_can_start_from_is_refused_before_a_run_is_made(
    exported: Path, spoken: SHARDS, config: dict[str, Any], sentence: str
) -> None:
    settings = {"heads": ["vad"], **config}
    if settings.get("pretrained") == "EXPORTED":
        settings["pretrained"] = str(exported)
    with pytest.raises(LocalError, match=sentence) as refused:
        made(settings.pop("heads"), spoken["train"], **settings)
    assert "\n" not in str(refused.value)


def test_an_encoder_of_other_sizes_or_other_bytes_is_refused_by_who_joins(
    exported: Path, spoken: SHARDS, tmp_path: Path
) -> None:
    pinned = made(["vad"], spoken["train"], pretrained=str(exported)).config.model_dump(mode="json")

    def joined(**changes: Any) -> None:
        build("features", {**pinned, **changes}, seed=3)

    with pytest.raises(
        LocalError, match=r"^the encoder in .* has other sizes than the run's; they come from task\.con"
    ):
        joined(encoder={**pinned["encoder"], "width": 32})
    with pytest.raises(LocalError, match=r"^the encoder in .* is not what this run was made with; get that version$"):
        joined(pretrained_weights="0" * 64)
    whole = load_file(exported / "model.safetensors")
    save_file({name: value.half() for name, value in whole.items()}, tmp_path / "model.safetensors")
    with pytest.raises(LocalError, match=r"has other sizes than the run's"):
        joined(pretrained=str(tmp_path), pretrained_weights=None)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LocalError, match=r"model\.safetensors is damaged \(.*\); get it again$"):
        joined(pretrained=str(tmp_path), pretrained_weights=None)


# --- what a manifest fixes ----------------------------------------------------------------------


def test_classes_come_from_the_runs_shards_in_their_order(spoken: SHARDS) -> None:
    config = made(["accent", "speaker"], spoken["train"]).config
    assert config.dialects == ("cmn", "yue")
    assert list(config.speakers) == sorted(
        {clip.speaker.hex() for path in spoken["train"] for clip in read_shard(path).clips}
    )
    assert len(config.speakers) == 24


def test_one_dialect_is_no_choice_and_another_one_is_not_among_the_classes(spoken: SHARDS) -> None:
    with pytest.raises(LocalError, match="needs at least 2 dialects"):
        made(["accent"], spoken["train"][:1])
    with pytest.raises(LocalError, match=r"it names hak, nan"):
        made(["accent"], spoken["train"], dialects=["hak", "nan"])


@pytest.mark.parametrize(
    ("heads", "sentence"), [([], "heads"), (["accent", "accent"], "named twice"), (["gender"], "heads")]
)
def test_heads_that_make_no_sense_are_refused(spoken: SHARDS, heads: list[str], sentence: str) -> None:
    with pytest.raises(LocalError, match=sentence):
        made(heads, spoken["train"])


def test_speakers_that_nobody_knows_are_not_learned(spoken: SHARDS) -> None:
    task = made(["speaker"], spoken["train"])
    task.set_params(task.initial_params())
    known, *_ = task.examples(spoken["train"])
    unknown = Example(known.clip, known.dialect, UNKNOWN)
    task.model.eval()
    torch.testing.assert_close(task.loss([known, unknown]), task.loss([known]), atol=1e-4, rtol=1e-4)
    assert task.loss([unknown]).item() == 0


def test_a_heads_weight_multiplies_its_loss(spoken: SHARDS) -> None:
    losses = []
    for weights in ({}, {"speaker": 3.0}):
        task = made(["speaker"], spoken["train"], head_weights=weights)
        task.set_params(task.initial_params())
        task.model.eval()
        losses.append(task.loss(task.examples(spoken["train"])[:4]).item())
    assert losses[1] == pytest.approx(3 * losses[0])


# --- routing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def router(
    learned: tuple[FeaturesTask, Checkpoint], spoken: SHARDS, tmp_path_factory: pytest.TempPathFactory
) -> Router:
    """The accent model before two adapters: one for Mandarin that changes nothing, and one that learned Cantonese."""
    folder = tmp_path_factory.mktemp("routing")
    (folder / "accent").mkdir()
    learned[0].export(learned[1].params, folder / "accent", {})
    for dialect, shard, steps in zip(("cmn", "yue"), spoken["train"], (0, 40), strict=True):
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        settings = {"model": MODEL, "rank": 8, "targets": targets, "warmup_steps": 5, "learning_rate": 5e-3}
        task = build("lora", pin("lora", settings), seed=1, shards=[shard])
        at = start_of(task)
        if steps:
            at, _ = task.segment(at, [shard], plan(steps=steps, samples=8, total=steps))
        out = folder / "adapters" / f"{dialect}-0.2"
        out.mkdir(parents=True)
        task.export(at.params, out, {"dialects": [dialect]})
    return Router(folder / "accent", folder / "adapters")


def test_the_adapter_chosen_by_ear_errs_less_than_none_and_no_less_than_the_right_one(
    router: Router, spoken: SHARDS
) -> None:
    scores = router.evaluate(spoken["test"])
    assert list(scores) == ["no adapter", "routed", "oracle"]
    assert scores["routed"]["accuracy"] >= 0.8
    assert scores["routed"]["cer"] <= 0.9 * scores["no adapter"]["cer"]
    assert scores["oracle"]["cer"] <= 0.85 * scores["no adapter"]["cer"]


def test_each_clip_is_transcribed_by_the_adapter_chosen_for_it(router: Router, spoken: SHARDS) -> None:
    clips = [clip for path in spoken["test"] for clip in read_shard(path).clips[:4]]
    choices = router.route(clips)
    mixed = router.transcribe(clips, choices)
    assert mixed == [router.transcribe([clip], [choice])[0] for clip, choice in zip(clips, choices, strict=True)]
    assert {choice.adapter.folder.name for choice in choices} == {"cmn-0.2", "yue-0.2"}
    assert all(f"{choice.dialect}-0.2" == choice.adapter.folder.name for choice in choices)


def test_the_command_says_what_was_chosen_for_a_recording_and_what_comes_of_it(
    router: Router, spoken: SHARDS, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = router.adapters[0].folder.parent.parent
    recording = sorted((spoken["test"][0].parents[1] / "corpus" / "audio").glob("yue*.wav"))[0]
    folders = ["--accent", str(folder / "accent"), "--adapters", str(folder / "adapters"), "--json"]
    app(["route", str(recording), *folders], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    clip = router.clip(recording)
    (choice,) = router.route([clip])
    assert said["dialect"] == choice.dialect
    assert said["adapter"] == str(choice.adapter.folder)
    assert said["text"] == router.transcribe([clip], [choice])[0]

    app(["route", "--shards", str(spoken["test"][0].parent), *folders], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == router.evaluate(spoken["test"])
    with pytest.raises(LocalError, match="either recordings or --shards"):
        app(["route", *folders], standalone_mode=False)
    with pytest.raises(LocalError, match="cannot be transcribed: the file does not exist"):
        app(["route", str(folder / "missing.wav"), *folders], standalone_mode=False)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.1, 0.2, 0.4]), min_size=1),
    st.sets(st.sampled_from("abcd")),
)
def test_the_likeliest_dialect_that_has_an_adapter_is_chosen(shares: dict[str, float], have: set[str]) -> None:
    adapters = [Adapter(Path(dialect), (dialect,), ("base", None, None, 3.0)) for dialect in sorted(have)]
    if not have & shares.keys():
        with pytest.raises(LocalError, match="none of the adapters"):
            choose(shares, adapters)
        return
    choice = choose(shares, adapters)
    assert choice.adapter.dialects == (choice.dialect,)
    assert choice.probability == shares[choice.dialect] == max(shares[dialect] for dialect in have & shares.keys())


@pytest.mark.parametrize(
    ("notes", "sentence"),
    [
        ([], "holds no folders with adapters"),
        ([None], "does not say what the adapter is for"),
        ([{"dialects": []}], "does not say what the adapter is for"),
        ([{"dialects": ["yue"]}, {"dialects": ["yue"]}], "are both for yue"),
        ([{"dialects": ["yue"]}, {"dialects": ["cmn"], "base_model": "other"}], "not adapters of one base"),
    ],
)
def test_folders_that_leave_no_clear_choice_are_refused(
    tmp_path: Path, notes: list[dict[str, Any] | None], sentence: str
) -> None:
    about = {"base_model": MODEL, "base_revision": None, "base_weights": None, "window_seconds": 3.0}
    for number, note in enumerate(notes):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
        if note is not None:
            (folder / "p2pasr.json").write_text(json.dumps({**about, **note}), encoding="utf-8")
    with pytest.raises(LocalError, match=sentence):
        read_adapters(tmp_path)
