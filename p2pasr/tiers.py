"""Which tier a peer takes: by what a person says, or by the memory that training takes on the longest clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from p2pasr.errors import LocalError
from p2pasr.plan import GIB, planned, room
from p2pasr.protocol.tiers import EVERY, TIERS, trains
from p2pasr.tasks.base import Task
from p2pasr.tasks.training import GradientTask


@dataclass(frozen=True, slots=True)
class Choice:
    """The tier of a peer.

    Attributes:
        reason: what it trains and why, for a person; empty where that is every shard.
    """

    tier: int
    reason: str = ""


def choose(lengths: Sequence[float | None], given: float | None, task: Task, samples: int) -> Choice:
    """The tier that leaves out as little as it must.

    Args:
        lengths: of each shard the seconds of its longest clip; None where it has no clips.
        given: seconds of the longest clip to train on, if a person says so, whatever memory there is.
        samples: examples in a step.

    Raises:
        LocalError: no shard is left, or there is no tier below what a person says.
    """
    clips = [length for length in lengths if length is not None]
    if given is not None:
        chosen = by_hand(given, clips)
    elif isinstance(task, GradientTask) and task.example_of(1.0) is not None:
        chosen = by_memory(partial(step_bytes, task, samples), room(task.device), clips)
    else:
        chosen = Choice(EVERY)
    left = sum(trains(chosen.tier, length) for length in lengths)
    if left == len(lengths):
        return Choice(EVERY)
    if left == 0:
        raise LocalError(
            f"no shard of this run has clips of at most {chosen.tier} s only; the shortest of their longest clips has "
            f"{min(clips):g} s, and {chosen.reason}: name a longer one with --longest-clip, or use another device"
        )
    return Choice(
        chosen.tier,
        f"this peer trains {left} of {len(lengths)} shards, those with clips of at most {chosen.tier} s: "
        f"{chosen.reason}",
    )


def by_hand(given: float, clips: Sequence[float]) -> Choice:
    """The highest tier that is not above what a person says.

    Args:
        given: seconds of the longest clip to train on.
        clips: seconds of the longest clip of each shard that has clips.

    Raises:
        LocalError: there is none.
    """
    if all(longest <= given for longest in clips):
        return Choice(EVERY)
    below = [tier for tier in TIERS if tier <= given]
    if not below:
        raise LocalError(f"--longest-clip {given:g} is below {TIERS[0]} s, the lowest tier; give that or more")
    return Choice(below[-1], f"--longest-clip is {given:g}")


def by_memory(step: Callable[[float], float], memory: float, clips: Sequence[float]) -> Choice:
    """The highest tier whose longest clips can be trained on; the lowest where, by what is planned, none can.

    Args:
        step: bytes that a step takes on clips of so many seconds.
        memory: bytes that there are.
        clips: seconds of the longest clip of each shard that has clips.
    """
    longest = max(clips, default=None)
    if longest is None or (needed := step(longest)) <= memory:
        return Choice(EVERY)
    tier = next((tier for tier in reversed(TIERS) if tier < longest and step(tier) <= memory), TIERS[0])
    takes = f"a step with clips of {longest:g} s takes {needed / GIB:.1f} GiB"
    return Choice(tier, f"{takes}, and there are {memory / GIB:.1f}")


def step_bytes(task: GradientTask[Any], samples: int, seconds: float) -> float:
    """Bytes of a task's step on clips of so many seconds, as few at once as may be: one, unless that changes draws."""
    at_once = min(task.config.micro_batch or samples, samples) if task.drops_out() else 1
    return planned(task, [task.example_of(seconds)] * at_once)
