"""Can others train again what a task trained? Checked on this machine, before anybody joins a run of it.

Whoever writes a task promises that training is a pure function. A task that breaks the promise makes
honest peers look like cheats, so each way of breaking it that was ever met is tried here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np

from p2pasr import tasks
from p2pasr.errors import LocalError, P2pasrError
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.manifest import VerifySection, read_config
from p2pasr.protocol.state import params_digest
from p2pasr.protocol.tensors import Tensors, forms
from p2pasr.tasks.base import Bounded, Checkpoint, SegmentPlan, Task
from p2pasr.verify.compare import relative_errors

METHODS: Final = ("initial_params", "segment", "evaluate", "export", "hardware_class")
MOST_MOMENTS: Final = 3
"""Values of an optimizer's state for each parameter; peers accept no longer checkpoints."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of a task.

    Attributes:
        promise: what is promised.
        broken: how it is broken, as a sentence; None where it holds.
        measured: a figure, for people.
    """

    promise: str
    broken: str | None
    measured: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A task by name, so that another process can make it too.

    Attributes:
        name: `module:Class` of a class that is made without arguments, or a run's configuration file.
        folder: where modules are looked for first.
        shards: files that it trains on.
    """

    name: str
    folder: Path
    shards: tuple[Path, ...]

    def make(self) -> Task:
        """A new instance.

        Raises:
            LocalError: there is none of this name, or it is no task.
        """
        if Path(self.name).suffix in (".yaml", ".yml"):
            config = read_config(Path(self.name))
            pinned = tasks.pin(config.task.kind, config.task.config, None, self.shards)
            return tasks.build(config.task.kind, pinned, seed=config.seed, shards=self.shards)
        module, _, attribute = self.name.partition(":")
        if not module or not attribute:
            raise LocalError(f"{self.name!r} is neither module:Class nor a run's configuration (.yaml)")
        if str(self.folder) not in sys.path:
            sys.path.insert(0, str(self.folder))
        try:
            made = getattr(importlib.import_module(module), attribute)()
        except (ImportError, AttributeError, TypeError) as error:
            raise LocalError(f"{self.name!r} cannot be made without arguments ({error})") from error
        missing = [name for name in METHODS if not hasattr(type(made), name) and not hasattr(made, name)]
        if missing:
            raise LocalError(f"{self.name!r} is no task: it has no {', '.join(missing)}")
        task: Task = made
        return task


def check_task(target: Target, plan: SegmentPlan, section: VerifySection) -> Iterator[Check]:
    """Try a task's promises, one after another.

    Args:
        plan: of the segments that are trained; two at least of two steps or more.
        section: the limits between which audits see nothing.

    Raises:
        LocalError: the task cannot be made, or its first segment fails.
    """
    task = target.make()
    params = task.initial_params()
    yield Check("the initial parameters are arrays of float32", _not_parameters(params))
    start = Checkpoint(params)
    other = replace(plan, seed=bytes(31) + b"\1", first_step=plan.first_step + plan.steps)
    with _someones("its first segment"):
        first, report = task.segment(start, target.shards, plan)
        second, _ = task.segment(first, target.shards, other)
    yield Check("a segment ends with the parameters that it began with, moved", _not_an_end(start, first, plan))
    yield Check("its loss is a number", None if math.isfinite(report.loss) else f"it is {report.loss}")
    yield Check("a checkpoint can be packed, and says the same when it is read", _not_packed(first))
    yield Check("training leaves its start as it was", _changed(params, target.make().initial_params()))

    def again(begin: Checkpoint, chosen: SegmentPlan, maker: Callable[[], Task] = lambda: task) -> str | None:
        _roll_dice()
        with _someones("a segment, trained again,"):
            end, _ = maker().segment(begin, target.shards, chosen)
        expected = first if chosen is plan else second
        return _differs(expected, end)

    yield Check("the same segment gives the same bits again", again(start, plan))
    yield Check("what it evaluated before does not matter", _after_evaluation(task, target, again, start, plan))
    yield Check("another instance trains the same bits", again(start, plan, target.make))
    packed = Checkpoint.unpack(first.pack())
    yield Check("another instance goes on from a packed checkpoint", again(packed, other, target.make))
    yield from _elsewhere(target, plan, params, start, first, section)
    yield _skipping(task, target, plan, start, first, section)
    if isinstance(task, Bounded):
        moved = max(float(np.abs(first.params[name] - value).max()) for name, value in params.items())
        bound = task.largest_move(params, plan.first_step, plan.steps, plan.total_steps)
        broken = None if moved <= bound else f"a value moved by {moved:.3g} where {bound:.3g} is the most"
        yield Check("no value moves further than the task says", broken, f"{moved:.2g} of {bound:.2g}")
    yield Check("it scores, and the initial parameters like none", _not_scored(task, params, target.shards))
    kept = _scored_otherwise(task, target.make(), first.params, target.shards[:1])
    yield Check("what an instance trained before does not change a score", kept)
    yield Check("it exports what it trained", _not_exported(task, first.params))


