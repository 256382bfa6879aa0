"""Run a bootstrap node: it stores directory records for others and trains nothing."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path

from p2pasr.errors import TransportError
from p2pasr.peers import sockets
from p2pasr.peers.config import NodeConfig
from p2pasr.peers.identity import load_or_create, lock
from p2pasr.peers.node import Node
from p2pasr.report import Report

RESTART_SECONDS = 2.0


async def serve(config: NodeConfig, report: Report) -> None:
    """Keep a node up until SIGINT or SIGTERM; a daemon that dies is started again.

    Args:
        config: its `socket_dir` is chosen here.

    Raises:
        LocalError: it cannot run here.
        TransportError: none of its initial peers can be reached.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    key = Path(config.identity_path)
    load_or_create(key)
    lock(key)
    note = key.with_name(key.name + ".sockets")
    node = Node(replace(config, socket_dir=str(sockets.make(note))), report.wait)
    stopping = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            starting = asyncio.create_task(node.start())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                break
            starting.result()
            await _announce(node, report)
            died = asyncio.create_task(node.died())
            await asyncio.wait({died, stopping}, return_when=asyncio.FIRST_COMPLETED)
            died.cancel()
            await node.stop()
            if not stop.is_set():
                report.warn(f"the libp2p daemon died; it is restarted in {RESTART_SECONDS:.0f} s")
                await asyncio.wait({stopping}, timeout=RESTART_SECONDS)
    finally:
        stopping.cancel()
        await node.stop()
        sockets.remove(note)
    report.emit("stopped", "stopped; the next start has the same address")


async def _announce(node: Node, report: Report) -> None:
    maddrs = await node.maddrs()
    if not maddrs:
        raise TransportError("this node has no address that others could use")
    report.emit("ready", f"bootstrap node {node.peer} is up", peer=node.peer, maddrs=maddrs)
    for maddr in maddrs:
        report.emit("invite", f"newcomers type: python -m p2pasr.peer --run RUN --initial-peers {maddr}", maddr=maddr)
