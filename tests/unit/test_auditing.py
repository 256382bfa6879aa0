"""Training a stranger's segment again, from whatever it committed to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from p2pasr.errors import NonFiniteStep, Reject
from p2pasr.protocol.tensors import pack_tensors, unpack_tensors
from p2pasr.rerunning import train_segment
from p2pasr.tasks import Checkpoint
from p2pasr.tasks.base import SegmentReport

from .builders import ToyTask, make_claim, make_identity, make_manifest, make_state, train_claim

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
WHO = make_identity(1)
CLAIM = make_claim(WHO, MANIFEST, STATE, segments=2)
START = train_claim(WHO, MANIFEST, STATE, segments=2).checkpoints[0]


class Picky(ToyTask):
    """A task that fails in its own way at moments that are not its own."""

    def segment(self, start: Checkpoint, *args: Any) -> tuple[Checkpoint, SegmentReport]:
        for name in start.params if start.moments else ():
            np.add(start.moments[f"{name}/exp_avg"], start.params[name])
        return super().segment(start, *args)


def again(start: bytes) -> bytes:
    task: Any = Picky()
    return train_segment(task, MANIFEST, CLAIM, 1, STATE, start, (), None)


def changed(**changes: Any) -> bytes:
    return dataclasses.replace(Checkpoint.unpack(START), **changes).pack()


def respelled(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    tensors, description = unpack_tensors(START)
    change(tensors, description)
    return pack_tensors(tensors, description)


def test_an_honest_checkpoint_leads_where_it_led_its_author() -> None:
    assert again(START) == train_claim(WHO, MANIFEST, STATE, segments=2).checkpoints[1]


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"no checkpoint",
        changed(params={}),
        changed(params={**STATE.params, "more": np.zeros(3, np.float32)}),
        changed(params={name: value.reshape(-1, 1) for name, value in STATE.params.items()}),
        changed(params={name: value.astype(np.float16) for name, value in STATE.params.items()}),
        changed(moments={"other": np.zeros(3, np.float32)}),
        changed(moments={f"{name}/exp_avg": np.zeros((3, 3, 3), np.float32) for name in STATE.params}),
        changed(step=-1),
        respelled(lambda _arrays, description: description.clear()),
        respelled(lambda _arrays, description: description.update(step="3")),
        respelled(lambda _arrays, description: description.update(more=1)),
        respelled(lambda arrays, _description: arrays.update(stray=np.zeros(1, np.float32))),
    ],
)
def test_a_checkpoint_that_nothing_can_be_trained_from_is_refused_and_never_a_crash(start: bytes) -> None:
    with pytest.raises(Reject):
        again(start)


def test_training_that_diverges_proves_nothing_and_is_not_tried_again() -> None:
    class Diverging(ToyTask):
        def segment(self, *_: Any) -> tuple[Checkpoint, SegmentReport]:
            raise NonFiniteStep("the loss is nan")

    task: Any = Diverging()
    for segment, start in ((0, None), (1, START)):
        with pytest.raises(Reject, match="comes to no end: the loss is nan"):
            train_segment(task, MANIFEST, CLAIM, segment, STATE, start, (), None)


def test_what_fails_from_the_agreed_state_is_this_machines_fault() -> None:
    class Broken(ToyTask):
        def segment(self, *_: Any) -> tuple[Checkpoint, SegmentReport]:
            raise RuntimeError("out of memory")

    task: Any = Broken()
    with pytest.raises(RuntimeError, match="out of memory"):
        train_segment(task, MANIFEST, CLAIM, 0, STATE, None, (), None)
