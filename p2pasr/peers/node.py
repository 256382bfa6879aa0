"""A libp2p daemon and a DHT node on it: what a peer and a bootstrap node have in common."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.utils.multiaddr import Multiaddr

from p2pasr.errors import LocalError, P2pasrError, TransportError
from p2pasr.peers.config import NodeConfig, is_peer_maddr
from p2pasr.peers.directory import OwnerValidator
from p2pasr.peers.identity import Identity, load_or_create

DAEMON_SECONDS: Final = 30.0
"""How long the libp2p daemon may take to start; slow disks need more than hivemind's 15 s."""

DHT_WAIT_SECONDS: Final = 5.0
"""How long a DHT node may take to answer; a home PC that trains answers slowly."""

TOUCH_SECONDS: Final = 5.0
"""How often a node looks whether it has lost touch with the peers that it is connected to."""

NEIGHBOURS: Final = 8
"""A node that knows so many others is in touch."""


class Node:
    """A member of the network, composed of hivemind's `P2P` and `DHTNode` in the running event loop.

    Args:
        config: where to listen and whom to join.
        on_wait: told, in one sentence, each time that joining failed and will be tried again.
    """

    def __init__(self, config: NodeConfig, on_wait: Callable[[str], None]) -> None:
        self.config = config
        self.identity: Identity = load_or_create(Path(config.identity_path))
        self._on_wait = on_wait
        self._p2p: P2P | None = None
        self._dht: DHTNode | None = None
        self._touching: asyncio.Task[None] | None = None

    @property
    def peer(self) -> str:
        """This node's peer ID."""
        return self.identity.peer

    @property
    def p2p(self) -> P2P:
        """The libp2p daemon.

        Raises:
            TransportError: it is not up.
        """
        if self._p2p is None:
            raise TransportError("the libp2p daemon is not up")
        return self._p2p

    @property
    def dht(self) -> DHTNode:
        """The DHT node.

        Raises:
            TransportError: it is not up.
        """
        if self._dht is None:
            raise TransportError("the DHT node is not up")
        return self._dht

    async def start(self) -> None:
        """Join the network, trying again with backoff while nobody answers.

        Raises:
            LocalError: this machine or its configuration stands in the way.
            TransportError: nobody could be reached within `join_seconds`.
        """
        _check_ports(() if self.config.client_mode else self.config.host_maddrs)
        deadline = time.monotonic() + self.config.join_seconds
        delay = 1.0
        entries = [self.config.initial_peers, tuple(filter(_can_be_dialled, self.config.known_peers))]
        while True:
            try:
                await self._start_daemon(entries[0])
                await self._start_dht(entries[0])
                self._touching = asyncio.create_task(self._keep_in_touch())
                return
            except TransportError as error:
                await self.stop()
                if time.monotonic() + delay > deadline:
                    raise
                self._on_wait(f"{error}; trying again in {delay:.0f} s")
            if entries[1]:
                entries.reverse()
            await asyncio.sleep(delay)
            delay = min(delay * 2, 15.0)

    async def stop(self) -> None:
        """Leave the network and end the daemon."""
        if self._touching is not None:
            self._touching.cancel()
        dht, self._dht = self._dht, None
        p2p, self._p2p = self._p2p, None
        if dht is not None:
            with contextlib.suppress(Exception):  # a daemon that is gone cannot be told goodbye
                await asyncio.wait_for(dht.shutdown(), 1.0)
        if p2p is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(p2p.shutdown(), 2.0)

    async def died(self) -> None:
        """Return when the libp2p daemon has ended."""
        await self.p2p._child.wait()

    async def maddrs(self) -> tuple[str, ...]:
        """Multiaddrs that others can use, loopback last."""
        if self.config.client_mode:
            return ()
        visible = [str(maddr) for maddr in await self.p2p.get_visible_maddrs(latest=True)]
        return tuple(sorted(visible, key=lambda maddr: ("/127." in maddr, "/p2p-circuit" in maddr)))

    async def _keep_in_touch(self) -> None:
        while True:
            await asyncio.sleep(TOUCH_SECONDS)
            with contextlib.suppress(
                P2PDaemonError, ControlFailure, OSError
            ):  # a daemon that died is noticed elsewhere
                await self._touch()

    async def _touch(self) -> None:
        """Bring connected peers back that the DHT has dropped.

        hivemind drops a peer at the first call that it does not answer in time. Where two drop each
        other, nothing in the DHT would ever bring them together again, though they are connected.
        """
        known = set(self.dht.protocol.routing_table.peer_id_to_uid)
        if len(known) >= NEIGHBOURS:
            return
        dropped = [info.peer_id for info in await self.p2p.list_peers() if info.peer_id not in known]
        chosen = random.sample(dropped, min(NEIGHBOURS, len(dropped)))
        await asyncio.gather(*(self.dht.protocol.call_ping(peer) for peer in chosen))

    async def _start_daemon(self, peers: tuple[str, ...]) -> None:
        class Daemon(P2P):  # type: ignore[misc]
            _UNIX_SOCKET_PREFIX = f"/unix{self.config.socket_dir}/"

        options: dict[str, Any] = {
            "initial_peers": list(peers) or None,
            "startup_timeout": DAEMON_SECONDS,
            "check_if_identity_free": False,  # reads RSA keys only; checked here instead
            "persistent_conn_max_msg_size": 4 << 20,
        }
        if self.config.client_mode:
            options |= {"dht_mode": "client", "no_listen": True, "host_maddrs": None, "nat_port_map": False}
        else:
            options["host_maddrs"] = list(self.config.host_maddrs)
        if self.config.announce_maddrs:
            options["announce_maddrs"] = list(self.config.announce_maddrs)
        try:
            if peers:
                await self._check_identity_is_free(Daemon, peers)
            self._p2p = await Daemon.create(identity_path=self.config.identity_path, **options)
        except (P2PDaemonError, ControlFailure, ValueError, OSError) as error:
            raise _explain_daemon(error, peers) from error

    async def _check_identity_is_free(self, daemon: type[P2P], peers: tuple[str, ...]) -> None:
        """Ask the network, under a throw-away identity, whether somebody already answers to our key."""
        stranger = await daemon.create(
            initial_peers=list(peers),
            dht_mode="client",
            no_listen=True,
            host_maddrs=None,
            startup_timeout=DAEMON_SECONDS,
        )
        try:
            await asyncio.wait_for(stranger._client.connect(PeerID.from_base58(self.peer), []), 5.0)
        except (TimeoutError, ControlFailure):
            return
        finally:
            await stranger.shutdown()
        raise LocalError(
            f"another peer on the network already uses the identity {self.config.identity_path}; "
            f"a key belongs to one machine: give this one its own with --identity-path"
        )

    async def _start_dht(self, peers: tuple[str, ...]) -> None:
        try:
            self._dht = await DHTNode.create(
                p2p=self.p2p,
                initial_peers=list(peers),
                client_mode=self.config.client_mode,
                record_validator=OwnerValidator(self.identity),
                wait_timeout=DHT_WAIT_SECONDS,
                cache_locally=False,
                cache_nearest=0,
            )
        except (ValidationError, RuntimeError) as error:
            raise _explain_dht(error, peers) from error


