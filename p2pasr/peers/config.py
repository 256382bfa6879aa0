"""What a person decides about a peer's place in the network; plain values that cross processes."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Where to listen and whom to join.

    Attributes:
        identity_path: the node's key.
        socket_dir: where the libp2p daemon's sockets lie; a short path, removed at the end.
        host_maddrs: multiaddrs to listen on.
        announce_maddrs: multiaddrs to tell others instead, for forwarded ports.
        initial_peers: multiaddrs of peers or bootstrap nodes to join through.
        known_peers: multiaddrs that worked before, tried when those do not answer.
        client_mode: open no port and accept no connection.
        join_seconds: how long to keep trying to reach the initial peers.
    """

    identity_path: str
    socket_dir: str
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    initial_peers: tuple[str, ...] = ()
    known_peers: tuple[str, ...] = ()
    client_mode: bool = False
    join_seconds: float = 60.0


def is_peer_maddr(text: str) -> bool:
    """Whether a text has the form of a peer's multiaddr; only libp2p knows whether one can be dialled."""
    return re.fullmatch(r"/[^\s,]+/p2p/[1-9A-HJ-NP-Za-km-z]{46,}(/[^\s,]+)?", text) is not None


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """What a network process is started with.

    Attributes:
        node: its place in the network.
        run: the run's id, 32 bytes; every key and stream name is scoped by it.
        store_root: the blob store that training and network process share.
        budget_bytes: the most that the store keeps on disk.
        upload_bytes_per_second: cap on uploads; None for none.
        lend: (path, digest) of files outside the store that are to be served.
    """

    node: NodeConfig
    run: bytes
    store_root: str
    budget_bytes: int = 50 << 30
    upload_bytes_per_second: float | None = None
    lend: tuple[tuple[str, bytes], ...] = ()
