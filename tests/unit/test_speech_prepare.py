"""A folder of recordings becomes a folder of shards; what was done once is not done again."""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from p2pasr.errors import LocalError
from p2pasr.speech.audio import SAMPLE_RATE
from p2pasr.speech.prepare import INDEX, SALT, Refusal, Settings, ShardIndex, prepare, read_index, read_rows
from p2pasr.speech.pretrained import Frontend
from p2pasr.speech.shards import Clip, read_shard

from .conftest import MODEL, recordings, tone

SETTINGS = Settings(MODEL, dialect="yue", clips_per_shard=2)

ROWS = [
    {"audio": "1.wav", "text": "我想喝水"},
    {"audio": "2.wav", "text": "开灯"},
    {"audio": "3.wav", "text": "关灯"},
    {"audio": "4.wav", "text": "帮我开门"},
    {"audio": "5.wav", "text": "一二三"},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five recordings, which make three shards."""
    return recordings(tmp_path / "in", ROWS)


def digests(index: ShardIndex) -> list[str]:
    return [shard.digest for shard in index.shards]


def clips(out: Path) -> list[Clip]:
    return [clip for shard in read_index(out).shards for clip in read_shard(out / shard.file).clips]


def texts(out: Path, base: Frontend) -> list[str]:
    return [base.tokenizer.decode(clip.tokens, skip_special_tokens=True) for clip in clips(out)]


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


# --- reading the rows ---------------------------------------------------------------------------


def test_every_recording_enters_a_shard_in_its_order(source: Path, tmp_path: Path, base: Frontend) -> None:
    index = prepare(source, tmp_path / "out", SETTINGS)

    assert texts(tmp_path / "out", base) == [row["text"] for row in ROWS]
    assert [shard.clips for shard in index.shards] == [2, 2, 1]
    assert index.clips == 5
    assert index.seconds == pytest.approx(3.0)
    assert [shard.longest for shard in index.shards] == [0.6] * len(index.shards)
    assert [shard.dialect for shard in index.shards] == ["yue"] * 3
    assert index.refused == []


def test_the_index_on_disk_is_the_one_returned(source: Path, tmp_path: Path) -> None:
    index = prepare(source, tmp_path / "out", SETTINGS)

    assert read_index(tmp_path / "out") == index
    assert (index.model, index.features.n_mels, index.features.window_seconds) == (MODEL, 80, 3.0)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {INDEX, SALT, *(shard.file for shard in index.shards)}


@pytest.mark.parametrize(
    "columns", [("audio", "text"), ("file_name", "transcription"), ("path", "sentence")], ids=" ".join
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_gives_the_same_shards_as_labels(
    source: Path, tmp_path: Path, columns: tuple[str, str], encoding: str
) -> None:
    wanted = digests(prepare(source, tmp_path / "labels", SETTINGS))
    (source / "labels.json").unlink()
    with (source / "metadata.csv").open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "a column of somebody else's"])
        writer.writerows([row["audio"], row["text"], "x"] for row in ROWS)

    assert digests(prepare(source, tmp_path / "table", SETTINGS)) == wanted


def test_spaces_after_the_commas_of_a_table_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('audio, text\n1.wav, "开灯, 关灯"\n', encoding="utf-8")

    assert [(row.audio, row.text) for row in read_rows(tmp_path, "yue")] == [("1.wav", "开灯, 关灯")]


def test_a_number_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('[{"audio": "1.wav", "text": 110, "speaker": 7}]', encoding="utf-8")

    assert [(row.text, row.speaker) for row in read_rows(tmp_path, "yue")] == [("110", "7")]


def test_labels_come_before_a_table(source: Path) -> None:
    (source / "metadata.csv").write_text("audio,text\nother.wav,别的\n", encoding="utf-8")

    assert [row.audio for row in read_rows(source, "yue")] == [row["audio"] for row in ROWS]


def test_rows_are_numbered_from_one_and_stripped(tmp_path: Path) -> None:
    rows = [
        {"audio": " 1.wav ", "text": " 开灯\n", "speaker": " mum ", "dialect": "hak"},
        {"audio": "2.wav", "text": "关灯", "dialect": ""},
    ]

    (tmp_path / "labels.json").write_text(json.dumps(rows), encoding="utf-8")

    first, second = read_rows(tmp_path, "yue")

    assert (first.number, first.audio, first.text, first.speaker, first.dialect) == (1, "1.wav", "开灯", "mum", "hak")
    assert (second.number, second.speaker, second.dialect) == (2, "", "yue")


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ("", "labels.json is not JSON"),
        ('[{"audio": "1.wav", "text": "水"}', "labels.json is not JSON"),
        ('{"audio": "1.wav"}', "must hold a list such as"),
        ('["1.wav"]', "must hold a list such as"),
        ("null", "must hold a list such as"),
        ("[]", "lists no recordings"),
        ('[{"text": "水"}]', "row 1: there is no 'audio' or 'file_name' or 'path'"),
        (
            '[{"audio": "1.wav", "text": "水"}, {"audio": "2.wav"}]',
            "row 2: there is no 'text' or 'transcription' or 'sentence', only 'audio'",
        ),
        (
            '[{"audio": "1.wav", "text": null}]',
            "row 1: there is no 'text' or 'transcription' or 'sentence', only 'audio'",
        ),
        ("[{}]", "row 1: there is no 'audio' or 'file_name' or 'path', only an empty row"),
        (r'[{"audio": "1.wav", "text": "\ud840"}]', "row 1: it holds half of a character"),
    ],
)
def test_labels_that_are_wrong_are_refused_with_the_place(tmp_path: Path, labels: str, sentence: str) -> None:
    (tmp_path / "labels.json").write_text(labels, encoding="utf-8")

    with pytest.raises(LocalError) as error:
        read_rows(tmp_path, "yue")
    assert sentence in str(error.value)
    assert str(tmp_path / "labels.json") in str(error.value)


def test_labels_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_bytes('[{"audio": "1.wav", "text": "喝水"}]'.encode("gb18030"))

    with pytest.raises(LocalError, match=r"labels\.json is not JSON"):
        read_rows(tmp_path, "yue")


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("", "lists no recordings"),
        ("audio,text\n", "lists no recordings"),
        ("audio\n1.wav\n", "row 1: there is no 'text' or 'transcription' or 'sentence'"),
        ("text\n水\n", "row 1: there is no 'audio' or 'file_name' or 'path'"),
        ("audio;text\n1.wav;水\n", "row 1: there is no 'audio' or 'file_name' or 'path', only 'audio;text'"),
        ("audio,text\n1.wav,水\n2.wav\n", "row 2: there is no 'text' or 'transcription' or 'sentence'"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_the_place(tmp_path: Path, table: str, sentence: str) -> None:
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")

    with pytest.raises(LocalError) as error:
        read_rows(tmp_path, "yue")
    assert sentence in str(error.value)
    assert str(tmp_path / "metadata.csv") in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "audio,text\n1.wav,喝水\n".encode("gb18030"),  # as Excel on Windows saves it
        "audio,text\n1.wav,喝水\n".encode("utf-16"),
        b"audio,text\n1.wav," + b"x" * 200_000,
    ],
    ids=["another encoding", "two bytes a character", "an endless field"],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metadata.csv").write_bytes(content)

    with pytest.raises(LocalError, match=r"metadata\.csv is not a table in UTF-8 \(.*; save it again as CSV UTF-8$"):
        read_rows(tmp_path, "yue")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"holds neither labels\.json nor metadata\.csv"):
        prepare(tmp_path, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"holds neither labels\.json nor metadata\.csv"):
        prepare(tmp_path / "missing", tmp_path / "out", SETTINGS)


# --- refusals -----------------------------------------------------------------------------------

FLAWED = replace(SETTINGS, clips_per_shard=6)


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """Two good recordings among ten that cannot be used."""
    folder = tmp_path / "flawed"
    folder.mkdir()
    soundfile.write(folder / "silent.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    soundfile.write(folder / "short.wav", tone(0.2), SAMPLE_RATE)
    soundfile.write(folder / "long.wav", tone(3.5), SAMPLE_RATE)
    (folder / "noise.wav").write_bytes(b"no recording")
    rows = [
        {"audio": "good.wav", "text": "喝水"},
        {"audio": "missing.wav", "text": "喝水"},
        {"audio": "silent.wav", "text": "喝水"},
        {"audio": "short.wav", "text": "喝水", "dialect": "cmn"},
        {"audio": "long.wav", "text": "喝水"},
        {"audio": "wordless.wav", "text": "  "},
        {"audio": "wordy.wav", "text": "水" * 44},
        {"audio": "noise.wav", "text": "喝水", "dialect": "cmn"},
        {"audio": "fine.wav", "text": "水" * 43, "dialect": "cmn"},
        {"audio": "timed.wav", "text": "<|0.00|>喝水<|0.50|>", "dialect": "cmn"},
        {"audio": "missing" * 50 + ".wav", "text": "喝水", "dialect": "cmn"},
        {"audio": "", "text": "喝水", "dialect": "cmn"},
    ]
    return recordings(folder, rows)


def test_refused_recordings_are_listed_by_row_file_and_reason(flawed: Path, tmp_path: Path) -> None:
    index = prepare(flawed, tmp_path / "out", FLAWED)

    noise = index.refused.pop(6)
    assert (noise.row, noise.file) == (8, "noise.wav")
    assert noise.reason.startswith("it cannot be decoded")
    assert index.refused == [
        Refusal(2, "missing.wav", "the file does not exist"),
        Refusal(3, "silent.wav", "it is silent"),
        Refusal(4, "short.wav", "0.20 s is shorter than 0.5 s"),
        Refusal(5, "long.wav", "it is longer than the window of 3 s"),
        Refusal(6, "wordless.wav", "its transcript is empty"),
        Refusal(7, "wordy.wav", "its transcript is 49 tokens long and the model writes at most 48"),
        Refusal(10, "timed.wav", "its transcript contains <|0.00|>, which the tokenizer reads as a special token"),
        Refusal(11, "missing" * 50 + ".wav", "it cannot be opened (File name too long)"),
        Refusal(12, "", "the file does not exist"),
    ]
    assert index.clips == 2


def test_the_index_on_disk_says_what_was_refused_without_a_path(flawed: Path, tmp_path: Path) -> None:
    index = prepare(flawed, tmp_path / "out", FLAWED)

    assert read_index(tmp_path / "out") == index
    assert str(tmp_path) not in (tmp_path / "out" / INDEX).read_text(encoding="utf-8")


def test_refused_recordings_keep_their_place_in_what_is_done(flawed: Path, tmp_path: Path) -> None:
    first = prepare(flawed, tmp_path / "out", FLAWED)
    calls: list[tuple[int, int]] = []

    second = prepare(flawed, tmp_path / "out", FLAWED, lambda done, total: calls.append((done, total)))

    assert second == first
    assert calls == [(12, 12)]


def test_strict_stops_at_the_first_refused_recording(flawed: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"^row 2, missing\.wav: the file does not exist$"):
        prepare(flawed, tmp_path / "out", replace(FLAWED, strict=True))


def test_strict_changes_nothing_where_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    strict = prepare(source, tmp_path / "strict", replace(SETTINGS, strict=True))

    assert digests(strict) == digests(prepare(source, tmp_path / "out", SETTINGS))


def test_strict_also_stops_where_an_earlier_call_was_lenient(flawed: Path, tmp_path: Path) -> None:
    prepare(flawed, tmp_path / "out", FLAWED)

    with pytest.raises(LocalError, match=r"row 2, missing\.wav"):
        prepare(flawed, tmp_path / "out", replace(FLAWED, strict=True))


def test_a_folder_without_one_usable_recording_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", [{"audio": f"missing-{n}.wav", "text": "水"} for n in range(3)])

    with pytest.raises(LocalError) as error:
        prepare(source, tmp_path / "out", SETTINGS)
    assert str(error.value) == (
        f"none of the 3 recordings in {source} can be used; row 1, missing-0.wav: the file does not exist"
    )


# --- dialects and speakers ----------------------------------------------------------------------


def test_a_shard_holds_one_dialect(tmp_path: Path, base: Frontend) -> None:
    spoken = ["yue", "en-us", "yue", "hak", "en-us", "yue"]
    rows = [{"audio": f"{n}.wav", "text": "水", "dialect": dialect} for n, dialect in enumerate(spoken)]

    index = prepare(recordings(tmp_path / "in", rows), tmp_path / "out", replace(SETTINGS, clips_per_shard=3))

    assert [(shard.dialect, shard.clips) for shard in index.shards] == [("yue", 3), ("en-us", 2), ("hak", 1)]
    token = base.tokenizer.convert_tokens_to_ids
    languages = [clip.tokens[1] for clip in clips(tmp_path / "out")]
    assert languages == [token("<|zh|>")] * 3 + [token("<|en|>")] * 2 + [token("<|zh|>")]


def test_a_dialect_that_the_model_has_no_token_for_stops_the_call(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", [{"audio": "1.wav", "text": "wasser", "dialect": "gsw"}])

    with pytest.raises(LocalError, match=r"no language token for dialect 'gsw'"):
        prepare(source, tmp_path / "out", SETTINGS)


def spoken_by(folder: Path, *names: str) -> Path:
    rows = [{"audio": f"{n}.wav", "text": "水", "speaker": name} for n, name in enumerate(names)]
    return recordings(folder, rows)


def test_the_salt_can_be_read_by_nobody_else(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", SETTINGS)

    salt = tmp_path / "out" / SALT
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert len(salt.read_bytes()) == 32


def test_speakers_have_other_hashes_in_another_folder_and_the_same_in_the_same(tmp_path: Path) -> None:
    source = spoken_by(tmp_path / "in", "mum", "dad", "mum", "")
    for out in ("one", "other"):
        prepare(source, tmp_path / out, SETTINGS)
    one = [clip.speaker for clip in clips(tmp_path / "one")]
    other = [clip.speaker for clip in clips(tmp_path / "other")]

    assert one[0] == one[2]
    assert len({*one, *other}) == 5
    assert one[3] == other[3] == bytes(8)
    assert (tmp_path / "one" / SALT).read_bytes() != (tmp_path / "other" / SALT).read_bytes()


def test_a_speaker_added_later_is_told_apart_by_the_same_salt(tmp_path: Path) -> None:
    prepare(spoken_by(tmp_path / "in", "mum"), tmp_path / "out", SETTINGS)
    before = clips(tmp_path / "out")[0].speaker

    prepare(spoken_by(tmp_path / "in", "mum", "dad"), tmp_path / "out", SETTINGS)

    after = [clip.speaker for clip in clips(tmp_path / "out")]
    assert after[0] == before != after[1]


def test_a_damaged_salt_is_not_used(tmp_path: Path) -> None:
    source = spoken_by(tmp_path / "in", "mum")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SALT).touch()  # hashes made with an empty one can be undone by trying names

    with pytest.raises(LocalError, match=r"speaker-salt is damaged; delete it and .*index\.json"):
        prepare(source, tmp_path / "out", SETTINGS)


# --- resuming -----------------------------------------------------------------------------------


Calls = list[tuple[int, int]]


def test_a_second_call_does_nothing_again(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "out", SETTINGS)
    before, calls = times(tmp_path / "out"), Calls()

    second = prepare(source, tmp_path / "out", SETTINGS, lambda done, total: calls.append((done, total)))

    assert second == first
    assert calls == [(5, 5)]
    assert times(tmp_path / "out") == before


def test_progress_counts_the_rows_shard_by_shard(source: Path, tmp_path: Path) -> None:
    calls = Calls()

    prepare(source, tmp_path / "out", SETTINGS, lambda done, total: calls.append((done, total)))

    assert calls == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_an_interrupted_call_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    wanted = digests(prepare(source, tmp_path / "whole", SETTINGS))

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", SETTINGS, interrupt)
    assert digests(read_index(tmp_path / "out")) == wanted[:1]
    before, calls = times(tmp_path / "out"), Calls()
    index = prepare(source, tmp_path / "out", SETTINGS, lambda done, total: calls.append((done, total)))

    assert digests(index) == wanted
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert before.items() <= times(tmp_path / "out").items()


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_deleted_shards_are_made_again_with_the_same_digests(source: Path, tmp_path: Path, gone: Sequence[int]) -> None:
    first = prepare(source, tmp_path / "out", SETTINGS)
    for number in gone:
        (tmp_path / "out" / first.shards[number].file).unlink()

    second = prepare(source, tmp_path / "out", SETTINGS)

    assert second == first
    assert {*times(tmp_path / "out")} == {shard.file for shard in first.shards}


def test_without_its_index_a_folder_is_made_again_with_the_same_digests(tmp_path: Path) -> None:
    source = spoken_by(tmp_path / "in", "mum", "dad", "mum")
    first = prepare(source, tmp_path / "out", SETTINGS)
    (tmp_path / "out" / INDEX).unlink()

    assert prepare(source, tmp_path / "out", SETTINGS) == first


def test_only_the_shard_of_a_changed_recording_is_made_again(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "out", SETTINGS)
    before = times(tmp_path / "out")
    soundfile.write(source / "3.wav", tone(0.7, hertz=900), SAMPLE_RATE)

    second = prepare(source, tmp_path / "out", SETTINGS)

    assert [a == b for a, b in zip(digests(first), digests(second), strict=True)] == [True, False, True]
    assert before.items() <= times(tmp_path / "out").items()
    assert second.seconds == pytest.approx(3.1)


def test_a_recording_changed_to_another_of_the_same_size_is_noticed(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "out", SETTINGS)
    stamp = (source / "1.wav").stat()
    soundfile.write(source / "1.wav", tone(0.6, hertz=900), SAMPLE_RATE)
    assert (source / "1.wav").stat().st_size == stamp.st_size
    os.utime(source / "1.wav", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))

    assert digests(prepare(source, tmp_path / "out", SETTINGS))[0] != digests(first)[0]


@pytest.mark.parametrize("change", [{"text": "关门"}, {"speaker": "mum"}, {"dialect": "cmn"}], ids=str)
def test_a_changed_row_is_noticed(source: Path, tmp_path: Path, change: dict[str, str]) -> None:
    first = prepare(source, tmp_path / "out", SETTINGS)
    recordings(source, [*ROWS[:4], {**ROWS[4], **change}])

    second = prepare(source, tmp_path / "out", SETTINGS)

    assert digests(second)[:2] == digests(first)[:2]
    assert digests(second)[2:] != digests(first)[2:]


def test_a_recording_that_came_late_is_taken_in(source: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:4], {"audio": "missing.wav", "text": "一"}]
    first = prepare(recordings(source, rows), tmp_path / "out", SETTINGS)
    soundfile.write(source / "missing.wav", tone(0.6), SAMPLE_RATE)

    second = prepare(source, tmp_path / "out", SETTINGS)

    assert ([r.file for r in first.refused], first.clips) == (["missing.wav"], 4)
    assert (second.refused, second.clips) == ([], 5)


def test_other_settings_make_other_shards(source: Path, tmp_path: Path) -> None:
    first = prepare(source, tmp_path / "out", SETTINGS)

    shorter = prepare(source, tmp_path / "out", replace(SETTINGS, window_seconds=1.0))
    fewer = prepare(source, tmp_path / "out", replace(SETTINGS, clips_per_shard=5))

    assert shorter.features.window_seconds == 1.0
    assert not {*digests(first)} & {*digests(shorter)}
    assert [shard.clips for shard in fewer.shards] == [5]
    assert read_index(tmp_path / "out") == fewer


def test_a_shorter_window_refuses_longer_recordings(source: Path, tmp_path: Path) -> None:
    soundfile.write(source / "1.wav", tone(1.2), SAMPLE_RATE)

    index = prepare(source, tmp_path / "out", replace(SETTINGS, window_seconds=1.0))

    assert index.refused == [Refusal(1, "1.wav", "it is longer than the window of 1 s")]


def test_worker_processes_make_the_same_shards_as_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, clips_per_shard=5)
    calls = Calls()
    together = prepare(corpus, tmp_path / "out", settings, lambda done, total: calls.append((done, total)))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / SALT).write_bytes((tmp_path / "out" / SALT).read_bytes())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})

    alone = prepare(corpus, tmp_path / "alone", settings)

    assert len(alone.shards) == 5
    assert together.shards == alone.shards
    assert calls[-1] == (24, 24)


def test_strict_stops_at_the_same_recording_however_many_processes_work(
    flawed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    with pytest.raises(LocalError, match=r"^row 2, missing\.wav: the file does not exist$"):
        prepare(flawed, tmp_path / "out", replace(FLAWED, clips_per_shard=1, strict=True))


def test_a_killed_worker_process_is_one_sentence(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledPool(ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: object) -> None:
            super().__init__(workers)

        def submit(self, *call: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr("p2pasr.speech.prepare.ProcessPoolExecutor", KilledPool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    with pytest.raises(LocalError, match=r"was killed, perhaps for want of memory; run the command again to go on"):
        prepare(corpus, tmp_path / "out", replace(SETTINGS, clips_per_shard=5))


# --- the index ----------------------------------------------------------------------------------


def test_a_folder_without_shards_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"holds no shards: make them with p2pasr data prepare IN --out "):
        read_index(tmp_path)


def damaged(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: "",
        lambda index: json.dumps(index)[:-10],
        lambda index: [index],
        lambda index: {**index, "format": "p2pasr-shards/0"},
        lambda index: {key: value for key, value in index.items() if key != "format"},
        lambda index: {key: value for key, value in index.items() if key != "done"},
        lambda index: {**index, "shards": [{"digest": "00"}]},
        lambda index: {**index, "features": None},
        lambda index: {**index, "refused": [1]},
    ],
)
def test_a_damaged_index_is_refused(source: Path, tmp_path: Path, change: Any) -> None:
    prepare(source, tmp_path / "out", SETTINGS)
    path = tmp_path / "out" / INDEX
    path.write_text(damaged(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")

    with pytest.raises(LocalError, match=r"index\.json is damaged .*; delete it and run p2pasr data prepare again"):
        read_index(tmp_path / "out")
    with pytest.raises(LocalError, match="is damaged"):
        prepare(source, tmp_path / "out", SETTINGS)


def test_an_index_that_names_a_shard_it_does_not_list_is_refused(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", SETTINGS)
    path = tmp_path / "out" / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**index, "shards": index["shards"][1:]}), encoding="utf-8")

    with pytest.raises(LocalError, match="is damaged"):
        prepare(source, tmp_path / "out", SETTINGS)


@pytest.mark.parametrize("dialect", ["", "x" * 65])
def test_a_dialect_that_no_manifest_takes_is_refused_before_anything_is_made(tmp_path: Path, dialect: str) -> None:
    with pytest.raises(LocalError, match="use a code of up to 64 letters"):
        prepare(tmp_path / "recordings", tmp_path / "shards", Settings("p2pasr/demo-base", dialect=dialect))
    assert not (tmp_path / "shards").exists()
