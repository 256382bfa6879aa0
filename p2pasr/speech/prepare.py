"""Turn a folder of recordings into shards: `p2pasr data prepare`."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import blob_digest
from p2pasr.speech.audio import ClipLimits, RefusedClip, read_clip
from p2pasr.speech.mel import log_mel
from p2pasr.speech.pretrained import Frontend, frontend
from p2pasr.speech.shards import Clip, Features, pack_shard, speaker_hash
from p2pasr.speech.text import label_ids
from p2pasr.speech.variants import variant

INDEX = "index.json"
MAX_DIALECT = 64
"""Letters of a dialect's code; manifests take no more."""

INDEX_FORMAT = "p2pasr-shards/1"
SALT = "speaker-salt"
SALT_BYTES = 32
POOL_FROM_JOBS = 4
"""With fewer shards than this, starting worker processes takes longer than they save."""

AUDIO_COLUMNS = ("audio", "file_name", "path")
TEXT_COLUMNS = ("text", "transcription", "sentence")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")

_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
"""What is left of a character outside the basic plane when JSON that escapes it is cut in its middle."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the input: a recording and what is said in it."""

    number: int
    audio: str
    text: str
    speaker: str
    dialect: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that did not enter a shard, and why."""

    row: int
    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard in the index of a folder of shards.

    Attributes:
        longest: seconds of its longest clip; None where it has no clips.
    """

    digest: str
    bytes: int
    clips: int
    seconds: float
    dialect: str
    longest: float | None = None

    @property
    def file(self) -> str:
        """Name of the shard's file in its folder."""
        return f"{self.digest}.safetensors"


@dataclass(frozen=True, slots=True)
class Settings:
    """How recordings become shards.

    Attributes:
        model: the Whisper model whose features and tokens are wanted, a folder or a hub id.
        dialect: dialect code of rows that name none.
        window_seconds: a window shorter than the model's own; None for its whole.
        clips_per_shard: clips in a shard, refused ones included.
        strict: stop at the first clip that is refused.
        variants: variants of each recording that are made besides it, see :mod:`p2pasr.speech.variants`.
    """

    model: str
    dialect: str = "cmn"
    revision: str | None = None
    window_seconds: float | None = None
    clips_per_shard: int = 64
    strict: bool = False
    variants: int = 0


