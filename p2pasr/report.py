"""Telling people and programs what a peer does: one sentence an event, as text or as JSON lines."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal, TextIO

from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

LogFormat = Literal["text", "json"]

REPEAT_SECONDS: Final = 15.0
"""A sentence that has just been said is not said again within this time."""

MAX_SAID: Final = 256
"""How many sentences are remembered for that; strangers can cause new ones at will."""

_COLUMNS: Final = {"cer": "CER", "wer": "WER", "per": "PER", "eer": "EER", "auroc": "AUROC", "ece": "ECE"}
"""Scores whose name in a table is an abbreviation."""

_RATES: Final = re.compile(r"(cer|wer|per|eer|accuracy|exact|misses)(_.*)?")
"""Scores that are shares of something and shown in percent."""

_STYLES: Final = {"warning": "yellow", "wait": "cyan", "round": "bold green", "error": "bold red", "ready": "bold"}


class Report:
    """Where a peer's events go.

    Args:
        log_format: `text` for people (with a live progress line on a terminal), `json` for programs:
            one object a line with `time`, `event`, `message` and the event's own fields.
        out: a text stream; standard output if None.
    """

    def __init__(self, log_format: LogFormat = "text", out: TextIO | None = None) -> None:
        self.interrupted = False
        self._json = log_format == "json"
        self._out = out or sys.stdout
        self._lock = threading.RLock()
        self._said: dict[str, float] = {}
        self._console = Console(file=self._out, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._bar: TaskID | None = None

    def emit(self, event: str, message: str, **fields: Any) -> None:
        """Report an event.

        Args:
            event: its kind, such as `step`, `segment`, `round`, `wait`, `warning`.
            message: one sentence for a person.
            fields: values for a program; bytes are written as hex.
        """
        message = "".join(char if char.isprintable() else " " for char in message)  # it may quote a stranger
        with self._lock:
            if self._json:
                record = {"time": round(time.time(), 3), "event": event, "message": message, **fields}
                self._out.write(json.dumps(record, ensure_ascii=False, default=_plain) + "\n")
                self._out.flush()
            else:
                clock = time.strftime("%H:%M:%S")
                style = _STYLES.get(event, "")
                self._console.print(f"[dim]{clock}[/dim] ", end="")
                self._console.print(message, style=style, markup=False)

    def stop_if_interrupted(self) -> None:
        """End the work if Ctrl-C came, also where Python swallowed it, as it does in finalizers and callbacks.

        Raises:
            KeyboardInterrupt: it came.
        """
        if self.interrupted:
            raise KeyboardInterrupt

    def wait(self, reason: str) -> None:
        """Say what is being waited for; the same sentence at most every fifteen seconds."""
        if self._is_news(reason):
            self.emit("wait", reason)

    def warn(self, message: str) -> None:
        """Report something that is survived; the same sentence at most every fifteen seconds."""
        if self._is_news(message):
            self.emit("warning", message)

    def _is_news(self, sentence: str) -> bool:
        """Whether a sentence was not said just now; remembers that it is said."""
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(sentence, -REPEAT_SECONDS) < REPEAT_SECONDS:
                return False
            self._said.pop(sentence, None)
            self._said[sentence] = now
            if len(self._said) > MAX_SAID:
                del self._said[next(iter(self._said))]
            return True

    def progress(self, label: str, done: int, total: int) -> None:
        """Move the live line on a terminal; silent elsewhere."""
        if self._json or not self._console.is_terminal:
            return
        with self._lock:
            if self._progress is None:
                columns = (
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.percentage:>3.0f} %"),
                )
                self._progress = Progress(*columns, console=self._console, transient=True)
                self._bar = self._progress.add_task(label, total=total)
                self._progress.start()
            if self._bar is not None:
                self._progress.update(self._bar, description=label, completed=done, total=total)
            if done >= total:
                self.close()

    def fail(self, error: Exception) -> None:
        """Report, on standard error, what ends a command; for programs as an event too."""
        self.close()
        sentence = str(error)
        if isinstance(error, OSError) and error.strerror:
            sentence = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if self._json:
            self.emit("error", sentence)
        print(f"p2pasr: {sentence}", file=sys.stderr)

    def close(self) -> None:
        """Remove the live line."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while the block runs; yields a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(label, total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield on_progress


def error_rate_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Group:
    """Scores as people read them: a line a model, and a table of its own for whatever a score is made of.

    Args:
        title: what was scored.
        rows: model → its scores, the same for all: numbers, None where there is none, text, or mappings of these.
            A mapping of mappings with equal keys, such as a confusion matrix, is one table for each model.
    """
    return Group(*_score_tables(title, rows))


def _score_tables(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Text | Table]:
    first = next(iter(rows.values()))
    plain = [name for name, value in first.items() if not isinstance(value, Mapping)]
    if plain:
        yield Text(title, style="italic")
        yield _score_table("model", {row: {name: scores[name] for name in plain} for row, scores in rows.items()})
    for name in (name for name in first if name not in plain):
        inner = {row: scores[name] for row, scores in rows.items()}
        if _is_matrix(first[name]):
            for row, matrix in inner.items():
                yield Text(f"{title}: {name}, {row}", style="italic")
                yield _score_table("", matrix)
        else:
            yield from _score_tables(f"{title}: {name}", inner)


def _score_table(corner: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table()
    table.add_column(corner)
    for name in next(iter(rows.values())):
        table.add_column(_COLUMNS.get(name, name.replace("_", " ")), justify="right")
    for row, scores in rows.items():
        table.add_row(row, *(_shown(name, value) for name, value in scores.items()))
    return table


def _is_matrix(scores: Mapping[str, Any]) -> bool:
    rows = list(scores.values())
    return bool(rows) and all(
        isinstance(row, Mapping)
        and row.keys() == rows[0].keys()
        and not any(isinstance(value, Mapping) for value in row.values())
        for row in rows
    )


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1%}" if _RATES.fullmatch(name) else f"{value:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return str(value)
