"""Telling people and programs what a peer does: one sentence an event, as text or as JSON lines."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import warnings
from typing import Any, Final, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

LogFormat = Literal["text", "json"]

REPEAT_SECONDS: Final = 15.0
"""A sentence that has just been said is not said again within this time."""

_STYLES: Final = {"warning": "yellow", "wait": "cyan", "round": "bold green", "error": "bold red", "ready": "bold"}


class Report:
    """Where a peer's events go.

    Args:
        log_format: `text` for people (with a live progress line on a terminal), `json` for programs:
            one object a line with `time`, `event`, `message` and the event's own fields.
        out: a text stream; standard output if None.
    """

    def __init__(self, log_format: LogFormat = "text", out: TextIO | None = None) -> None:
        self._json = log_format == "json"
        self._out = out or sys.stdout
        self._lock = threading.Lock()
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

    def wait(self, reason: str) -> None:
        """Say what is being waited for; the same sentence at most every fifteen seconds."""
        now = time.monotonic()
        if now - self._said.get(reason, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._said = {known: said for known, said in self._said.items() if now - said < REPEAT_SECONDS}
            self._said[reason] = now
            self.emit("wait", reason)

    def warn(self, message: str) -> None:
        """Report something that is survived; the same sentence at most every fifteen seconds."""
        now = time.monotonic()
        if now - self._said.get(message, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._said[message] = now
            self.emit("warning", message)

    def progress(self, label: str, done: int, total: int) -> None:
        """Move the live line on a terminal; silent elsewhere."""
        if self._json or not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._bar = self._progress.add_task(label, total=total)
            self._progress.start()
        if self._bar is not None:
            self._progress.update(self._bar, description=label, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def quiet_libraries() -> None:
    """Keep the training libraries' progress bars and notices out of a command's output."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return str(value)
