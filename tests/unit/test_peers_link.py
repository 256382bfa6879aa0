"""The link: a network process that is started again, whatever ended it or kept it from starting."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pasr.errors import LinkDown, TransportError
from p2pasr.peers import link as module
from p2pasr.peers.config import LinkConfig, NodeConfig
from p2pasr.peers.link import Link

PROCESS = """
import socket, sys
from p2pasr.peers.channel import encode_frame, read_frame
channel = socket.socket(fileno=int(sys.argv[1]))
read_frame(channel)
channel.sendall(encode_frame({"event": "ready", "maddrs": ()}))
cancelled = 0
while (message := read_frame(channel)) is not None:
    cancelled += "cancel" in message
    if message.get("call") == "cancelled":
        channel.sendall(encode_frame({"id": message["id"], "result": {"count": cancelled}}))
    if message.get("call") == "die":
        sys.exit()
    if message.get("call") == "babble":
        channel.sendall(b"\\xff" * 8)
    if message.get("call") == "echo":
        channel.sendall(encode_frame({"id": message["id"], "result": message["args"]}))
    if message.get("call") == "announce":
        channel.sendall(encode_frame({"event": "announced", "record": message["args"]["record"]}))
    if message.get("call") == "tell":
        channel.sendall(encode_frame(message["args"]))
        channel.sendall(encode_frame({"id": message["id"], "result": {}}))
"""
"""A network process without a network."""


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[dict[str, Any]]) -> Iterator[Link]:
    (tmp_path / "standin.py").write_text(PROCESS.replace("\\\\", "\\"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "MODULE", "standin")
    monkeypatch.setattr(module, "BACKOFF_SECONDS", (0.05,))
    link = Link(LinkConfig(NodeConfig("", ""), bytes(32), ""), events.append, tmp_path)
    yield link
    link.stop()


def wait_for_restart(link: Link) -> None:
    deadline = time.monotonic() + 20
    while link.restarts == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    link.wait_up(20)
    assert link.call("echo", 10, word=1) == {"word": 1}


def test_calls_are_answered(link: Link) -> None:
    link.start()
    link.joined()
    assert link.call("echo", 10, word="hello") == {"word": "hello"}
    assert link.restarts == 0


def test_a_call_that_becomes_needless_is_given_up_and_cancelled(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in never answers an announcement, but counts what is cancelled."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    link.start()
    link.joined()
    looks = iter((False, False, True))
    with pytest.raises(TransportError, match="announce is not needed any more"):
        link.call("announce", 60, needless=lambda: next(looks), record=b"")
    assert list(looks) == []
    assert link.call("cancelled", 10, needless=lambda: False) == {"count": 1}
    with pytest.raises(TransportError, match="not done within 0 s"):
        link.call("announce", 0.1, needless=lambda: False, record=b"")


def test_an_event_is_told_whatever_its_fields_are_called(link: Link, events: list[dict[str, Any]]) -> None:
    link.start()
    link.joined()
    link.call("tell", 10, event="group", id=b"its name")
    assert events[-1] == {"event": "group", "id": b"its name"}


def test_records_are_announced_without_waiting_and_the_last_of_a_slot_again_after_a_restart(
    link: Link, events: list[dict[str, Any]]
) -> None:
    """The stand-in never answers an announcement: who waited for it would wait in vain."""
    link.start()
    link.joined()
    for record in (b"1", b"2"):
        link.announce("roster", "roster", "all", record, 20.0, wait=False)
    with pytest.raises(LinkDown):
        link.call("die", 10)
    link.announce("roster", "roster", "all", b"3", 20.0, wait=False)
    wait_for_restart(link)
    announced = [event["record"] for event in events if event["event"] == "announced"]
    assert announced == [b"1", b"2", b"3"]


@pytest.mark.parametrize(("call", "reason"), [("die", "the network process died"), ("babble", "out of step")])
def test_a_process_that_dies_or_babbles_is_started_again(
    link: Link, events: list[dict[str, Any]], call: str, reason: str
) -> None:
    link.start()
    link.joined()
    with pytest.raises(LinkDown):
        link.call(call, 10)
    wait_for_restart(link)
    (down,) = (event["reason"] for event in events if event["event"] == "down")
    assert reason in down
    assert "; it is restarted in 0 s" in down


def test_a_restart_that_fails_is_tried_again_and_told(
    link: Link, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    link.start()
    link.joined()
    spawn, failures = subprocess.Popen, [OSError("out of memory"), ValueError("something odd")]

    def spawn_at_last(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return spawn(*args, **kwargs)

    monkeypatch.setattr(module.subprocess, "Popen", spawn_at_last)
    with pytest.raises(LinkDown):
        link.call("die", 10)
    wait_for_restart(link)
    told = " ".join(event["reason"] for event in events if event["event"] == "down")
    assert "the network process failed (OSError: out of memory); it is restarted" in told
    assert "the network process failed (ValueError: something odd); it is restarted" in told
    assert link._thread.is_alive()


def test_a_first_start_that_fails_is_told_to_who_waits(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("out of memory")

    monkeypatch.setattr(module.subprocess, "Popen", fail)
    link.start()
    with pytest.raises(LinkDown, match=r"the network process failed \(OSError: out of memory\)"):
        link.joined()


def test_a_folder_for_sockets_that_was_tidied_away_is_made_again(link: Link) -> None:
    link.start()
    link.joined()
    shutil.rmtree(link.config.node.socket_dir)
    with pytest.raises(LinkDown):
        link.call("die", 10)
    wait_for_restart(link)
    assert Path(link.config.node.socket_dir).stat().st_mode & 0o777 == 0o700


def test_stopping_ends_the_process_and_the_thread(link: Link) -> None:
    link.start()
    link.joined()
    attempt = link._attempt
    assert attempt is not None
    link.stop()
    assert attempt.process.poll() is not None
    assert link._thread not in threading.enumerate()
    assert not Path(link.config.node.socket_dir).exists()
