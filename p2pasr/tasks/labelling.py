"""Label folders of shards with a teacher, and check labels that others made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.signing import Signer
from p2pasr.speech.audio import RefusedClip
from p2pasr.speech.labels import Labelling, check_signature, signed_shard
from p2pasr.speech.metrics import error_rates
from p2pasr.speech.prepare import INDEX, Refusal, ShardEntry, ShardIndex, read_index, write_shard
from p2pasr.speech.shards import Clip, Shard, check_digest, pack_shard, read_shard
from p2pasr.speech.text import label_ids, normalise
from p2pasr.tasks.base import OnProgress
from p2pasr.tasks.determinism import shuffled
from p2pasr.tasks.teacher import Kept, Teacher
from p2pasr.tasks.whisper import transcribe


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """How shards are labelled.

    Attributes:
        top_k: tokens that are named at each target.
        max_cer: leave out clips whose transcript by the teacher is further from theirs than this; None for none.
        pseudo_labels: learn the teacher's transcripts instead of the shards' own.
        batch_size: clips that go through the teacher at once.
    """

    top_k: int = 64
    max_cer: float | None = None
    pseudo_labels: bool = False
    batch_size: int = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """A clip whose labels are not the teacher's."""

    shard: str
    clip: int
    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What a spot check found: how many of how many clips it looked at, and what differs."""

    clips: int
    of: int
    differences: tuple[Difference, ...]


def label_shards(
    teacher: Teacher,
    source: Path,
    out: Path,
    settings: LabelSettings,
    signer: Signer,
    on_progress: OnProgress | None = None,
) -> tuple[ShardIndex, Kept]:
    """Write shards with a teacher's labels beside the clips, signed, and their index.

    Shards that an earlier, interrupted call labelled in the same way are kept.

    Args:
        source, out: folders of shards, which are two.
        signer: who labels.
        on_progress: called with (shards done, shards in all).

    Returns:
        The index, with the clips that were left out, and what the labels keep, of the shards labelled in this call.

    Raises:
        LocalError: the folders are one, a shard is damaged, or no clip is left.
    """
    index = read_index(source)
    if out.resolve() == source.resolve():
        raise LocalError(f"{out} holds the shards that are to be labelled; name another folder")
    named = int((teacher.to_student >= 0).sum())
    if settings.top_k >= named:
        raise LocalError(f"{settings.top_k} tokens cannot be named: teacher and student share {named}")
    out.mkdir(parents=True, exist_ok=True)
    previous = read_index(out) if (out / INDEX).is_file() else None
    made, kept = ShardIndex(index.model, teacher.features), Kept()
    for done, entry in enumerate(index.shards):
        if on_progress is not None:
            on_progress(done, len(index.shards))
        key = _key(entry, teacher, settings, signer)
        if previous is not None and _keep(previous, key, made, out, entry.file):
            continue
        check_digest(source / entry.file, entry.digest)
        clips, refused, of_shard = _labelled(teacher, read_shard(source / entry.file), entry, settings)
        made.refused += refused
        made.done[key] = []
        if clips:
            dialect, mass = entry.dialect, of_shard.mass / of_shard.targets
            labelling = Labelling(teacher.name, teacher.weights, entry.digest, mass, of_shard.mass_min, signer.peer)
            data = signed_shard(pack_shard(clips, dialect, teacher.features, labelling), signer)
            made.shards.append(write_shard(out, clips, dialect, data))
            made.done[key] = [made.shards[-1].digest]
            kept.add(of_shard)
        made.save(out)
    made.save(out)
    if not made.shards:
        raise LocalError(f"none of the {index.clips} clips in {source} is left; the first: {made.refused[0].reason}")
    return made, kept


def check_shards(
    teacher: Teacher, folder: Path, rate: float, tolerance: float, key: bytes, on_progress: OnProgress | None = None
) -> Checked:
    """Ask a teacher again about clips that are drawn by lot, and compare.

    Args:
        rate: how many of each shard's clips, 0 to 1, but at least one.
        tolerance: how far a log-probability may be off, for machines compute a little differently.
        key: what the draw follows from; whoever labels must not know it beforehand.
        on_progress: called with (shards done, shards in all).

    Raises:
        LocalError: a shard is damaged, unlabelled, not signed, or labelled by a teacher with other weights.
    """
    index = read_index(folder)
    differences: list[Difference] = []
    looked = 0
    for done, entry in enumerate(index.shards):
        if on_progress is not None:
            on_progress(done, len(index.shards))
        path = folder / entry.file
        check_digest(path, entry.digest)
        shard = read_shard(path)
        if shard.labelling is None:
            raise LocalError(f"the shard {path} holds no teacher's labels; make them with p2pasr distill label")
        check_signature(path, shard.labelling)
        if shard.labelling.weights != teacher.weights:
            raise LocalError(f"the shard {path} was labelled by {shard.labelling.name!r}, another teacher")
        count = max(1, round(rate * len(shard.clips)))
        for number in sorted(shuffled(len(shard.clips), key + bytes.fromhex(entry.digest))[:count]):
            reason = _difference(teacher, shard.clips[number], shard.dialect, tolerance)
            if reason is not None:
                differences.append(Difference(entry.file, number, shard.labelling.peer, reason))
            looked += 1
    return Checked(looked, index.clips, tuple(differences))


def _difference(teacher: Teacher, clip: Clip, dialect: str, tolerance: float) -> str | None:
    if clip.labels is None:
        return "it has no labels"
    try:
        (logs,) = teacher.logs([teacher.hears(clip, dialect)])
    except RefusedClip as error:
        return str(error)
    return teacher.differs(logs, clip.labels, tolerance)


@dataclass(frozen=True, slots=True)
class _Heard:
    """A clip of a shard, by its number, and what the teacher takes for it."""

    number: int
    clip: Clip
    heard: Clip


def _labelled(
    teacher: Teacher, shard: Shard, entry: ShardEntry, settings: LabelSettings
) -> tuple[list[Clip], list[Refusal], Kept]:
    """A shard's clips with labels, those that were left out, and what the labels keep."""
    found: list[_Heard] = []
    refused: list[Refusal] = []
    for number, clip in enumerate(shard.clips):
        try:
            found.append(_Heard(number, clip, teacher.hears(clip, shard.dialect)))
        except RefusedClip as error:
            refused.append(Refusal(number, entry.file, str(error)))
    if settings.max_cer is not None or settings.pseudo_labels:
        found = _well_heard(teacher, found, shard.dialect, entry, settings, refused)
    kept = Kept()
    size = settings.batch_size
    labels = [
        teacher.label(logs, settings.top_k, kept)
        for start in range(0, len(found), size)
        for logs in teacher.logs([each.heard for each in found[start : start + size]])
    ]
    clips = [replace(each.clip, labels=soft) for each, soft in zip(found, labels, strict=True)]
    return clips, refused, kept


