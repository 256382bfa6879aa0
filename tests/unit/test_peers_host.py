"""The network process: streams that are bounded, and calls that are answered whatever comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from p2pasr.errors import TransportError
from p2pasr.peers import host as module
from p2pasr.peers.channel import HEADER, MAX_FRAME_BYTES
from p2pasr.peers.exchange import BlobExchange
from p2pasr.peers.host import MAX_INCOMING, MAX_INCOMING_PER_PEER, Host
from p2pasr.peers.streams import Stream

from .builders import LocalNetwork, digest_of


def in_a_network(folder: Path, story: Callable[[LocalNetwork, Host], Awaitable[None]]) -> None:
    """Tell a story in which host 1 echoes whatever it is sent."""

    async def echo(stream: Stream) -> None:
        with contextlib.suppress(TransportError):
            while True:
                await stream.send(await stream.receive())

    async def main() -> None:
        async with LocalNetwork(folder, digest_of("run")) as network:
            served = network.host(1)
            await served.serve("echo", echo)
            await story(network, served)

    asyncio.run(main())


async def hold(stack: contextlib.AsyncExitStack, host: Host, served: Host, count: int) -> None:
    """Hold streams open that are being served."""
    for _ in range(count):
        stream = await stack.enter_async_context(host.open(served.peer, "echo"))
        await stream.send({"word": 1})
        assert await stream.receive() == {"word": 1}


async def is_refused_at_once(host: Host, served: Host) -> bool:
    """Whether one more stream is refused; one that is, is closed although its caller stays."""
    async with asyncio.timeout(5), host.open(served.peer, "echo") as stream:
        await stream.send({"word": 1})
        try:
            await stream.receive()
        except TransportError as error:
            await stream.closed()
            return "too many streams at once" in str(error)
        return False


def test_one_peer_holds_no_more_streams_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 3600.0)

    async def story(network: LocalNetwork, served: Host) -> None:
        greedy, modest = network.host(2), network.host(3)
        async with contextlib.AsyncExitStack() as stack:
            await hold(stack, greedy, served, MAX_INCOMING_PER_PEER)
            assert await is_refused_at_once(greedy, served)
            assert not await is_refused_at_once(modest, served)
        while served._incoming:
            await asyncio.sleep(0)
        assert not await is_refused_at_once(greedy, served)

    in_a_network(tmp_path, story)


def test_all_together_hold_no_more_streams_than_there_are(tmp_path: Path) -> None:
    async def story(network: LocalNetwork, served: Host) -> None:
        crowd = [network.host(2 + number) for number in range(MAX_INCOMING // MAX_INCOMING_PER_PEER)]
        async with contextlib.AsyncExitStack() as stack:
            for host in crowd:
                await hold(stack, host, served, MAX_INCOMING_PER_PEER)
            assert await is_refused_at_once(network.host(100), served)

    in_a_network(tmp_path, story)


@pytest.mark.parametrize(
    ("data", "what"), [(HEADER.pack(MAX_FRAME_BYTES + 1), "out of step"), (HEADER.pack(1) + b"\xc1", "not canonical")]
)
def test_a_channel_that_is_out_of_step_ends_the_serving_of_calls(tmp_path: Path, data: bytes, what: str) -> None:
    async def main() -> None:
        async with LocalNetwork(tmp_path, digest_of("run")) as network:
            host = network.host(1)
            host.node.died = asyncio.Event().wait
            (reader, _), (_, writer) = await network.pair()
            writer.write(data)
            with pytest.raises(module.P2pasrError, match=what):
                await module._serve_calls(host, reader)

    asyncio.run(main())


def test_blobs_are_offered_again_whatever_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pasr.peers.exchange.PROVIDER_TTL_SECONDS", 0.03)

    async def main() -> None:
        async with LocalNetwork(tmp_path, digest_of("run")) as network:
            host = network.host(1)
            digest = host.store.put("shard", b"shard")
            put = host.directory.put
            tries: list[Any] = []

            async def broken_once(*args: Any) -> bool:
                tries.append(args)
                if len(tries) == 1:
                    raise RuntimeError("the daemon is gone")
                return await put(*args)

            host.directory.put = broken_once
            await BlobExchange().start(host)
            await host.calls["provide"]({"digests": (digest,)})
            async with asyncio.timeout(10):
                while ("provider", digest.hex()) not in network.records:
                    await asyncio.sleep(0.01)
            reason = "not all blobs were offered to others (the daemon is gone)"
            assert network.events == [{"event": "warning", "reason": reason}]

    asyncio.run(main())
