"""The network process: a node and the services on it, in one event loop, serving a training process.

Services – blobs, matchmaking, all-reduce – register their stream handlers and calls here. hivemind's
averager, which is a process, an RPC service and a state server in one, is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure

from p2pasr.errors import P2pasrError, RemoteError, TransportError
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.channel import HEADER, body_bytes, decode_body, encode_frame, error_to_wire
from p2pasr.peers.config import LinkConfig
from p2pasr.peers.directory import Directory
from p2pasr.peers.identity import Identity
from p2pasr.peers.node import Node
from p2pasr.peers.streams import Pacer, Stream
from p2pasr.protocol.manifest import RunManifest, parse_manifest

STREAM_SECONDS: Final = 30.0
"""How long a single read or write on a stream may take."""

LINGER_SECONDS: Final = 10.0
"""How long a handler that is done waits for the caller to close."""

REFUSAL_SECONDS: Final = 1.0
"""How long telling a caller that there are too many streams may take."""

OPEN_SECONDS: Final = 10.0
_DIAL_FAILURES: Final = re.compile(
    r"connection refused|no route to host|i/o timeout|dial backoff|no addresses|protocols? not supported"
)

MAX_INCOMING: Final = 128
"""Incoming streams that are served at once; more are refused."""

MAX_INCOMING_PER_PEER: Final = 16
"""The same of one peer; an honest one holds a few."""

Emit = Callable[[dict[str, Any]], None]
Handler = Callable[[Stream], Awaitable[None]]
Call = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Service(Protocol):
    """Something that runs on a host."""

    async def start(self, host: Host) -> None:
        """Register handlers and calls."""


class Host:
    """Everything that a peer's services share.

    Args:
        config: what the training process asked for.
        emit: sends an event to the training process.
    """

    def __init__(self, config: LinkConfig, emit: Emit) -> None:
        self.config = config
        self.emit = emit
        self.node = Node(config.node, lambda reason: emit({"event": "waiting", "reason": reason}))
        self.store = BlobStore(Path(config.store_root), config.budget_bytes)
        self.pacer = Pacer(config.upload_bytes_per_second)
        self.banned: frozenset[str] = frozenset()
        self.at_stop: list[Callable[[], None]] = []
        self.calls: dict[str, Call] = {
            "announce": self._announce,
            "lookup": self._lookup,
            "status": self._status,
            "ban": self._ban,
        }
        self.directory: Directory
        self._incoming: Counter[str] = Counter()

    @property
    def run(self) -> bytes:
        """The run's id, 32 bytes."""
        return self.config.run

    @cached_property
    def manifest(self) -> RunManifest:
        """The run's manifest, which the training process has put into the store."""
        return parse_manifest(self.store.get(self.run))

    @property
    def identity(self) -> Identity:
        """This peer's key."""
        return self.node.identity

    @property
    def peer(self) -> str:
        """This peer's ID."""
        return self.node.peer

    @property
    def p2p(self) -> P2P:
        """The libp2p daemon."""
        return self.node.p2p

    async def start(self, services: list[Service]) -> None:
        """Join the network and start the services.

        Raises:
            LocalError: this machine or its configuration stands in the way.
            TransportError: nobody could be reached.
        """
        for path, digest in self.config.lend:
            self.store.lend(Path(path), digest, check=False)  # the training process did
        await self.node.start()
        self.directory = Directory(self.node.dht, self.run, self.warn)
        for service in services:
            await service.start(self)

    async def stop(self) -> None:
        """Let the services clean up and leave the network."""
        for clean_up in self.at_stop:
            clean_up()
        if hasattr(self, "directory"):
            await self.directory.stop()
        await self.node.stop()

    def warn(self, reason: str) -> None:
        """Tell the training process, in one sentence, of something that is survived."""
        self.emit({"event": "warning", "reason": reason})

    def protocol_name(self, name: str) -> str:
        """A stream protocol's full name, scoped by the run."""
        return f"/p2pasr/1/{self.run.hex()}/{name}"

    async def serve(self, name: str, handler: Handler, *, to_banned: bool = False) -> None:
        """Handle incoming streams of a protocol; errors end the stream, never the process.

        The caller closes first. libp2p's daemon may drop what was written just before its side of a
        stream is closed – about one stream in 300 on loopback – so a handler that has said its last
        waits until the caller has read it and gone.

        Args:
            to_banned: whether banned peers are served too; else their streams are closed.
        """

        async def handle(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = Stream(str(info.peer_id), reader, writer, self.pacer, STREAM_SECONDS)
            if stream.peer in self.banned and not to_banned:
                stream.close()
                return
            if self._incoming[stream.peer] >= MAX_INCOMING_PER_PEER or self._incoming.total() >= MAX_INCOMING:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REFUSAL_SECONDS):
                        await _send_error(stream, "too many streams at once")
                stream.close()
                return
            self._incoming[stream.peer] += 1
            try:
                await self._attend(stream, handler)
            finally:
                self._incoming -= Counter([stream.peer])  # which forgets a peer without streams
                stream.close()

        await self.p2p.add_binary_stream_handler(self.protocol_name(name), handle)

    async def _attend(self, stream: Stream, handler: Handler) -> None:
        try:
            await handler(stream)
        except (P2pasrError, OSError) as error:
            await _send_error(stream, str(error))
            if isinstance(error, RemoteError):
                self.emit({"event": "refused", "reason": str(error), "peer": stream.peer})
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    await stream.closed()

    @contextlib.asynccontextmanager
    async def open(self, peer: str, name: str, timeout: float = STREAM_SECONDS) -> AsyncIterator[Stream]:
        """Open a stream to a peer; it is closed when the block ends.

        Raises:
            TransportError: the peer cannot be reached or does not speak the protocol.
        """
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                _, reader, writer = await self.p2p.call_binary_stream_handler(
                    PeerID.from_base58(peer), self.protocol_name(name)
                )
        except (TimeoutError, OSError, P2PDaemonError, P2PHandlerError, ControlFailure) as error:
            raise TransportError(f"…{peer[-6:]} cannot be reached ({_reason(error)})") from error
        stream = Stream(peer, reader, writer, self.pacer, timeout)
        try:
            yield stream
        finally:
            stream.close()

    async def _announce(self, args: dict[str, Any]) -> dict[str, Any]:
        stored = await self.directory.keep(**args)
        return {"stored": stored}

    async def _lookup(self, args: dict[str, Any]) -> dict[str, Any]:
        return {"records": await self.directory.get(args["kind"], args["scope"])}

    async def _ban(self, args: dict[str, Any]) -> dict[str, Any]:
        """Serve these peers no more than the states that ban them, and no others any less."""
        self.banned = frozenset(args["peers"])
        return {}

    async def _status(self, _args: dict[str, Any]) -> dict[str, Any]:
        return {
            "maddrs": await self.node.maddrs(),
            "connections": len(await self.p2p.list_peers()),
            "bytes_sent": self.pacer.sent,
            "bytes_received": self.pacer.received,
        }


