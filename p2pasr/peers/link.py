"""The training process's handle on its network process: start, call, restart, stop."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from p2pasr.errors import LinkDown, LocalError, P2pasrError, TransportError
from p2pasr.peers import sockets
from p2pasr.peers.channel import encode_frame, error_from_wire, read_frame
from p2pasr.peers.config import LinkConfig

MODULE: Final = "p2pasr.network"
"""What the network process runs: `python -m p2pasr.network`."""

STARTUP_SECONDS: Final = 90.0
STOP_SECONDS: Final = 3.0
BACKOFF_SECONDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
LOOK_SECONDS: Final = 2.0
"""How often a call that may become needless is asked whether it has."""

EventHandler = Callable[[dict[str, Any]], None]
"""Called from the handle's thread with each event of the network process."""


@dataclass(slots=True)
class _Attempt:
    """One life of the network process."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    pending: dict[int, Future[dict[str, Any]]] = field(default_factory=dict)


class Link:
    """A network process that is kept alive.

    Args:
        config: what it is started with.
        on_event: told of its events: `ready`, `waiting`, `warning`, `down`.
        folder: the run's folder, for its log and the note of where its sockets lie.
    """

    def __init__(self, config: LinkConfig, on_event: EventHandler, folder: Path) -> None:
        self._sockets_note = folder / "sockets"
        self._socket_dir = sockets.make(self._sockets_note)
        self.config = replace(config, node=replace(config.node, socket_dir=str(self._socket_dir)))
        self._on_event = on_event
        self._log_path = folder / "network.log"
        self._log_path.unlink(missing_ok=True)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._attempt: _Attempt | None = None
        self._stopping = threading.Event()
        self._up = threading.Event()
        self._announcements: dict[str, dict[str, Any]] = {}
        self._failure: P2pasrError | None = None
        self._thread = threading.Thread(target=self._supervise, name="link", daemon=True)
        self._joined = False
        self.maddrs: tuple[str, ...] = ()
        self.restarts = 0

    def start(self) -> None:
        """Start the process; :meth:`joined` waits for it."""
        self._thread.start()

    def joined(self) -> None:
        """Wait until the process has joined the network.

        Raises:
            LocalError: it cannot run here (port in use, bad address, wrong clock, …).
            TransportError: it could not join in time.
        """
        deadline = time.monotonic() + STARTUP_SECONDS + self.config.node.join_seconds
        while not self._up.wait(0.1):
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > deadline:
                raise TransportError("the network process did not start in time; see " + str(self._log_path))

    def call(
        self, method: str, seconds: float, /, *, needless: Callable[[], bool] | None = None, **args: Any
    ) -> dict[str, Any]:
        """Ask the network process for something and wait for the answer.

        Args:
            seconds: how long to wait; when they are over the call is cancelled there too.
            needless: asked every now and then whether the answer is no longer wanted, which cancels the call as well.

        Raises:
            LinkDown: the process is down or died meanwhile; it is being restarted.
            TransportError: no answer in time, or none needed any more.
        """
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            attempt = self._attempt
            if attempt is None or not self._up.is_set():
                raise self._why_down("the network process is being restarted")
            number = next(self._ids)
            attempt.pending[number] = future
            self._send(attempt, {"id": number, "call": method, "args": args})
        deadline = time.monotonic() + seconds
        try:
            while True:
                left = deadline - time.monotonic()
                with contextlib.suppress(FutureTimeout):
                    return future.result(left if needless is None else min(left, LOOK_SECONDS))
                if time.monotonic() >= deadline:
                    raise TransportError(f"{method} was not done within {seconds:.0f} s")
                if needless is not None and needless():
                    raise TransportError(f"{method} is not needed any more")
        finally:
            with self._lock:
                if attempt.pending.pop(number, None) is not None and not future.done():
                    self._send(attempt, {"cancel": number})

    def announce(self, slot: str, kind: str, scope: str, record: bytes, ttl: float, *, wait: bool = True) -> None:
        """Publish a record and keep renewing it until it is replaced, across restarts.

        Args:
            slot: name under which a later call replaces it.
            kind, scope: where in the directory.
            record: packed `Signed` message.
            ttl: seconds that a copy lives without renewal.
            wait: until it is published, which takes seconds where peers in the directory have died.
        """
        args: dict[str, Any] = {"slot": slot, "kind": kind, "scope": scope, "record": record, "ttl": ttl}
        with self._lock:
            self._announcements[slot] = args
            attempt = self._attempt if self._up.is_set() else None
            if attempt is not None and not wait:
                self._send(attempt, {"id": next(self._ids), "call": "announce", "args": args})
        if wait:
            with contextlib.suppress(LinkDown):  # replayed when it is up again
                self.call("announce", 30.0, **args)

    def wait_up(self, timeout: float) -> None:
        """Wait until the process is up.

        Raises:
            LinkDown: it is not, after `timeout` seconds.
        """
        if not self._up.wait(timeout):
            raise self._why_down(f"the network process has not come back within {timeout:.0f} s")

    def stop(self) -> None:
        """End the process and remove its sockets; returns within a few seconds."""
        self._stopping.set()
        with self._lock:
            attempt = self._attempt
        if attempt is not None:
            with contextlib.suppress(OSError):
                attempt.channel.shutdown(socket.SHUT_WR)
            _end(attempt.process)
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)
        sockets.remove(self._sockets_note)

    def _why_down(self, sentence: str) -> P2pasrError:
        """The error for a call that cannot be made: what a person must mend, or else that a restart is under way."""
        failure = self._failure
        return failure if isinstance(failure, LocalError) else LinkDown(sentence + (f" ({failure})" if failure else ""))

    def _supervise(self) -> None:
        delays = _delays()
        while not self._stopping.is_set():
            try:
                was_up = self._live()
            except Exception as error:  # noqa: BLE001 (whatever it was, the next start may succeed)
                was_up = False
                self._failure = LinkDown(f"the network process failed ({type(error).__name__}: {error})")
            if self._stopping.is_set() or (not was_up and isinstance(self._failure, LocalError)):
                return
            if not self._joined and self._failure is not None:  # joined() reports it
                return
            if was_up:
                delays = _delays()
            delay = next(delays)
            reason = self._failure or "the network process died"
            self._on_event({"event": "down", "reason": f"{reason}; it is restarted in {delay:.0f} s"})
            self.restarts += 1
            self._stopping.wait(delay)

    def _live(self) -> bool:
        """Start one process and read what it says until it is gone; returns whether it was ever up."""
        self._socket_dir.mkdir(mode=0o700, exist_ok=True)  # systems tidy their temporary folder
        for path in self._socket_dir.iterdir():  # a killed daemon leaves its sockets
            path.unlink(missing_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = self._spawn(theirs)
            except BaseException:
                ours.close()
                raise
        attempt = _Attempt(process, ours)
        with self._lock:
            self._attempt = attempt
        self._failure = None
        was_up = False
        try:
            self._send(attempt, {"config": asdict(self.config)})
            while (message := read_frame(ours)) is not None:
                was_up |= self._take(attempt, message)
        finally:
            self._up.clear()
            with self._lock:
                self._attempt = None
                pending, attempt.pending = attempt.pending, {}
            for future in (future for future in pending.values() if not future.done()):
                future.set_exception(LinkDown("the network process died; the round is tried again when it is back"))
            ours.close()
            _end(process)
        return was_up

    def _spawn(self, channel: socket.socket) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", MODULE, str(channel.fileno())],
                pass_fds=[channel.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the training process only, which then ends this one
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )

    def _take(self, attempt: _Attempt, message: dict[str, Any]) -> bool:
        """Act on one message; returns whether it was the news that the process is up."""
        if "event" not in message:
            with self._lock:
                future = attempt.pending.get(message["id"])
            if future is not None and not future.done():
                if "error" in message:
                    future.set_exception(error_from_wire(message["error"]))
                else:
                    future.set_result(message["result"])
            return False
        if message["event"] == "fatal":
            self._failure = error_from_wire(message["error"])
            return False
        if message["event"] == "ready":
            self.maddrs = tuple(message["maddrs"])
            self._joined = True
            with self._lock:  # what is announced meanwhile comes after
                for args in self._announcements.values():
                    self._send(attempt, {"id": next(self._ids), "call": "announce", "args": args})
                self._up.set()
        self._on_event(message)
        return bool(message["event"] == "ready")

    def _send(self, attempt: _Attempt, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a dead process is noticed where its answers are read
            attempt.channel.sendall(encode_frame(message))


def _delays() -> Iterator[float]:
    """Seconds to wait before each restart in a row."""
    return itertools.chain(BACKOFF_SECONDS, itertools.repeat(BACKOFF_SECONDS[-1]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Give a process a moment to end by itself, then end it."""
    for end_it in (None, process.terminate, process.kill):
        if end_it is not None:
            end_it()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS / 2)
            return