@contextlib.contextmanager
def _someones(what: str) -> Iterator[None]:
    """Run somebody's code, which may fail in any way.

    Raises:
        LocalError: it failed.
    """
    try:
        yield
    except P2pasrError:
        raise
    except Exception as error:
        raise LocalError(f"{what} fails: {type(error).__name__}: {error}") from error


def _not_parameters(params: Any) -> str | None:
    if not isinstance(params, dict) or not params:
        return "initial_params() returns no map of names to arrays"
    for name, value in params.items():
        if not isinstance(value, np.ndarray) or value.dtype != np.float32:
            return f"{name!r} is no array of float32"
        if not np.isfinite(value).all():
            return f"{name!r} holds values that are not finite"
    return None


def _not_an_end(start: Checkpoint, end: Checkpoint, plan: SegmentPlan) -> str | None:
    if forms(end.params) != forms(start.params):
        return "other names, shapes or dtypes come back"
    if end.step != start.step + plan.steps:
        return f"the checkpoint says step {end.step} after {start.step + plan.steps}"
    if all(np.array_equal(end.params[name], value) for name, value in start.params.items()):
        return "nothing moved"
    values = sum(value.size for value in start.params.values())
    moments = sum(value.size for value in end.moments.values())
    if moments > MOST_MOMENTS * values:
        return f"{moments} values of moments for {values} parameters; at most {MOST_MOMENTS} times as many travel"
    return None


def _not_packed(end: Checkpoint) -> str | None:
    try:
        read = Checkpoint.unpack(end.pack())
    except (P2pasrError, TypeError, ValueError) as error:
        return str(error)
    return _differs(end, read)


def _changed(params: Tensors, fresh: Tensors) -> str | None:
    """Whether training wrote into the arrays that it was given, or another instance starts elsewhere."""
    same = forms(params) == forms(fresh) and all(np.array_equal(params[name], fresh[name]) for name in fresh)
    return None if same else "the arrays that it began with are no longer those of a new instance"


def _differs(expected: Checkpoint, end: Checkpoint) -> str | None:
    if expected.pack() == end.pack():
        return None
    one, other = _groups(expected), _groups(end)
    if forms(one) != forms(other):
        return "other arrays came back"
    error = max(relative_errors({}, one, other).values())
    return f"other bits came back (relative error {error:.1e})"


def _groups(end: Checkpoint) -> Tensors:
    return {f"params/{name}": value for name, value in end.params.items()} | end.moments


def _roll_dice() -> None:
    """Move every generator that a task could draw from without seeding it."""
    random.seed()
    np.random.seed(random.randrange(1 << 32))  # noqa: S311 (the one that careless code uses)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(random.randrange(1 << 62))  # noqa: S311 (only to differ)


def _after_evaluation(
    task: Task, target: Target, again: Callable[..., str | None], start: Checkpoint, plan: SegmentPlan
) -> str | None:
    with _someones("evaluate()"):
        task.evaluate(None, target.shards[:1])
    return again(start, plan)


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """What another process makes of the same."""

    initial: bytes
    end: bytes


