"""What a peer must not forget when it is killed: which state it holds and what it has claimed.

Two invariants rest on it. A claim is written down before it is published, so a peer that is started
again, or comes back to a state after a fork, never publishes a different one for the same round and
state. The head moves only when a round is committed, so what a kill can cost is the round in progress.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from p2pasr.errors import LocalError
from p2pasr.peers.blobs import disk_errors, sync
from p2pasr.peers.config import is_peer_maddr
from p2pasr.protocol.messages import MAX_INVITE_BYTES, NO_TICKET, Ticket

T = TypeVar("T")

MAX_CLAIMS: Final = 16
"""How many of its claims a peer remembers, so that it makes none of them a second time."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A published claim.

    Attributes:
        round, state: what it was made for.
        claim: the packed signed claim.
        delta: digest of the encoded delta in the blob store.
        checkpoints: digests of the trace, segment by segment.
    """

    round: int
    state: bytes
    claim: bytes
    delta: bytes
    checkpoints: tuple[bytes, ...]


class Journal:
    """The files of one run in a peer's state folder.

    Args:
        folder: the run's folder; made if need be, and locked until the process ends.

    Raises:
        LocalError: another process uses the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            (folder / "lineage").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LocalError(f"the state folder {folder} cannot be used ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise LocalError(
                f"the state folder {folder} is in use by another process; give this one its own with --state-dir"
            ) from error

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self._lock)

    def head(self) -> bytes | None:
        """Digest of the state after the last committed round."""
        held = self.held()
        return held[max(held)] if held else None

    def held(self) -> dict[int, bytes]:
        """Round → digest of the state that this peer held before it."""
        return self.read_held(self.folder)

    @staticmethod
    def read_held(folder: Path) -> dict[int, bytes]:
        """The same, of a folder that a running peer may have locked."""
        return _read(folder / "states.json", _parse_held) or {}

    def hold(self, round_number: int, state: bytes) -> None:
        """A state is committed; what was held for this round and later ones is forgotten."""
        held = {number: digest for number, digest in self.held().items() if number < round_number}
        held[round_number] = state
        self._write("states.json", {str(number): digest.hex() for number, digest in sorted(held.items())})

    def pending(self) -> Pending | None:
        """The latest claim."""
        return next(reversed(self.claims()), None)

    def claimed(self, round_number: int, state: bytes) -> Pending | None:
        """The claim that was made in a round from a state, also where others were made since."""
        return next((each for each in self.claims() if (each.round, each.state) == (round_number, state)), None)

    def claims(self) -> tuple[Pending, ...]:
        """The last claims, in the order in which they were made."""
        return _read(self.folder / "claims.json", _parse_claims) or ()

    def pend(self, pending: Pending) -> None:
        """Write down a claim before it is published."""
        kept = [*self.claims(), pending][-MAX_CLAIMS:]
        self._write("claims.json", {"claims": [_pending_as_json(each) for each in kept]})

    def stated(self) -> bytes | None:
        """The packed statement about the last mix; a peer's vote in it is final."""
        return _read(self.folder / "mix.json", lambda content: bytes.fromhex(content["mix"]))

    def state_mix(self, mix: bytes) -> None:
        """Write down a statement about a mix before it is published."""
        self._write("mix.json", {"mix": mix.hex()})

    def ticket(self) -> Ticket:
        """What was kept of what this peer shows to be admitted."""
        return _read(self.folder / "ticket.json", _parse_ticket) or NO_TICKET

    def keep_ticket(self, ticket: Ticket) -> None:
        """Replace what :meth:`ticket` returns."""
        self._write("ticket.json", {"invite": ticket.invite.hex(), "nonce": ticket.nonce})

    def traces(self) -> dict[int, dict[str, Any]]:
        """Round → {claim, delta, checkpoints, average} in hex, as far as kept; "" for an average that it never had."""
        return _read(self.folder / "traces.json", _parse_traces) or {}

    def keep_traces(self, traces: dict[int, dict[str, Any]]) -> None:
        """Replace what :meth:`traces` returns."""
        self._write("traces.json", {str(number): trace for number, trace in traces.items()})

    def known_peers(self) -> tuple[str, ...]:
        """Multiaddrs of peers that were there last time."""
        return self.read_known_peers(self.folder)

    @staticmethod
    def read_known_peers(folder: Path) -> tuple[str, ...]:
        """The same, of a folder that a running peer may have locked."""
        return _read(folder / "peers.json", _parse_peers) or ()

    def remember_peers(self, maddrs: tuple[str, ...]) -> None:
        """Write down entry points for the next start; what is no peer's address is left out."""
        self._write("peers.json", {"maddrs": list(filter(is_peer_maddr, maddrs))})

    def record(self, round_number: int, record: bytes) -> None:
        """Add a round record to the lineage."""
        self._replace(self.folder / "lineage" / f"{round_number:08d}.msgpack", record)

    def read_record(self, round_number: int) -> bytes | None:
        """The packed record of a round; None where this peer took no part in it."""
        path = self.folder / "lineage" / f"{round_number:08d}.msgpack"
        return path.read_bytes() if path.is_file() else None

    @staticmethod
    def read_records(folder: Path) -> list[bytes]:
        """The packed round records of a folder that a running peer may have locked, in the order of the rounds."""
        return [path.read_bytes() for path in sorted((folder / "lineage").glob("*.msgpack"))]

    def prove(self, name: str, proof: bytes) -> Path:
        """Keep a proof against a peer; returns where it lies."""
        path = self.folder / "evidence" / f"{name}.msgpack"
        path.parent.mkdir(exist_ok=True)
        self._replace(path, proof)
        return path

    def note_audit(self, round_number: int, audit: bytes) -> None:
        """Keep what this peer found when it checked a round."""
        path = self.folder / "audits" / f"{round_number:08d}.msgpack"
        path.parent.mkdir(exist_ok=True)
        self._replace(path, audit)

    @staticmethod
    def read_audits(folder: Path) -> list[bytes]:
        """The packed audits of a folder that a running peer may have locked, in the order of the rounds."""
        return [path.read_bytes() for path in sorted((folder / "audits").glob("*.msgpack"))]

    @staticmethod
    def read_proofs(folder: Path) -> list[Path]:
        """The files of :meth:`prove`, of a folder that a running peer may have locked."""
        return sorted((folder / "evidence").glob("*.msgpack"))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self._replace(self.folder / name, json.dumps(content, indent=1).encode())

    def _replace(self, path: Path, data: bytes) -> None:
        part = path.with_name(path.name + ".part")
        try:
            with disk_errors(self.folder):
                part.write_bytes(data)
                sync(part)
                part.replace(path)
                sync(path.parent)
        finally:  # Ctrl-C may come at any moment
            part.unlink(missing_ok=True)


