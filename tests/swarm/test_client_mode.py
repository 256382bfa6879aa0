"""Who can be asked for what it committed to: a peer that accepts no connections, by those that it is connected to."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from p2pasr.errors import TransportError
from p2pasr.peers.config import LinkConfig, NodeConfig
from p2pasr.peers.host import Host
from p2pasr.peers.streams import Stream
from tests.unit.builders import digest_of, make_identity


async def _join(folder: Path, number: int, entry: tuple[str, ...], *, client_mode: bool = False) -> Host:
    home = folder / str(number)
    home.mkdir()
    key = home / "key"
    key.write_bytes(make_identity(number).to_bytes())
    key.chmod(0o600)
    listen = ("/ip4/127.0.0.1/tcp/0",)
    node = NodeConfig(str(key), str(home), host_maddrs=listen, initial_peers=entry, client_mode=client_mode)
    host = Host(LinkConfig(node, digest_of("run"), str(home / "blobs")), lambda _event: None)
    await host.start([])

    async def echo(stream: Stream) -> None:
        await stream.send(await stream.receive())

    await host.serve("echo", echo)
    return host


async def _is_answered(caller: Host, peer: str) -> bool:
    async with caller.open(peer, "echo") as stream:
        await stream.send({"word": 1})
        return await stream.receive() == {"word": 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # streams that the daemon ended
def test_a_peer_in_client_mode_is_reached_by_those_that_accept_connections_and_by_no_others(folder: Path) -> None:
    async def story() -> None:
        async with AsyncExitStack() as stack:
            first = await _join(folder, 1, ())
            stack.push_async_callback(first.stop)
            entry = (await first.node.maddrs())[:1]
            clients = [await _join(folder, number, entry, client_mode=True) for number in (2, 3)]
            for client in clients:
                stack.push_async_callback(client.stop)
            assert [await _is_answered(first, client.peer) for client in clients] == [True, True]
            with pytest.raises(TransportError, match="cannot be reached"):
                await _is_answered(clients[0], clients[1].peer)

    asyncio.run(story())