def _elsewhere(
    target: Target, plan: SegmentPlan, params: Tensors, start: Checkpoint, first: Checkpoint, section: VerifySection
) -> Iterator[Check]:
    """A process of its own, alike and with another number of threads: equal bits, and nearly equal bits."""
    threads = _threads()
    for count in (threads, 1 if threads > 1 else 2):
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                there = pool.submit(_train_there, target, plan, start.pack(), count).result()
        except BrokenProcessPool as ended:
            raise LocalError("a process that trained the task again ended, perhaps for want of memory") from ended
        where = "another process" if count == threads else f"a process of {count} thread{'s' if count > 1 else ''}"
        same = there.initial == params_digest(params)
        broken = None if same else "it computes other bits, so that nobody could join"
        yield Check(f"{where} starts from the same bits", broken)
        if count == threads:
            yield Check("another process trains the same bits", _differs(first, Checkpoint.unpack(there.end)))
            continue
        error = max(relative_errors(_groups(start), _groups(first), _groups(Checkpoint.unpack(there.end))).values())
        broken = None
        if error > section.close:
            broken = f"its relative error is {error:.1e}; up to verify.close, {section.close:g}, counts as honest"
        yield Check(f"{where} trains nearly the same", broken, f"error {error:.1e}")


def _threads() -> int:
    torch = sys.modules.get("torch")
    return 1 if torch is None else int(torch.get_num_threads())


def _train_there(target: Target, plan: SegmentPlan, start: bytes, threads: int) -> _Elsewhere:
    if "torch" in sys.modules or importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
    task = target.make()
    end, _ = task.segment(Checkpoint.unpack(start), target.shards, plan)
    return _Elsewhere(params_digest(task.initial_params()), end.pack())


def _skipping(
    task: Task, target: Target, plan: SegmentPlan, start: Checkpoint, first: Checkpoint, section: VerifySection
) -> Check:
    """Would an audit see that one step was left out?"""
    short, _ = task.segment(start, target.shards, replace(plan, steps=plan.steps - 1))
    one, other = ({f"params/{name}": value for name, value in end.params.items()} for end in (first, short))
    began = {f"params/{name}": value for name, value in start.params.items()}
    error = relative_errors(began, one, other)["params"]
    broken = None
    if error < section.far:
        broken = f"the relative error is {error:.1e}, and blame begins at verify.far, {section.far:g}"
    return Check("an audit sees one step that was left out", broken, f"error {error:.1e}")


def _not_scored(task: Task, params: Tensors, shards: Sequence[Path]) -> str | None:
    with _someones("evaluate()"):
        untrained, given = task.evaluate(None, shards), task.evaluate(params, shards)
    if not isinstance(untrained, Mapping) or not untrained:
        return "evaluate() returns no map of names to figures"
    return None if untrained == given else f"None scores {dict(untrained)}, the initial parameters {dict(given)}"


def _scored_otherwise(used: Task, fresh: Task, params: Tensors, shards: Sequence[Path]) -> str | None:
    """Whether training left something behind that counts and is no parameter, such as running statistics."""
    with _someones("evaluate()"):
        here, there = used.evaluate(params, shards), fresh.evaluate(params, shards)
    return None if here == there else f"the instance that trained scores {dict(here)}, a new one {dict(there)}"


def _not_exported(task: Task, params: Tensors) -> str | None:
    with tempfile.TemporaryDirectory(prefix="p2pasr-check-") as folder:
        with _someones("export()"):
            task.export(params, Path(folder), {"run": bytes(32).hex(), "round": 0})
        return None if any(path.is_file() for path in Path(folder).rglob("*")) else "it writes no file"


def plan_for(steps: int, samples: int) -> SegmentPlan:
    """The first of two segments of a short run."""
    return SegmentPlan(blob_digest(b"task check"), steps, samples, 0, 2 * steps)