def _read(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """What a file holds; None if there is none.

    Raises:
        LocalError: it is not what was written there.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else "a field is missing or of another type"
        raise LocalError(f"{path} is damaged ({what}); delete it to start from the network's state") from error


def _parse_held(content: dict[str, Any]) -> dict[int, bytes]:
    return {int(number): bytes.fromhex(state) for number, state in content.items()}


def _pending_as_json(pending: Pending) -> dict[str, Any]:
    return {
        "round": pending.round,
        "state": pending.state.hex(),
        "claim": pending.claim.hex(),
        "delta": pending.delta.hex(),
        "checkpoints": [digest.hex() for digest in pending.checkpoints],
    }


def _parse_claims(content: dict[str, Any]) -> tuple[Pending, ...]:
    return tuple(map(_parse_pending, content["claims"]))


def _parse_pending(content: dict[str, Any]) -> Pending:
    return Pending(
        round=int(content["round"]),
        state=bytes.fromhex(content["state"]),
        claim=bytes.fromhex(content["claim"]),
        delta=bytes.fromhex(content["delta"]),
        checkpoints=tuple(map(bytes.fromhex, content["checkpoints"])),
    )


def _parse_ticket(content: dict[str, Any]) -> Ticket:
    invite, nonce = bytes.fromhex(content["invite"]), int(content["nonce"])
    if len(invite) > MAX_INVITE_BYTES or not 0 <= nonce < 1 << 63:
        raise ValueError("it holds more than a ticket can")
    return Ticket(invite, nonce)


def _parse_traces(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    for trace in content.values():
        bytes.fromhex("".join([trace["claim"], trace["delta"], trace["average"], *trace["checkpoints"]]))
    return {int(number): trace for number, trace in content.items()}


def _parse_peers(content: dict[str, Any]) -> tuple[str, ...]:
    return tuple(filter(is_peer_maddr, content["maddrs"]))
