"""What a peer shows to be admitted: made once, kept, and refused in one sentence where it is no good."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from p2pasr import tickets
from p2pasr.errors import LocalError
from p2pasr.member import Member
from p2pasr.peer import Peer
from p2pasr.peers.journal import Journal
from p2pasr.protocol.admission import TooEarly, has_worked
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import NO_TICKET, Invite, Ticket, seal
from p2pasr.report import Report
from p2pasr.round import check_admitted
from p2pasr.tickets import invite_text, make_ticket

from .builders import digest_of, make_identity, make_manifest, make_state

FOUNDER, GUEST, OTHER = map(make_identity, (1, 2, 3))
RUN = make_manifest(admission={"kind": "invite", "peers": (FOUNDER.peer,), "work_bits": 6})
QUIET = Report("json", io.StringIO())


def invite_file(folder: Path, by: Any = FOUNDER, guest: Any = GUEST, run: bytes = RUN.run_id) -> Path:
    path = folder / "invite"
    path.write_text(f"  {invite_text(seal(by, Invite(run, by.peer, guest.peer, 7)))}\n")
    return path


def test_a_ticket_is_made_once_and_kept(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = make_ticket(RUN, GUEST.peer, journal, invite_file(tmp_path), QUIET)
    assert has_worked(RUN.run_id, GUEST.peer, ticket.nonce, 6)
    monkeypatch.setattr(tickets, "work", pytest.fail)
    assert make_ticket(RUN, GUEST.peer, journal, None, QUIET) == ticket == journal.ticket()


def test_another_key_in_the_same_folder_works_for_itself_and_uses_nobody_elses_invite(
    journal: Journal, tmp_path: Path
) -> None:
    make_ticket(RUN, GUEST.peer, journal, invite_file(tmp_path), QUIET)
    ticket = make_ticket(RUN, OTHER.peer, journal, None, QUIET)
    assert ticket.invite == b""
    assert has_worked(RUN.run_id, OTHER.peer, ticket.nonce, 6)


def test_a_run_that_asks_for_nothing_gets_nothing(journal: Journal) -> None:
    assert make_ticket(make_manifest(), GUEST.peer, journal, None, QUIET) == NO_TICKET
    assert not (journal.folder / "ticket.json").exists()


def test_ctrl_c_ends_the_work(journal: Journal) -> None:
    report = Report("json", io.StringIO())
    report.interrupted = True
    hard = make_manifest(admission={"work_bits": 32})
    with pytest.raises(KeyboardInterrupt):
        make_ticket(hard, GUEST.peer, journal, None, report)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no invite; it holds the one line of hex digits"),
        (b"not hex", "is no invite; it holds"),
        ("廣東話".encode(), "is no invite; it holds"),
        (b"00" * 5000, "is no invite; it holds"),
        (b"c1", "is no invite of this peer to this run: a record is not canonical"),
    ],
)
def test_a_file_that_is_no_invite_is_refused(journal: Journal, tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(LocalError, match=sentence):
        make_ticket(RUN, GUEST.peer, journal, path, QUIET)


def test_the_invite_of_somebody_else_or_to_another_run_is_refused_with_the_reason(
    journal: Journal, tmp_path: Path
) -> None:
    with pytest.raises(LocalError, match=r"is for \S+, not for \S+$"):
        make_ticket(RUN, GUEST.peer, journal, invite_file(tmp_path, guest=OTHER), QUIET)
    with pytest.raises(LocalError, match="is for another run"):
        make_ticket(RUN, GUEST.peer, journal, invite_file(tmp_path, run=digest_of("other")), QUIET)
    with pytest.raises(LocalError, match=r"cannot be read \(No such file"):
        make_ticket(RUN, GUEST.peer, journal, tmp_path / "gone", QUIET)
    with pytest.raises(LocalError, match="asks for no invites; start without"):
        make_ticket(make_manifest(), GUEST.peer, journal, invite_file(tmp_path), QUIET)


@pytest.mark.parametrize("nonce", ["-1", "9223372036854775808", '"x"', "null"])
def test_a_kept_ticket_that_is_damaged_is_named(journal: Journal, nonce: str) -> None:
    (journal.folder / "ticket.json").write_text(f'{{"invite": "", "nonce": {nonce}}}')
    with pytest.raises(LocalError, match=r"ticket.json is damaged"):
        journal.ticket()


# --- at the start of a round ------------------------------------------------------------------------------------


def member(journal: Journal, ticket: Ticket, manifest: RunManifest, **changes: Any) -> Member:
    state = make_state(manifest)
    for name, value in changes.items():
        object.__setattr__(state, name, value)
    nothing: Any = None
    return Member(
        manifest, GUEST, nothing, nothing, nothing, journal, nothing, QUIET, state.params, state, ticket=ticket
    )


INVITING = make_manifest(admission={"kind": "invite", "peers": (FOUNDER.peer,)})


def ticket_by(who: Any, expires: int = 7) -> Ticket:
    return Ticket(seal(who, Invite(INVITING.run_id, who.peer, GUEST.peer, expires)).pack(), 0)


def test_a_guest_takes_part_with_its_invite_and_without_one_once_the_ledger_names_it(journal: Journal) -> None:
    check_admitted(member(journal, ticket_by(FOUNDER), INVITING))
    check_admitted(member(journal, NO_TICKET, INVITING, guests={GUEST.peer: FOUNDER.peer}))


@pytest.mark.parametrize(
    ("ticket", "changes", "sentence"),
    [
        (NO_TICKET, {}, "has no invite to this run; ask a member of this run for an invite of 12D3KooW"),
        (ticket_by(FOUNDER, expires=2), {"round": 3}, "expired after round 2, this is round 3; ask a member"),
        (ticket_by(FOUNDER), {"bans": {FOUNDER.peer: 1}}, "unused invites are void; ask a member"),
    ],
)
def test_a_guest_is_told_in_one_sentence_why_it_cannot_take_part(
    journal: Journal, ticket: Ticket, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(LocalError, match=sentence):
        check_admitted(member(journal, ticket, INVITING, **changes))


def test_a_guest_of_somebody_who_may_not_invite_yet_can_wait(journal: Journal) -> None:
    with pytest.raises(TooEarly):
        check_admitted(member(journal, ticket_by(OTHER), INVITING))


def test_a_peer_that_is_not_listed_is_told_so(journal: Journal) -> None:
    listed = make_manifest(admission={"kind": "allowlist", "peers": (FOUNDER.peer,)})
    with pytest.raises(LocalError, match="admits listed peers only"):
        check_admitted(member(journal, NO_TICKET, listed))


def test_who_holds_no_state_yet_believes_founders_and_who_invited_it(journal: Journal) -> None:
    fresh = member(journal, ticket_by(OTHER), INVITING)
    assert fresh.believed.guests == {OTHER.peer: OTHER.peer}
    assert fresh.view.guests == {}
    later = member(journal, ticket_by(OTHER), INVITING, round=3)
    assert later.believed.guests == {}


def test_a_peer_that_only_the_last_state_bans_learns_of_it(journal: Journal) -> None:
    held = member(journal, NO_TICKET, make_manifest(), round=10, bans={GUEST.peer: 9})
    peer = Peer(held.manifest)
    peer.member = held
    with pytest.raises(LocalError, match="this peer was banned from the run in round 9"):
        list(peer.rounds())