@dataclass(slots=True)
class ShardIndex:
    """What a folder of shards holds; kept as `index.json` beside them.

    Attributes:
        model, features: what the shards were prepared for; "" and None where a task of one's own reads them.
    """

    model: str
    features: Features | None
    shards: list[ShardEntry] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    done: dict[str, list[str]] = field(default_factory=dict)
    """Digest of a batch of input rows → the shard made of it, so that work resumes where it stopped."""

    @property
    def seconds(self) -> float:
        """Seconds of audio in all shards."""
        return sum(shard.seconds for shard in self.shards)

    @property
    def clips(self) -> int:
        """Clips in all shards."""
        return sum(shard.clips for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write the index, replacing the old one in one step."""
        content = {"format": INDEX_FORMAT, **asdict(self)}
        _write_atomically(folder / INDEX, json.dumps(content, ensure_ascii=False, indent=1).encode())


def read_index(folder: Path) -> ShardIndex:
    """Read the index of a folder of shards.

    Raises:
        LocalError: there is none, or it is not one of ours.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != INDEX_FORMAT:
            raise ValueError(f"its format is not {INDEX_FORMAT}")
        index = ShardIndex(
            model=content["model"],
            features=None if content["features"] is None else Features(**content["features"]),
            shards=[ShardEntry(**entry) for entry in content["shards"]],
            refused=[Refusal(**entry) for entry in content["refused"]],
            done=content["done"],
        )
        if (index.features is None) != (index.model == ""):
            raise ValueError("it names a model and no features, or the reverse")
        listed = {shard.digest for shard in index.shards}
        if not all(listed.issuperset(digests) for digests in index.done.values()):
            raise ValueError("it names shards that it does not list")
        return index
    except FileNotFoundError as error:
        raise LocalError(f"{folder} holds no shards: make them with p2pasr data prepare IN --out {folder}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LocalError(f"{path} is damaged ({error}); delete it and run p2pasr data prepare again") from error


def prepare(
    source: Path, out: Path, settings: Settings, on_progress: Callable[[int, int], None] | None = None
) -> ShardIndex:
    """Make shards of every recording listed in `source`.

    Uses all cores. What an earlier, interrupted call finished is kept, as long as the recordings,
    transcripts and settings are the same.

    Args:
        source: a folder with `labels.json` (a list of {"audio", "text"} with optional "speaker" and
            "dialect") or `metadata.csv` with the same columns; audio paths are relative to it.
        out: folder for the shards and their index.
        on_progress: called with (rows done, rows in all).

    Raises:
        LocalError: nothing to read, nothing usable, or with `strict` the first refused clip.
    """
    if not 0 < len(settings.dialect) <= MAX_DIALECT:
        raise LocalError(
            f"--dialect is {settings.dialect!r:.70}: use a code of up to {MAX_DIALECT} letters, such as yue"
        )
    rows = read_rows(source, settings.dialect)
    out.mkdir(parents=True, exist_ok=True)
    part = frontend(settings.model, settings.revision, settings.window_seconds)
    features = Features(int(part.extractor.feature_size), part.window_seconds, part.vocabulary)
    previous = read_index(out) if (out / INDEX).is_file() else None
    index = ShardIndex(settings.model, features)
    batches = _batches(rows, max(1, settings.clips_per_shard // (1 + settings.variants)))
    jobs = {_source_key(source, batch, features, settings.variants): batch for batch in batches}
    finished = 0
    if previous is not None and previous.features == features:
        finished = _keep_finished(previous, jobs, index, out, settings.strict)
    if on_progress is not None:
        on_progress(finished, len(rows))
    todo = {key: batch for key, batch in jobs.items() if key not in index.done}
    for key, made in _run(todo, source, out, settings):
        index.shards += made.shards
        index.refused += made.refused
        index.done[key] = [shard.digest for shard in made.shards]
        index.save(out)
        finished += len(jobs[key])
        if on_progress is not None:
            on_progress(finished, len(rows))
    order = {digest: position for position, key in enumerate(jobs) for digest in index.done[key]}
    index.shards.sort(key=lambda shard: order[shard.digest])
    index.refused.sort(key=lambda refusal: refusal.row)
    index.save(out)
    if not index.shards:
        first = index.refused[0]
        raise LocalError(
            f"none of the {len(rows)} recordings in {source} can be used; row {first.row}, {first.file}: {first.reason}"
        )
    return index


def read_rows(source: Path, dialect: str) -> list[Row]:
    """Read `labels.json` or `metadata.csv`.

    Raises:
        LocalError: neither exists, or it has no rows, or columns are missing.
    """
    labels, table = source / "labels.json", source / "metadata.csv"
    if labels.is_file():
        path, entries = labels, _read_labels(labels)
    elif table.is_file():
        path, entries = table, _read_table(table)
    else:
        raise LocalError(f"{source} holds neither labels.json nor metadata.csv")
    if not entries:
        raise LocalError(f"{path} lists no recordings")
    return [_row(path, number, entry, dialect) for number, entry in enumerate(entries, start=1)]


def _read_labels(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise LocalError(f"{path} is not JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise LocalError(f'{path} must hold a list such as [{{"audio": "audio/001.wav", "text": "我想喝水"}}]')
    return entries


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise LocalError(f"{path} is not a table in UTF-8 ({error}); save it again as CSV UTF-8") from error


def _row(path: Path, number: int, entry: dict[str, Any], dialect: str) -> Row:
    def column(names: tuple[str, ...], default: str | None = None) -> str:
        for name in names:
            if isinstance(value := entry.get(name), str | int):
                return str(value).strip()
        if default is None:
            there = ", ".join(repr(name) for name, value in entry.items() if name and value is not None)
            raise LocalError(
                f"{path}, row {number}: there is no {' or '.join(map(repr, names))}, only {there or 'an empty row'}"
            )
        return default

    row = Row(
        number=number,
        audio=column(AUDIO_COLUMNS),
        text=column(TEXT_COLUMNS),
        speaker=column(SPEAKER_COLUMNS, ""),
        dialect=column(("dialect",), dialect) or dialect,
    )
    if _HALF_CHARACTER.search("".join((row.audio, row.text, row.speaker, row.dialect))):
        raise LocalError(f"{path}, row {number}: it holds half of a character (a lone surrogate); write it again")
    return row


def _batches(rows: list[Row], size: int) -> Iterator[tuple[Row, ...]]:
    """Cut the rows of each dialect, in their order, into shards' worth."""
    for dialect in dict.fromkeys(row.dialect for row in rows):
        of_dialect = [row for row in rows if row.dialect == dialect]
        for start in range(0, len(of_dialect), size):
            yield tuple(of_dialect[start : start + size])


def _source_key(source: Path, batch: tuple[Row, ...], features: Features, variants: int) -> str:
    stamps = [(asdict(row), _stamp(source / row.audio)) for row in batch]
    made = [variants] if variants else []  # so that folders that were prepared before there were any go on
    return blob_digest(json.dumps([stamps, asdict(features), *made]).encode()).hex()


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, by which a change is noticed; None if there is no such file."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


def _keep_finished(
    previous: ShardIndex, jobs: dict[str, tuple[Row, ...]], index: ShardIndex, out: Path, strict: bool
) -> int:
    """Move what an earlier call finished into `index`; returns how many rows that covers.

    With `strict`, only batches of which nothing was refused: the others are read again, to stop there.
    """
    entries = {shard.digest: shard for shard in previous.shards}
    rows = 0
    for key, digests in previous.done.items():
        if key not in jobs:
            continue
        numbers = {row.number for row in jobs[key]}
        shards = [entries[digest] for digest in digests]
        refused = [refusal for refusal in previous.refused if refusal.row in numbers]
        if (strict and refused) or not all((out / shard.file).is_file() for shard in shards):
            continue
        index.shards += shards
        index.refused += refused
        index.done[key] = digests
        rows += len(jobs[key])
    return rows


@dataclass(frozen=True, slots=True)
class _Made:
    shards: list[ShardEntry]
    refused: list[Refusal]


def _run(todo: dict[str, tuple[Row, ...]], source: Path, out: Path, settings: Settings) -> Iterator[tuple[str, _Made]]:
    salt = salt_of(out)
    workers = min(len(os.sched_getaffinity(0)), len(todo))
    if len(todo) < POOL_FROM_JOBS or workers < 2:
        for key, batch in todo.items():
            yield key, _make_shard(batch, source, out, settings, salt)
        return
    # Not forked: a parent that has loaded torch holds threads and locks that a fork would copy.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {key: pool.submit(_make_shard, batch, source, out, settings, salt) for key, batch in todo.items()}
        try:
            for key, future in futures.items():  # in the input's order, so that the first error is always the same
                yield key, future.result()
        except BrokenProcessPool as error:
            raise LocalError(
                "a process that made shards was killed, perhaps for want of memory; run the command again to go on"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _make_shard(batch: tuple[Row, ...], source: Path, out: Path, settings: Settings, salt: bytes) -> _Made:
    part = _frontend(settings.model, settings.revision, settings.window_seconds)
    features = Features(int(part.extractor.feature_size), part.window_seconds, part.vocabulary)
    clips: list[Clip] = []
    refused: list[Refusal] = []
    for row in batch:
        try:
            clips += _make_clips(row, source, part, salt, settings.variants)
        except RefusedClip as error:
            if settings.strict:
                raise LocalError(f"row {row.number}, {row.audio}: {error}") from error
            refused.append(Refusal(row.number, row.audio, str(error)))
    if not clips:
        return _Made([], refused)
    dialect = batch[0].dialect
    return _Made([write_shard(out, clips, dialect, pack_shard(clips, dialect, features))], refused)


def write_shard(out: Path, clips: Sequence[Clip], dialect: str, data: bytes) -> ShardEntry:
    """Write a shard's bytes under their digest, and say for an index what is in it."""
    entry = ShardEntry(
        digest=blob_digest(data).hex(),
        bytes=len(data),
        clips=len(clips),
        seconds=round(sum(clip.seconds for clip in clips), 3),
        dialect=dialect,
        longest=round(max(clip.seconds for clip in clips), 3),
    )
    _write_atomically(out / entry.file, data)
    return entry


def _make_clips(row: Row, source: Path, part: Frontend, salt: bytes, variants: int) -> list[Clip]:
    """The clip of a recording, and those of its variants."""
    if not row.text:
        raise RefusedClip("its transcript is empty")
    recording = read_clip(source / row.audio, ClipLimits(part.window_seconds))
    tokens = label_ids(part.tokenizer, row.text, row.dialect)
    longest = int(part.config.max_target_positions)
    if len(tokens) > longest:
        raise RefusedClip(f"its transcript is {len(tokens)} tokens long and the model writes at most {longest}")
    seeds = [f"{row.audio} {number}".encode() for number in range(variants)]
    return [
        Clip(
            mel=log_mel(audio, part.extractor),
            tokens=tuple(tokens),
            seconds=len(audio) / part.extractor.sampling_rate,
            speaker=speaker_hash(row.speaker, salt) if row.speaker else bytes(8),
        )
        for audio in (recording, *(variant(recording, seed, part.window_seconds) for seed in seeds))
    ]


@lru_cache(maxsize=1)
def _frontend(model: str, revision: str | None, window_seconds: float | None) -> Frontend:
    """A worker loads the frontend once for all of its shards, and uses one thread: all cores are busy."""
    import torch

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
    return frontend(model, revision, window_seconds)


def salt_of(out: Path) -> bytes:
    """The secret of a folder's speaker hashes and private names, 32 bytes; it stays here and enters no shard.

    Raises:
        LocalError: it is damaged.
    """
    path = out / SALT
    if not path.is_file():
        _write_atomically(path, secrets.token_bytes(SALT_BYTES), mode=0o600)
    salt = path.read_bytes()
    if len(salt) != SALT_BYTES:
        raise LocalError(f"{path} is damaged; delete it and {out / INDEX}, and all shards get new speaker hashes")
    return salt


def _write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    part = path.with_name(path.name + ".part")
    part.touch(mode)
    part.write_bytes(data)
    part.replace(path)
