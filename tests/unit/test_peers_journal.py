"""The journal: what a peer still knows after it was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pasr.errors import LocalError
from p2pasr.peers.journal import MAX_CLAIMS, Journal, Pending

from .builders import digest_of, make_identity

PENDING = Pending(3, digest_of("state"), b"a claim", digest_of("delta"), (digest_of("one"), digest_of("two")))

MADDRS = tuple(f"/ip4/203.0.113.{number}/tcp/31337/p2p/{make_identity(number).peer}" for number in (5, 6))


def reopened(journal: Journal) -> Journal:
    """The same folder, as the next process sees it."""
    journal.close()
    journal.__init__(journal.folder)
    return journal


def test_a_new_journal_knows_nothing(journal: Journal) -> None:
    assert journal.head() is None
    assert journal.held() == {}
    assert journal.pending() is None
    assert journal.traces() == {}
    assert journal.known_peers() == ()


def test_the_head_is_the_state_of_the_latest_round(journal: Journal) -> None:
    for number in (0, 1, 2, 10):
        journal.hold(number, digest_of(f"state {number}"))
    assert reopened(journal).head() == digest_of("state 10")
    assert journal.held() == {number: digest_of(f"state {number}") for number in (0, 1, 2, 10)}
    assert Journal.read_held(journal.folder) == journal.held()


def test_going_back_forgets_what_came_after(journal: Journal) -> None:
    for number in range(5):
        journal.hold(number, digest_of(f"state {number}"))
    journal.hold(2, digest_of("another state"))
    assert reopened(journal).held() == {
        0: digest_of("state 0"),
        1: digest_of("state 1"),
        2: digest_of("another state"),
    }
    assert journal.head() == digest_of("another state")


def test_a_claim_that_was_written_down_is_found_again_until_the_next(journal: Journal) -> None:
    journal.pend(PENDING)
    assert reopened(journal).pending() == PENDING
    other = Pending(4, digest_of("later"), b"", digest_of("delta"), ())
    journal.pend(other)
    assert reopened(journal).pending() == other


def test_earlier_claims_are_found_by_round_and_state_until_there_are_too_many(journal: Journal) -> None:
    claims = [Pending(n // 2, digest_of(f"line {n % 2}"), bytes([n]), digest_of("delta"), ()) for n in range(20)]
    for claim in claims:
        journal.pend(claim)
    assert reopened(journal).claims() == tuple(claims[-MAX_CLAIMS:])
    for claim in claims[-MAX_CLAIMS:]:
        assert journal.claimed(claim.round, claim.state) == claim
    assert journal.claimed(9, digest_of("another line")) is None
    assert journal.claimed(0, claims[0].state) is None


def test_traces_peers_and_records_are_found_again(journal: Journal) -> None:
    traces = {
        3: {"claim": "99", "delta": "aa", "checkpoints": ["bb"], "average": "dd"},
        4: {"claim": "", "delta": "cc", "checkpoints": [], "average": "ee"},
    }
    journal.keep_traces(traces)
    journal.remember_peers(MADDRS)
    journal.record(7, b"record")
    assert reopened(journal).traces() == traces
    assert journal.known_peers() == MADDRS
    assert (journal.folder / "lineage" / "00000007.msgpack").read_bytes() == b"record"


def test_what_is_no_peers_address_is_neither_remembered_nor_known(journal: Journal) -> None:
    wrong = ("", "/ip4/203.0.113.5/tcp/1", MADDRS[0] + "," + MADDRS[1], MADDRS[0] + " --help", "-help" + MADDRS[0])
    journal.remember_peers((*wrong, *MADDRS))
    assert journal.known_peers() == MADDRS
    (journal.folder / "peers.json").write_text(json.dumps({"maddrs": [*MADDRS, *wrong]}))
    assert journal.known_peers() == MADDRS


def test_what_is_written_down_survives_a_power_cut(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("p2pasr.peers.journal.sync", synced.append)
    journal.hold(1, digest_of("state"))
    assert synced == [journal.folder / "states.json.part", journal.folder]


def test_one_process_at_a_time_uses_a_folder(journal: Journal) -> None:
    with pytest.raises(LocalError, match=r"in use by another process.*--state-dir"):
        Journal(journal.folder)
    code = "import pathlib, sys; from p2pasr.peers.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(journal.folder)]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "LocalError" in other.stderr
    assert reopened(journal).head() is None


def test_a_held_folder_can_still_be_looked_at(journal: Journal) -> None:
    journal.hold(1, digest_of("state"))
    assert Journal.read_held(journal.folder) == {1: digest_of("state")}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalError, match="cannot be used"):
        Journal(tmp_path / "file" / "run")


READERS: dict[str, Callable[[Journal], Any]] = {
    "states.json": Journal.held,
    "claims.json": Journal.claims,
    "traces.json": Journal.traces,
    "peers.json": Journal.known_peers,
}


def check_that_it_is_one_sentence(journal: Journal, name: str, data: bytes) -> None:
    path = journal.folder / name
    path.write_bytes(data)
    with pytest.raises(LocalError) as caught:
        READERS[name](journal)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith("; delete it to start from the network's state")
    assert "\n" not in message


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("data", [b"", b"{", b'{"0": "aa', b"\xff\xfe", b"\x00" * 100, b"{}{}", b"nonsense"])
def test_a_damaged_file_is_one_clear_sentence(journal: Journal, name: str, data: bytes) -> None:
    check_that_it_is_one_sentence(journal, name, data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((name, b"[1]") for name in READERS),
        ("states.json", b'{"x": "aa"}'),
        ("states.json", b'{"0": 7}'),
        ("claims.json", b"{}"),
        ("claims.json", b'{"claims": 7}'),
        ("claims.json", b'{"claims": [{"round": 1, "state": "zz", "claim": "", "delta": "", "checkpoints": []}]}'),
        ("claims.json", b'{"claims": [{"round": 1, "state": "", "claim": 7, "delta": "", "checkpoints": []}]}'),
        ("claims.json", b'{"claims": [{"round": "x", "state": "", "claim": "", "delta": "", "checkpoints": []}]}'),
        ("traces.json", b'{"x": {"claim": "", "delta": "", "checkpoints": []}}'),
        ("traces.json", b'{"0": {"claim": "", "delta": "", "average": "", "checkpoints": ["zz"]}}'),
        ("traces.json", b'{"0": {"delta": "", "checkpoints": []}}'),
        ("traces.json", b'{"0": {"delta": ""}}'),
        ("traces.json", b'{"0": 7}'),
        ("peers.json", b"{}"),
        ("peers.json", b'{"maddrs": [7]}'),
    ],
)
def test_a_file_that_is_json_of_another_form_is_the_same_sentence(journal: Journal, name: str, data: bytes) -> None:
    check_that_it_is_one_sentence(journal, name, data)


def test_a_write_that_was_cut_short_leaves_what_was_there_before(journal: Journal) -> None:
    journal.hold(1, digest_of("state"))
    (journal.folder / "states.json.part").write_bytes(b'{"1": "dead')
    assert reopened(journal).head() == digest_of("state")
    journal.hold(2, digest_of("next"))
    assert journal.head() == digest_of("next")
    assert not (journal.folder / "states.json.part").exists()
