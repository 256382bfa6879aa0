"""Which tier a peer takes, and what it leaves to others."""

from __future__ import annotations

import dataclasses
import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pasr import tasks, tiers
from p2pasr.errors import LocalError
from p2pasr.member import Member
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.plan import GIB
from p2pasr.protocol.tiers import EVERY, TIERS, trains
from p2pasr.report import Report
from p2pasr.rerunning import train_again
from p2pasr.tasks.training import GradientTask
from p2pasr.tiers import Choice, by_hand, by_memory, choose, step_bytes

from .builders import ToyTask, initial_params, make_claim, make_identity, make_manifest, make_state, manifest_content
from .conftest import MODEL

CLIPS = st.lists(st.floats(0.1, 60), min_size=1, max_size=6)
STUDENT = {"architecture": "wav2vec2-ctc", "model": MODEL, "units": "bytes", "layers": 1, "width": 32, "heads": 2}
OWN: Any = ToyTask()


def linear(seconds: float) -> float:
    """A step that takes a GiB a second."""
    return seconds * GIB


def student(**config: Any) -> GradientTask[Any]:
    made = tasks.build("student", {**STUDENT, **config}, seed=0)
    assert isinstance(made, GradientTask)
    return made


@given(CLIPS, st.floats(5, 100))
def test_what_a_person_says_is_never_exceeded_and_as_much_of_it_used_as_there_are_tiers(
    clips: list[float], given: float
) -> None:
    tier = by_hand(given, clips).tier
    if all(longest <= given for longest in clips):
        assert tier == EVERY
    else:
        assert tier == max(each for each in TIERS if each <= given)


def test_a_clip_below_the_lowest_tier_is_asked_for_in_vain() -> None:
    with pytest.raises(LocalError, match=r"--longest-clip 4 is below 5 s, the lowest tier; give that or more"):
        choose([12.0, 3.0], 4.0, OWN, 16)


@given(CLIPS, st.floats(0.01, 100))
def test_the_highest_tier_that_fits_is_taken_and_the_lowest_where_none_does(clips: list[float], gib: float) -> None:
    tier = by_memory(linear, gib * GIB, clips).tier
    if tier == EVERY:
        assert max(clips) <= gib
    else:
        assert max(clips) > gib
        assert tier <= gib or tier == TIERS[0]
        assert not any(tier < each <= gib and each < max(clips) for each in TIERS)


@given(st.lists(st.none() | st.floats(0.1, 60), min_size=1, max_size=6), st.floats(5, 100))
def test_a_tier_is_taken_only_where_it_leaves_shards_out_and_some_in(
    lengths: list[float | None], longest: float
) -> None:
    tier = max(tier for tier in TIERS if tier <= longest)
    if not any(length is None or length <= tier for length in lengths) and max(filter(None, lengths)) > longest:
        with pytest.raises(LocalError, match=f"no shard of this run has clips of at most {tier} s only"):
            choose(lengths, longest, OWN, 16)
        return
    chosen = choose(lengths, longest, OWN, 16)
    left = [length for length in lengths if trains(chosen.tier, length)]
    assert 0 < len(left) <= len(lengths)
    assert (chosen == Choice(EVERY)) == (len(left) == len(lengths))
    if chosen.reason:
        assert chosen.reason == (
            f"this peer trains {len(left)} of {len(lengths)} shards, those with clips of at most {chosen.tier} s: "
            f"--longest-clip is {longest:g}"
        )


def test_by_itself_a_peer_leaves_out_what_its_memory_is_too_small_for(monkeypatch: pytest.MonkeyPatch) -> None:
    task = student(dropout=0.0)
    monkeypatch.setattr(tiers, "room", lambda _device: step_bytes(task, 16, 11.0))
    chosen = choose([3.0, 9.9, 25.0], None, task, 16)
    assert chosen.tier == 10
    assert chosen.reason.startswith(
        "this peer trains 2 of 3 shards, those with clips of at most 10 s: a step with clips"
    )
    assert choose([3.0, 9.9, 11.0], None, task, 16) == Choice(EVERY)
    assert choose([25.0], 30.0, task, 16) == Choice(EVERY), "whoever says it is believed"


@pytest.mark.parametrize("task", [OWN, tasks.build("lora", {"model": MODEL}, seed=0)], ids=["own", "lora"])
def test_where_memory_does_not_follow_from_the_clip_there_is_no_bound(
    monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    monkeypatch.setattr(tiers, "room", lambda _device: 1.0)
    assert choose([3.0, 25.0], None, task, 16) == Choice(EVERY)


def test_a_model_that_drops_out_is_planned_with_the_whole_step_for_smaller_pieces_would_draw_otherwise() -> None:
    dropping, steady = student(dropout=0.1), student(dropout=0.0)
    assert step_bytes(dropping, 16, 5.0) > 4 * step_bytes(steady, 16, 5.0)
    assert step_bytes(student(dropout=0.1, micro_batch=1), 16, 5.0) < 2 * step_bytes(steady, 16, 5.0)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *(("student", {**STUDENT, "architecture": name}) for name in ("transformer-ctc", "parakeet-ctc", "hubert-ctc")),
        ("features", {"model": MODEL, "heads": ["vad", "masked"]}),
    ],
)
def test_memory_grows_with_the_clip_and_the_task_stays_as_it_was(kind: str, config: dict[str, Any]) -> None:
    task = tasks.build(kind, config, seed=0)
    assert isinstance(task, GradientTask)
    before = task.initial_params()
    planned = [step_bytes(task, 4, seconds) for seconds in (1.0, 5.0, 30.0)]
    assert planned == sorted(set(planned))
    assert task.device == torch.device("cpu")
    assert all(not parameter.is_meta for parameter in task.model.parameters())
    assert all((before[name] == value).all() for name, value in task.initial_params().items())


@pytest.fixture
def member(store: BlobStore, journal: Journal) -> Member:
    """A peer of the lowest tier in a run whose shards have clips of 12 s, but for the first."""
    shards = [{**shard, "longest": 12.0} for shard in manifest_content()["shards"]]
    manifest = make_manifest(shards=({**shards[0], "longest": 3.0}, *shards[1:]))
    return Member(
        manifest=manifest,
        identity=make_identity(1),
        task=OWN,
        link=cast("Any", SimpleNamespace(maddrs=())),
        store=store,
        journal=journal,
        records=cast("Any", None),
        report=Report("json", io.StringIO()),
        like=initial_params(),
        state=make_state(manifest),
        tier=TIERS[0],
    )


def test_a_peer_does_not_train_again_what_its_memory_is_too_small_for(member: Member) -> None:
    claim = make_claim(make_identity(2), member.manifest, member.state)
    assert not member.can_train(claim)
    with pytest.raises(LocalError, match="have clips of more than 5 s"):
        train_again(member, claim, 0, member.state, None)
    short = bytes.fromhex(member.manifest.shards[0].digest)
    assert member.can_train(dataclasses.replace(claim, shards=(short,)))
