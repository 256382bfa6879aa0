"""A peer that cheats: `python -m p2pasr.demo.cheat [options of p2pasr.peer]`.

It trains one step of every segment, claims all of them, and audits nobody. Everything that it sends is well-formed
and as small as an honest delta, so that nothing but training its segments again can tell.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2pasr import peer
from p2pasr import round as story
from p2pasr.auditing import offer
from p2pasr.member import Member
from p2pasr.tasks.base import Checkpoint, OnStep, SegmentPlan, SegmentReport, Task

honest_train = story.train


class Lazy:
    """A task of whose segments only the first step is trained."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.hardware_class = task.hardware_class

    def segment(
        self, start: Checkpoint, shards: Sequence[Path], plan: SegmentPlan, on_step: OnStep | None = None
    ) -> tuple[Checkpoint, SegmentReport]:
        """See :class:`p2pasr.Task`; what it returns says that all steps were taken."""
        end, report = self._task.segment(start, shards, dataclasses.replace(plan, steps=1), on_step)
        return dataclasses.replace(end, step=start.step + plan.steps), report


def train(member: Member, shards: Sequence[bytes], segments: int) -> Any:
    """Do in a tenth of the time what :func:`p2pasr.round.train` does."""
    task, lazy = member.task, Lazy(member.task)
    member.task = lazy  # type: ignore[assignment]  # nothing else is asked of it while it trains
    try:
        return honest_train(member, shards, segments)
    finally:
        member.task = task


def check_last_round(member: Member) -> int:
    """Open what this peer must, and check nobody."""
    offer(member)
    return 0


if __name__ == "__main__":
    story.train = train
    story.check_last_round = check_last_round  # type: ignore[attr-defined]  # the name that its rounds call
    sys.exit(peer.main())
