"""The steps of a round that need no other peer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from p2pasr.averaging.codec import Layout
from p2pasr.deltas import largest_values
from p2pasr.errors import LocalError, TransportError
from p2pasr.member import Member, Work
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.peers.records import Records
from p2pasr.protocol.encoding import pack
from p2pasr.protocol.tensors import Tensors
from p2pasr.report import Report
from p2pasr.round import average, commit, resume
from p2pasr.tasks import Bounded, Checkpoint
from p2pasr.verify.trace import Trace

from .builders import make_identity, make_manifest, make_state

WHO = make_identity(1)
SHARDS = (bytes(32), bytes([1]) * 32)


class Link:
    """A network process that takes notes."""

    maddrs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.announced: list[str] = []
        self.asked: dict[str, Any] = {}

    def announce(self, slot: str, *_: Any, **_options: Any) -> None:
        self.announced.append(slot)

    def call(self, method: str, _seconds: float, /, *, needless: Any = None, **args: Any) -> dict[str, Any]:
        self.asked = args
        raise TransportError(f"nobody answers {method}")


class Unbounded:
    """As much of a task as these steps ask for."""

    hardware_class = "none"


class Steady(Unbounded):
    """One whose values move by 2⁻⁶ a step at most, and that keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def largest_move(self, params: Tensors, first_step: int, steps: int, total_steps: int) -> float:
        assert params.keys() == {"encoder.a", "decoder.b"}
        self.asked.append((first_step, steps, total_steps))
        return steps / 64


class Boundless(Unbounded):
    """One that says that nothing bounds it."""

    def largest_move(self, *_: Any) -> float:
        return math.inf


MakeMember = Callable[..., Member]


@pytest.fixture
def make_member(store: BlobStore, journal: Journal) -> MakeMember:
    """A peer that trains this task and talks to nobody; keyword arguments change its manifest."""

    def make(task: Any, **changes: Any) -> Member:
        manifest = make_manifest(**changes)
        state = make_state(manifest)
        link: Any = Link()
        records = Records(link, WHO, state.run, lambda _sentence: None)
        return Member(manifest, WHO, task, link, store, journal, records, Report("json"), state.params, state)

    return make


def trained(member: Member, by: float, segments: int) -> Work:
    """Commit to a delta of which one value moved."""
    params = {name: value.copy() for name, value in member.state.params.items()}
    params["encoder.a"][10, 0] += np.float32(by)  # from 0, so that the difference is exact
    trace = Trace(member.store, member.state.run, member.state.round, member.peer)
    for _ in range(segments):
        trace.add(b"checkpoint")
    return commit(member, SHARDS, Checkpoint(params), trace, [1.0] * segments)


def test_the_limits_are_those_of_each_number_of_segments_and_a_little_more(make_member: MakeMember) -> None:
    task = Steady()
    member = make_member(task)
    member.state = dataclasses.replace(member.state, round=5)

    limits = largest_values(member)

    assert isinstance(task, Bounded)
    assert task.asked == [(60, steps, 96) for steps in (3, 6, 9, 12)]
    assert limits == pytest.approx([1.01 * steps / 64 for steps in (3, 6, 9, 12)], rel=1e-3)
    assert all(limit > 1.01 * steps / 64 for limit, steps in zip(limits, (3, 6, 9, 12), strict=True))


def test_without_a_bound_there_is_no_limit(make_member: MakeMember) -> None:
    assert not isinstance(Unbounded(), Bounded)
    assert largest_values(make_member(Unbounded())) is None
    member = make_member(Boundless())
    assert set(largest_values(member)) == {np.finfo(np.float32).max}
    trained(member, 1e30, 1)


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("segments", [1, 4])
def test_a_value_that_moved_as_far_as_it_can_is_committed_to_and_is_within_the_limit_for_others(
    make_member: MakeMember, codec: str, segments: int
) -> None:
    member = make_member(Steady(), averaging={"codec": codec})
    work = trained(member, -segments * 3 / 64, segments)

    decoded = Layout.of(600, member.manifest.averaging).decode(member.store.get(work.delta))
    limits = largest_values(member)
    assert 0.99 * segments * 3 / 64 <= np.abs(decoded).max() <= limits[segments - 1]
    assert member.link.announced == ["claim", "roster"]


@pytest.mark.parametrize("segments", [1, 4])
def test_a_value_that_moved_further_than_it_can_is_not_committed_to(make_member: MakeMember, segments: int) -> None:
    member = make_member(Steady())

    sentence = rf"round 0 was trained wrongly: a value moved by .*, and by .* {segments} segments cannot .* more than "
    with pytest.raises(LocalError, match=sentence):
        trained(member, 1.02 * segments * 3 / 64, segments)
    assert member.journal.pending() is None
    assert member.link.announced == []


def test_a_peer_that_comes_back_to_a_state_after_a_fork_publishes_the_claim_that_it_made_there(
    make_member: MakeMember,
) -> None:
    member = make_member(Unbounded())
    here = member.state
    there = dataclasses.replace(here, credit={WHO.peer: 60.0})
    first = trained(member, 0.5, 2)
    member.state = there
    assert resume(member) is None
    second = trained(member, 0.25, 2)
    assert resume(member) == second
    member.state = here
    assert resume(member) == first


@pytest.mark.parametrize("task", [Steady(), Boundless(), Unbounded()], ids=lambda task: type(task).__name__)
def test_the_limits_go_to_the_network_process_with_the_claim(make_member: MakeMember, task: Any) -> None:
    member = make_member(task)
    work = trained(member, 0.0, 2)

    with pytest.raises(TransportError, match="nobody answers average"):
        average(member, work, {WHO.peer})
    assert member.link.asked["limits"] == largest_values(member)
    pack(member.link.asked)
