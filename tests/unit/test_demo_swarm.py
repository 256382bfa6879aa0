"""What the demo shows and reports of its peers."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from p2pasr.demo.fleet import Process
from p2pasr.demo.swarm import Board, ban_report, judge, run_demo
from p2pasr.errors import LocalError

CHEAT, ANNE, BEN = "12D3KooWcheat0", "12D3KooWanne00", "12D3KooWben000"


@dataclass
class Told:
    """A process of which nothing is left but what it told."""

    name: str
    peer: str
    events: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    seen = Process.seen

    def __post_init__(self) -> None:
        self.tell("ready", peer=self.peer)

    def tell(self, event: str, **fields: Any) -> dict[str, Any]:
        self.events.append({"event": event, "message": f"it came to {event}", **fields})
        return self.events[-1]

    def round(self, number: int, peers: list[str], banned: tuple[str, ...] = ()) -> dict[str, Any]:
        state = bytes([number]).hex() * 32
        return self.tell("round", round=number, peers=peers, banned=list(banned), state=state, bytes_sent=10**6)

    def wait_for(self, event: str) -> dict[str, Any]:
        return self.seen(event)[0]


def shown(board: Board) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(board)
    return console.export_text()


def board_of(*processes: Told) -> Board:
    board = Board(rounds=8)
    for process in processes:
        for event in process.events:
            board.on_event(process, event)
    return board


def test_whoever_is_banned_is_shown_so_whatever_it_says_afterwards() -> None:
    cheat, anne = Told("cheat", CHEAT), Told("peer-1", ANNE)
    cheat.tell("step", step="train", round=3, state="ab" * 32)
    anne.round(2, [CHEAT, ANNE], (CHEAT,))
    cheat.tell("step", step="sync", round=3, state="ab" * 32)
    cheat.tell("error")
    text = shown(board_of(anne, cheat))
    (row,) = [line for line in text.splitlines() if line.startswith("│ cheat")]
    assert "banned" in row
    assert "cheat: banned in round 2: others hold the proof" in text
    assert "it came to error" not in text


def test_honest_rows_show_their_step_and_what_they_wait_for() -> None:
    anne = Told("peer-1", ANNE)
    anne.round(0, [ANNE])
    anne.tell("step", step="average", round=1, state="ab" * 32)
    anne.tell("wait")
    text = shown(board_of(anne))
    assert "average" in text
    assert "peer-1: it came to wait" in text
    assert "banned" not in text


def test_a_ban_is_counted_from_the_first_round_that_the_cheat_was_in(tmp_path: Path) -> None:
    cheat, anne, ben = Told("cheat", CHEAT), Told("peer-1", ANNE), Told("peer-2", BEN)
    for process in (anne, ben):
        process.round(0, [ANNE, BEN])
        process.round(1, [ANNE, BEN, CHEAT])
        process.round(2, [ANNE, BEN, CHEAT], (CHEAT,))
        process.round(3, [ANNE, BEN])
    ben.tell("evidence", peer=CHEAT, path=str(tmp_path / "proof"))
    verdict = judge(cheat, [anne, ben])
    assert verdict is not None
    assert (verdict.peer, verdict.round, verdict.rounds_to_ban) == (CHEAT, 2, 2)
    assert ban_report(verdict) == {
        "cheater_banned": True,
        "rounds_to_ban": 2,
        "evidence": str((tmp_path / "proof").resolve()),
    }


@pytest.mark.parametrize("banned", [(), (BEN,)])
def test_a_cheat_that_was_not_banned_has_no_verdict(banned: tuple[str, ...]) -> None:
    cheat, anne = Told("cheat", CHEAT), Told("peer-1", ANNE)
    anne.round(0, [ANNE, BEN, CHEAT], banned)
    anne.tell("evidence", peer=CHEAT, path="proof")
    assert judge(cheat, [anne]) is None
    assert ban_report(None) == {"cheater_banned": False, "rounds_to_ban": None, "evidence": None}


@pytest.mark.parametrize(("peers", "rounds"), [(1, None), (3, 3)])
def test_where_nobody_can_be_banned_the_demo_says_so_before_it_begins(
    tmp_path: Path, peers: int, rounds: int | None
) -> None:
    with pytest.raises(LocalError, match="2 honest peers and up to 4 rounds; give more, or --no-cheater"):
        run_demo(tmp_path / "out", peers, rounds)
    assert not (tmp_path / "out").exists()
