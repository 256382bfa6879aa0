"""Real peers as processes on this machine, watched through their JSON events.

The demo, the benchmarks and the swarm tests run their peers through this.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from p2pasr.errors import LocalError, TransportError

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 8.0

NODE: Final = (sys.executable, "-m", "p2pasr.bootstrap")
PEER: Final = (sys.executable, "-m", "p2pasr.peer")

Event = dict[str, Any]


@dataclass
class Process:
    """One peer or bootstrap node.

    Attributes:
        events: everything it has reported so far, oldest first.
        started: when it was started, seconds since 1970.
    """

    name: str
    popen: subprocess.Popen[str]
    log: Path
    on_event: Callable[[Process, Event], None] | None = None
    events: list[Event] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, name=f"read-{self.name}", daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self.popen.poll()

    @property
    def maddr(self) -> str:
        """An address that others can join through."""
        return str(self.wait_for("invite")["maddr"])

    def seen(self, event: str, **fields: Any) -> list[Event]:
        """Events of a kind with these values."""
        return [e for e in list(self.events) if e["event"] == event and all(e.get(k) == v for k, v in fields.items())]

    def wait_for(self, event: str, timeout: float = START_SECONDS, **fields: Any) -> Event:
        """The first event of a kind with these values, waiting for it if need be.

        Raises:
            TransportError: it did not come in time, or the process ended before.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (found := self.seen(event, **fields)):
                if self.exit_code is not None and not self._reader.is_alive():
                    raise TransportError(f"{self.name} ended with code {self.exit_code}: {self.last_words()}")
                if time.monotonic() > deadline:
                    raise TransportError(f"{self.name} did not report {event} {fields} within {timeout:.0f} s")
                self._changed.wait(0.5)
        return found[0]

    def wait(self, timeout: float) -> int:
        """Wait for its end and return the exit code.

        Raises:
            TransportError: it does not end in time.
        """
        try:
            code = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TransportError(f"{self.name} did not end within {timeout:.0f} s: {self.last_words()}") from None
        self._reader.join(5.0)
        return code

    def kill(self) -> None:
        """End it as a power cut would: at once, without a chance to tidy up."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        """End it as Ctrl-C does; after eight seconds by force."""
        if self.exit_code is None:
            self.popen.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_SECONDS)
        if self.exit_code is None:
            self.kill()

    def last_words(self) -> str:
        """The last thing it said, for an error message."""
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.log.is_file() else []
        )
        said = [line for line in lines if line.startswith("p2pasr: ")] or lines
        if said:
            return said[-1]
        return str(self.events[-1]["message"]) if self.events else "it said nothing"

    def _read(self) -> None:
        with self.popen:  # closes the pipe at its end
            for line in self.popen.stdout or ():
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                with self._changed:
                    self.events.append(event)
                    self._changed.notify_all()
                if self.on_event is not None:
                    self.on_event(self, event)


class Fleet:
    """Processes that end together. Use it as a context manager.

    Args:
        folder: for state folders and logs.
        on_event: called, from reader threads, with every event of every process.
    """

    def __init__(self, folder: Path, on_event: Callable[[Process, Event], None] | None = None) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self._on_event = on_event
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        stopping = [threading.Thread(target=process.stop) for process in reversed(self.processes)]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    def bootstrap(self, name: str = "bootstrap", *options: str, command: Sequence[str] = NODE) -> Process:
        """Start a bootstrap node, on loopback unless the options say otherwise."""
        key = self.folder / f"{name}.key"
        arguments = ["--identity-path", str(key), "--host-maddrs", "/ip4/127.0.0.1/tcp/0", *options]
        return self._start(name, [*command, *arguments])

    def peer(
        self,
        name: str,
        run: Path | str,
        *options: str,
        initial_peers: Sequence[str] = (),
        threads: int = 1,
        environment: dict[str, str] | None = None,
        command: Sequence[str] = PEER,
    ) -> Process:
        """Start a training peer, on loopback unless the options say otherwise.

        The same name uses the same state folder again.
        """
        arguments = ["--run", str(run), "--state-dir", str(self.folder / name), "--threads", str(threads)]
        arguments += ["--device", "cpu"]
        if "--client-mode" not in options and "--host-maddrs" not in options:
            arguments += ["--host-maddrs", "/ip4/127.0.0.1/tcp/0"]
        if initial_peers:
            arguments += ["--initial-peers", *initial_peers]
        return self._start(name, [*command, *arguments, *options], environment)

    def _start(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> Process:
        log = self.folder / "logs" / f"{name}.log"
        with log.open("a", encoding="utf-8") as errors:
            popen = subprocess.Popen(
                [*command, "--log-format", "json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # a Ctrl-C for the whole terminal is passed on by whoever runs the fleet
                env={**os.environ, **(environment or {})},
            )
        process = Process(name, popen, log, self._on_event)
        self.processes.append(process)
        return process


@contextlib.contextmanager
def fleet_of(
    folder: Path, run: Path, peers: int, seed_data: Path, on_event: Callable[[Process, Event], None] | None = None
) -> Iterator[tuple[Fleet, list[Process]]]:
    """A bootstrap node and training peers, the first of which holds the data.

    Raises:
        LocalError: the bootstrap node does not come up.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // peers)
    with Fleet(folder, on_event) as fleet:
        try:
            entry = fleet.bootstrap().maddr
        except TransportError as error:
            raise LocalError(str(error)) from error
        started = [
            fleet.peer(
                f"peer-{number}",
                run,
                *(("--seed-data", str(seed_data)) if number == 1 else ()),
                initial_peers=[entry],
                threads=threads,
            )
            for number in range(1, peers + 1)
        ]
        yield fleet, started