def _can_be_dialled(maddr: str) -> bool:
    """Whether libp2p can read an address; one that it cannot would keep its daemon from starting."""
    try:
        return is_peer_maddr(maddr) and "p2p" in Multiaddr(maddr)
    except ValueError:
        return False


def _check_ports(maddrs: tuple[str, ...]) -> None:
    """libp2p shares a port that is taken (SO_REUSEPORT) without a word, so look before it listens.

    Raises:
        LocalError: a port is in use, or an address is not this machine's.
    """
    for maddr in maddrs:
        match = re.fullmatch(r"/ip([46])/([^/]+)/(tcp|udp)/(\d+)(/.*)?", maddr)
        if match is None:
            raise LocalError(f"{maddr!r} is not an address to listen on; write /ip4/0.0.0.0/tcp/PORT")
        version, address, transport, port = match.group(1, 2, 3, 4)
        family = socket.AF_INET if version == "4" else socket.AF_INET6
        kind = socket.SOCK_STREAM if transport == "tcp" else socket.SOCK_DGRAM
        with socket.socket(family, kind) as probe:
            if kind is socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, int(port)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise LocalError(f"port {port} is in use; choose another with --host-maddrs") from error
                raise LocalError(f"cannot listen on {maddr} ({error.strerror})") from error
            except OverflowError as error:
                raise LocalError(f"{maddr} names no port: ports end at 65535") from error


def _explain_daemon(error: Exception, peers: tuple[str, ...]) -> P2pasrError:
    text = str(error)
    if "bootstrap peers" in text:
        return TransportError(f"none of the initial peers can be reached ({' '.join(peers)}): is one running there?")
    if "failed to listen" in text:
        return LocalError(f"the libp2p daemon cannot listen ({text.rsplit('failed to listen', 1)[1].strip()})")
    if "failed to start in" in text:
        return TransportError(f"the libp2p daemon did not start within {DAEMON_SECONDS:.0f} s; the machine may be busy")
    if "not found" in text or "incompatible" in text:
        return LocalError(f"the libp2p daemon cannot run here ({text}); reinstall hivemind")
    return TransportError(f"the libp2p daemon did not start ({text or type(error).__name__})")


def _explain_dht(error: Exception, peers: tuple[str, ...]) -> P2pasrError:
    text = str(error)
    times = re.search(r"local: ([\d.]+), peer: ([\d.]+)", text)
    if times is not None:
        off = float(times.group(1)) - float(times.group(2))
        return LocalError(
            f"this machine's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the network's; at most "
            f"3 s are allowed: set it, for instance with 'timedatectl set-ntp true'"
        )
    if "can't access this node" in text:
        return LocalError("peers cannot connect to this machine: open its port in the router, or use --client-mode")
    return TransportError(f"no initial peer answers ({' '.join(peers)})")
