"""A peer that cheats: `python -m tests.attacks.adversary ATTACK [options of p2pasr.peer]`.

Each attack is one override of an honest peer's function; everything else it does like the others.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from p2pasr import peer
from p2pasr import round as story
from p2pasr.tasks.base import Checkpoint
from p2pasr.tasks.lora import LoraTask


def sign_flip() -> None:
    """Claims the opposite of what it trained, ten times as long."""
    honest = story.write_delta

    def write_delta(member: Any, end: Checkpoint) -> Any:
        before = member.state.params
        flipped = {name: before[name] - np.float32(10) * (end.params[name] - before[name]) for name in before}
        return honest(member, dataclasses.replace(end, params=flipped))

    story.write_delta = write_delta
    story.check_moves = lambda *_: None


def free_rider() -> None:
    """Trains nothing and says that it did: its checkpoints differ a little from where it started."""

    def segment(_self: LoraTask, start: Checkpoint, _shards: Any, plan: Any, on_step: Any = None) -> Any:
        draw = np.random.default_rng(int.from_bytes(plan.seed[:8], "big"))
        params = {
            name: value + draw.standard_normal(value.shape).astype(np.float32) * np.float32(1e-4)
            for name, value in start.params.items()
        }
        from p2pasr.tasks.base import SegmentReport

        return Checkpoint(params, dict(start.moments), start.step + plan.steps), SegmentReport(1.0, 1)

    LoraTask.segment = segment  # type: ignore[method-assign]


ATTACKS: dict[str, Callable[[], None]] = {"sign-flip": sign_flip, "free-rider": free_rider}


if __name__ == "__main__":
    ATTACKS[sys.argv[1]]()
    sys.exit(peer.main(sys.argv[2:]))