async def run_host(config: LinkConfig, channel: socket.socket, services: list[Service]) -> None:
    """Serve a training process until it closes the channel or the daemon dies."""
    reader, writer = await asyncio.open_connection(sock=channel)

    def emit(message: dict[str, Any]) -> None:
        if not writer.is_closing():
            writer.write(encode_frame(message))

    host: Host | None = None
    try:
        host = Host(config, emit)
        await host.start(services)
        emit({"event": "ready", "peer": host.peer, "maddrs": await host.node.maddrs()})
        await _serve_calls(host, reader)
    except P2pasrError as error:
        emit({"event": "fatal", "error": error_to_wire(error)})
    finally:
        if host is not None:
            await host.stop()
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()


async def _serve_calls(host: Host, reader: asyncio.StreamReader) -> None:
    tasks: dict[int, asyncio.Task[None]] = {}

    async def answer(number: int, name: str, args: dict[str, Any]) -> None:
        try:
            host.emit({"id": number, "result": await host.calls[name](args)})
        except P2pasrError as error:
            host.emit({"id": number, "error": error_to_wire(error)})
        except Exception as error:  # noqa: BLE001 (a bug in one call must not end the others)
            traceback.print_exc()
            host.emit({"id": number, "error": error_to_wire(error)})
        finally:
            tasks.pop(number, None)

    async def listen() -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = body_bytes(await reader.readexactly(HEADER.size))
                message = decode_body(await reader.readexactly(size))
                if "cancel" in message:
                    if (task := tasks.get(message["cancel"])) is not None:
                        task.cancel()
                    continue
                number = message["id"]
                tasks[number] = asyncio.create_task(answer(number, message["call"], message["args"]))

    listening = asyncio.create_task(listen())
    daemon = asyncio.create_task(host.node.died())
    try:
        await asyncio.wait({listening, daemon}, return_when=asyncio.FIRST_COMPLETED)
        if daemon.done():
            raise TransportError("the libp2p daemon died")
        listening.result()
    finally:
        for task in (listening, daemon, *tasks.values()):
            task.cancel()


async def _send_error(stream: Stream, reason: str) -> None:
    """Tell the caller why it is not served, if it still listens."""
    with contextlib.suppress(P2pasrError, OSError):
        await stream.send({"error": reason})


def _reason(error: BaseException) -> str:
    """libp2p's report of a failed dial, over several lines and addresses, in a few words."""
    text = " ".join(str(error).split())
    known = _DIAL_FAILURES.search(text)
    return known.group(0) if known is not None else text[:160] or "no answer"
