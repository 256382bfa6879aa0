"""Joining the network: whom to dial, and what is said when nobody answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from p2pasr.errors import TransportError
from p2pasr.peers.config import NodeConfig, is_peer_maddr
from p2pasr.peers.node import NEIGHBOURS, Node, _can_be_dialled

from .builders import make_identity

PEER = make_identity(1).peer

GOOD = [
    f"/ip4/203.0.113.5/tcp/31337/p2p/{PEER}",
    f"/ip6/2001:db8::5/tcp/31337/p2p/{PEER}",
    f"/dns4/example.org/tcp/31337/p2p/{PEER}",
    f"/ip4/203.0.113.5/udp/31337/quic/p2p/{PEER}",
]

BAD = [
    "",
    "/ip4/203.0.113.5/tcp/31337",
    f"-help/tcp/1/p2p/{PEER}",
    f"{GOOD[0]},{GOOD[1]}",
    f"{GOOD[0]} {GOOD[1]}",
    f"{GOOD[0]}\n",
]

READ_BY_LIBP2P_ALONE = [
    f"/ip4/203.0.113.555/tcp/31337/p2p/{PEER}",
    f"/ip4/203.0.113.5/tcp/99999/p2p/{PEER}",
    f"/nowhere/203.0.113.5/p2p/{PEER}",
    f"/ip4/203.0.113.5/tcp/31337/p2p/{'1' * 52}",
]


@pytest.mark.parametrize("maddr", GOOD)
def test_a_peers_address_can_be_dialled(maddr: str) -> None:
    assert is_peer_maddr(maddr)
    assert _can_be_dialled(maddr)


@pytest.mark.parametrize("maddr", BAD + READ_BY_LIBP2P_ALONE)
def test_what_is_no_address_is_not_dialled(maddr: str) -> None:
    assert is_peer_maddr(maddr) == (maddr in READ_BY_LIBP2P_ALONE)
    assert not _can_be_dialled(maddr)


def test_known_peers_are_tried_in_turn_but_not_what_is_no_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial, known = GOOD[:1], GOOD[1:2]
    dialled: list[list[str]] = []

    async def nobody(_node: Node, peers: tuple[str, ...]) -> None:
        dialled.append(list(peers))
        raise TransportError("nobody answers")

    async def at_once(_seconds: float) -> None:
        return None

    monkeypatch.setattr(Node, "_start_daemon", nobody)
    monkeypatch.setattr("p2pasr.peers.node.asyncio.sleep", at_once)
    monkeypatch.setattr("p2pasr.peers.node.time.monotonic", lambda: 10.0 * len(dialled))
    waited: list[str] = []
    node = Node(
        NodeConfig(
            identity_path=str(tmp_path / "identity.key"),
            socket_dir="",
            initial_peers=tuple(initial),
            known_peers=(*BAD, *known, *READ_BY_LIBP2P_ALONE),
            join_seconds=35.0,
        ),
        waited.append,
    )
    with pytest.raises(TransportError, match="nobody answers"):
        asyncio.run(node.start())
    assert dialled == [initial, known, initial, known][: len(dialled)]
    assert len(dialled) > 2
    assert waited[0] == "nobody answers; trying again in 1 s"


class Dht:
    """As much of hivemind's node as losing touch needs."""

    def __init__(self, connected: list[str], known: list[str]) -> None:
        self.connected = [SimpleNamespace(peer_id=peer) for peer in connected]
        self.pinged: list[str] = []
        self.protocol = self
        self.routing_table = SimpleNamespace(peer_id_to_uid=dict.fromkeys(known))

    async def list_peers(self) -> list[SimpleNamespace]:
        return self.connected

    async def call_ping(self, peer: str) -> None:
        self.pinged.append(peer)


def node_with(folder: Path, dht: Dht) -> Node:
    node = Node(NodeConfig(str(folder / "identity.key"), ""), pytest.fail)
    node._p2p = node._dht = dht
    return node


def test_connected_peers_that_the_dht_has_dropped_are_brought_back(tmp_path: Path) -> None:
    dht = Dht(connected=["a", "b", "c"], known=["b"])
    asyncio.run(node_with(tmp_path, dht)._touch())
    assert sorted(dht.pinged) == ["a", "c"]


def test_who_knows_many_peers_asks_no_more_and_never_all_at_once(tmp_path: Path) -> None:
    crowd = [str(number) for number in range(100)]
    dht = Dht(connected=crowd, known=crowd[:NEIGHBOURS])
    asyncio.run(node_with(tmp_path, dht)._touch())
    assert dht.pinged == []
    dht = Dht(connected=crowd, known=crowd[:1])
    asyncio.run(node_with(tmp_path, dht)._touch())
    assert len(dht.pinged) == NEIGHBOURS


def test_losing_touch_is_looked_for_again_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pasr.peers.node.TOUCH_SECONDS", 0.01)
    dht = Dht(connected=["a"], known=[])
    failures = [OSError("the daemon is busy")]

    async def list_peers() -> list[SimpleNamespace]:
        if failures:
            raise failures.pop()
        return dht.connected

    async def main() -> None:
        dht.list_peers = list_peers
        touching = asyncio.create_task(node_with(tmp_path, dht)._keep_in_touch())
        async with asyncio.timeout(10):
            while not dht.pinged:
                await asyncio.sleep(0.01)
        touching.cancel()

    asyncio.run(main())
