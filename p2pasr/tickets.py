"""What a peer shows to be admitted: the invite in a file that a member gave it, and the proof of work of its key."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Final

from p2pasr.errors import LocalError, Reject
from p2pasr.peers.journal import Journal
from p2pasr.protocol.admission import has_worked, read_invite, work
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import MAX_INVITE_BYTES, Invite, Signed, Ticket
from p2pasr.report import Report

MAX_FILE_BYTES: Final = 4 * MAX_INVITE_BYTES
"""Longest invite file: hex digits, and space around them."""


def make_ticket(manifest: RunManifest, peer: str, journal: Journal, invite: Path | None, report: Report) -> Ticket:
    """This peer's ticket: kept from an earlier start, with an invite that was given now, with work that was done once.

    Args:
        invite: the file of an invite; None for the one that was given before, if any.

    Raises:
        LocalError: the file is no invite of this peer to this run.
        KeyboardInterrupt: Ctrl-C came while the work was done.
    """
    run, section = manifest.run_id, manifest.admission
    kept = ticket = journal.ticket()
    if invite is not None:
        if section.kind != "invite":
            raise LocalError(f"this run asks for no invites; start without --invite {invite}")
        ticket = replace(ticket, invite=read_invite_file(invite, run, peer))
    elif ticket.invite and not _is_ours(ticket.invite, run, peer):
        ticket = replace(ticket, invite=b"")  # the folder was used with another key before
    if not has_worked(run, peer, ticket.nonce, section.work_bits):
        ticket = replace(ticket, nonce=_work(run, peer, section.work_bits, report))
    if ticket != kept:
        journal.keep_ticket(ticket)
    return ticket


def read_invite_file(path: Path, run: bytes, guest: str) -> bytes:
    """The packed invite in a file.

    Raises:
        LocalError: the file cannot be read, or holds no invite of this guest to this run.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise LocalError(f"the invite {path} cannot be read ({error.strerror})") from error
    try:
        packed = bytes.fromhex(text.decode("ascii")) if len(text) <= MAX_FILE_BYTES else b""
    except ValueError:
        packed = b""
    if not packed:
        raise LocalError(f"{path} is no invite; it holds the one line of hex digits that `p2pasr invite` prints")
    try:
        read_invite(packed, run, guest)
    except Reject as error:
        raise LocalError(f"{path} is no invite of this peer to this run: {error}") from error
    return packed


def invite_text(invite: Signed[Invite]) -> str:
    """An invite as people pass it on: one line of hex digits."""
    return invite.pack().hex()


def _is_ours(invite: bytes, run: bytes, peer: str) -> bool:
    try:
        read_invite(invite, run, peer)
    except Reject:
        return False
    return True


def _work(run: bytes, peer: str, bits: int, report: Report) -> int:
    """The nonce of this key's proof of work."""
    label, expected = f"making this key's proof of work of {bits} bits", 1 << bits

    def on_tries(done: int) -> None:
        report.stop_if_interrupted()
        report.wait(f"{label}, once: {done / expected:.1f} times the usual number of tries so far")
        report.progress(label, min(done, expected - 1), expected)

    nonce = work(run, peer, bits, secrets.randbelow(1 << 62), on_tries)
    report.progress(label, expected, expected)
    return nonce