def _well_heard(
    teacher: Teacher,
    found: Sequence[_Heard],
    dialect: str,
    entry: ShardEntry,
    settings: LabelSettings,
    refused: list[Refusal],
) -> list[_Heard]:
    """Those clips that the teacher transcribes well enough, with the transcripts that are wanted."""
    tokenizer = teacher.student.tokenizer
    heard = [each.heard for each in found]
    texts = transcribe(teacher.model, teacher.frontend.tokenizer, heard, teacher.frames, settings.batch_size)
    good = []
    for each, text in zip(found, texts, strict=True):
        try:
            wanted = tokenizer.decode(each.clip.tokens, skip_special_tokens=True)
            check_transcript(wanted, text, settings.max_cer)
            good.append(_rewritten(teacher, each, text, dialect) if settings.pseudo_labels else each)
        except RefusedClip as error:
            refused.append(Refusal(each.number, entry.file, str(error)))
    return good


def _rewritten(teacher: Teacher, each: _Heard, text: str, dialect: str) -> _Heard:
    """The same clip with the teacher's transcript."""
    tokens = tuple(label_ids(teacher.student.tokenizer, text, dialect))
    longest = int(teacher.student.config.max_target_positions)
    if len(tokens) > longest:
        raise RefusedClip(
            f"the teacher's transcript is {len(tokens)} tokens long and the student writes at most {longest}"
        )
    reads = teacher.reads(tokens, dialect)
    return _Heard(each.number, replace(each.clip, tokens=tokens), replace(each.heard, tokens=reads))


def check_transcript(wanted: str, heard: str, max_cer: float | None) -> None:
    """Is what a teacher hears near enough to a clip's transcript?

    Args:
        max_cer: character error rate that is still near enough; None for any.

    Raises:
        RefusedClip: it is not, or it is no text.
    """
    if not normalise(heard):
        raise RefusedClip("the teacher hears no text in it")
    if max_cer is None or not normalise(wanted):
        return
    cer = error_rates([wanted], [heard]).cer
    if cer > max_cer:
        raise RefusedClip(f"the teacher hears {heard!r}, a CER of {cer:.0%} against its transcript")


def _keep(previous: ShardIndex, key: str, made: ShardIndex, out: Path, file: str) -> bool:
    """Take over what an earlier call made of a shard, if that is still here."""
    entries = [entry for entry in previous.shards if entry.digest in previous.done.get(key, ())]
    if key not in previous.done or not all((out / entry.file).is_file() for entry in entries):
        return False
    made.shards += entries
    made.refused += [refusal for refusal in previous.refused if refusal.file == file]
    made.done[key] = previous.done[key]
    return True


def _key(entry: ShardEntry, teacher: Teacher, settings: LabelSettings, signer: Signer) -> str:
    """What the labelled shard follows from, in one word."""
    how = [settings.top_k, settings.max_cer, settings.pseudo_labels]
    return blob_digest(json.dumps([entry.digest, teacher.weights, signer.peer, *how]).encode()).hex()
