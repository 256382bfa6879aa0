"""The grey zone: what training in the canonical class can clear, and that it never bans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pasr import auditing, canonical, runs
from p2pasr.auditing import Opened, conclude_segment
from p2pasr.canonical import settle, train_canonically
from p2pasr.errors import LocalError
from p2pasr.member import Member
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.audits import Duty
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.signing import short
from p2pasr.report import Report
from p2pasr.tasks import Checkpoint, SegmentPlan
from p2pasr.verify.compare import Comparison
from p2pasr.verify.evidence import Opening, compare_ends

from .builders import ToyTask, digest_of, make_identity, make_manifest, make_state, train_claim

FP32 = {"precision": "fp32", "quantise": "none", "optimizer": "adamw"}
MANIFEST = make_manifest(task={"kind": "lora", "config": FP32})
STATE = make_state(MANIFEST)
AUTHOR, AUDITOR = make_identity(1), make_identity(2)
WORK = train_claim(AUTHOR, MANIFEST, STATE, segments=2)
CLAIM = WORK.claim.message


class Heard(Report):
    """Keeps the events."""

    def __init__(self) -> None:
        super().__init__("json")
        self.events: list[dict[str, Any]] = []

    def emit(self, event: str, message: str, **fields: Any) -> None:
        self.events.append({"event": event, "message": message, **fields})


def auditor(store: BlobStore, journal: Journal, manifest: RunManifest = MANIFEST, hardware: str = "cpu/AVX2/2t") -> Any:
    task, none = ToyTask(), Any
    task.hardware_class = hardware
    for digest in CLAIM.shards:
        store.put("shard", next(f"shard {n}".encode() for n in range(9) if digest_of(f"shard {n}") == digest))
    return Member(manifest, AUDITOR, task, none, store, journal, none, Heard(), STATE.params, STATE)


def off(by: float, direction: int = 0) -> bytes:
    """The end of the first segment, that far from the honest one as a share of its way, in one of two directions."""
    end = Checkpoint.unpack(WORK.checkpoints[0])
    moved = {}
    for place, (name, value) in enumerate(sorted(end.params.items())):
        step = value - STATE.params[name]
        turned = step if (place + direction) % 2 else -step
        moved[name] = (value + np.float32(by) * turned).astype(np.float32)
    return dataclasses.replace(end, params=moved).pack()


def settled(member: Any, monkeypatch: pytest.MonkeyPatch, claimed: bytes, rerun: bytes, result: bytes) -> Comparison:
    monkeypatch.setattr(canonical, "train_canonically", lambda *_: result)
    found = compare_ends(STATE, None, claimed, rerun, MANIFEST)
    return settle(member, STATE, CLAIM, 0, None, claimed, rerun, found)


ERRORS = st.floats(1e-5, 0.5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ERRORS, ERRORS, ERRORS)
def test_a_claim_is_cleared_if_the_canonical_result_is_close_to_it_and_never_condemned(
    store: BlobStore, journal: Journal, monkeypatch: pytest.MonkeyPatch, claimed: float, rerun: float, result: float
) -> None:
    member = auditor(store, journal)
    ends = off(claimed), off(rerun, 1), off(result)
    before = compare_ends(STATE, None, ends[0], ends[1], MANIFEST)
    theirs = compare_ends(STATE, None, ends[0], ends[2], MANIFEST)
    after = settled(member, monkeypatch, *ends)
    near = theirs.error <= MANIFEST.verify.close
    assert after == (Comparison("close", theirs.error) if near else before)
    (event,) = member.report.events
    assert (event["event"], event["peer"], event["finding"]) == ("grey", AUTHOR.peer, after.finding)
    assert (event["error"], event["canonical_error"]) == (before.error, theirs.error)
    assert event["own_error"] == compare_ends(STATE, None, ends[2], ends[1], MANIFEST).error


@pytest.mark.parametrize(
    ("claimed", "rerun", "result", "words"),
    [
        (2e-3, 0.0, 1.9e-3, "the claim is close to it"),
        (3e-3, 0.0, 1e-4, "this machine is close to it and the claim is not; nobody is blamed"),
        (2e-3, -2e-3, 0.0, "neither the claim nor this machine is close to it"),
    ],
)
def test_what_came_of_it_is_told_with_both_errors(
    store: BlobStore,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    claimed: float,
    rerun: float,
    result: float,
    words: str,
) -> None:
    member = auditor(store, journal)
    settled(member, monkeypatch, off(claimed), off(rerun), off(result))
    (event,) = member.report.events
    assert f"segment 1 of {short(AUTHOR.peer)}, trained again in the canonical class: {words}" in event["message"]
    assert f"{event['canonical_error']:.2e} of the claim, {event['own_error']:.2e} of this machine" in event["message"]


@pytest.mark.parametrize(
    ("task", "hardware", "words"),
    [
        ({"kind": "toy"}, "cpu/AVX2/2t", "a task of the kind 'toy' cannot be built"),
        ({"config": {**FP32, "precision": "bf16"}}, "cuda/H200", "only tasks in fp32"),
        ({"config": {**FP32, "quantise": "4bit"}}, "cuda/H200", "only tasks in fp32"),
        ({"config": {**FP32, "optimizer": "adamw8bit"}}, "cuda/H200", "needs a GPU"),
        ({}, "cpu/DEFAULT/1t/torch2/fp32", "trains in the canonical class already"),
    ],
)
def test_what_the_canonical_class_cannot_settle_stays_unclear_with_the_reason(
    store: BlobStore,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    task: dict[str, Any],
    hardware: str,
    words: str,
) -> None:
    manifest = make_manifest(task={"kind": "lora", "config": FP32, **task})
    member = auditor(store, journal, manifest, hardware)
    assert settled(member, monkeypatch, off(2e-3), off(0.0), off(2e-3)).finding == "unclear"
    assert ["stays unclear" in event["message"] and words in event["message"] for event in member.report.events] == [
        True
    ]


def test_a_size_that_took_too_long_once_is_not_tried_again(
    store: BlobStore, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def slow(*_: Any) -> bytes:
        tried.append(1)
        raise TimeoutError("training it in the canonical class takes longer than 600 s")

    member = auditor(store, journal)
    found = Comparison("unclear", 2e-3)
    monkeypatch.setattr(canonical, "train_canonically", slow)
    for _ in range(2):
        assert settle(member, STATE, CLAIM, 0, None, off(2e-3), off(0.0), found) == found
    assert tried == [1]
    assert "takes longer than 600 s" in member.report.events[0]["message"]
    assert "trained on GPUs only" in member.report.events[1]["message"]


def test_an_audit_asks_the_canonical_class_only_where_it_cannot_tell(
    store: BlobStore, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Comparison] = []

    def cleared(*arguments: Any) -> Comparison:
        asked.append(arguments[-1])
        return Comparison("close", 1e-4)

    monkeypatch.setattr(auditing, "settle", cleared)
    monkeypatch.setattr(auditing, "convict", lambda *_: None)
    member, duty = auditor(store, journal), Duty(AUTHOR.peer, WORK.claim.digest, 0)
    opened = Opened(None, Opening(WORK.checkpoints[0], ()), Opening(WORK.checkpoints[1], ()))
    found = {}
    for error in (0.0, 5e-4, 3e-3, 0.1):
        finding = conclude_segment(member, STATE, WORK.claim, duty, opened, off(error), bytes(32))
        found[error] = finding.finding, finding.result == blob_digest(off(error))
    assert found == {0.0: ("same", True), 5e-4: ("close", True), 3e-3: ("close", True), 0.1: ("different", True)}
    assert [comparison.finding for comparison in asked] == ["unclear"]


# --- the process ----------------------------------------------------------------------------------


def test_the_canonical_process_trains_what_this_one_does_within_what_hardware_differs_by(
    manifest: RunManifest, shard_files: Sequence[Path]
) -> None:
    task = runs.build_task(manifest)
    files, first = shard_files[:1], runs.initial_state(manifest, task)
    plan = SegmentPlan(digest_of("seed"), steps=2, samples_per_step=2, first_step=20, total_steps=100)
    begin = Checkpoint(first.params)
    ours = task.segment(begin, files, plan)[0].pack()
    result = train_canonically(manifest, None, begin.pack(), files, plan)
    assert compare_ends(first, None, ours, result, manifest).finding in ("same", "close")
    with pytest.raises(LocalError, match="its process of the canonical class ended"):
        train_canonically(manifest, None, b"no checkpoint", files, plan)


def test_what_takes_longer_than_a_round_is_given_up() -> None:
    hasty = make_manifest(rounds={"max_seconds": 0.01})
    with pytest.raises(TimeoutError, match="longer than 0 s"):
        train_canonically(hasty, None, b"", [], SegmentPlan(bytes(32), 1, 1, 0, 1))
