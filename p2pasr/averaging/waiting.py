"""Waiting in an event loop: for what others bring about, and for work that must not hold the loop up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from p2pasr.errors import TransportError

T = TypeVar("T")


async def soon(future: asyncio.Future[T], seconds: float) -> T:
    """What a future comes to, if it does in time; the future goes on.

    Raises:
        TransportError: it does not.
    """
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.shield(future)
    except TimeoutError:
        raise TransportError(f"this was not known within {seconds:.0f} s") from None


async def entry(table: Mapping[bytes, T], name: bytes, changed: asyncio.Condition, seconds: float, otherwise: str) -> T:
    """What a table holds under a name, as soon as it does: others may ask for it a moment too early.

    Args:
        changed: notified whenever the table has new entries.
        otherwise: what is said if it holds nothing in time.

    Raises:
        TransportError: it does not.
    """
    try:
        async with asyncio.timeout(seconds), changed:
            await changed.wait_for(lambda: name in table)
            return table[name]
    except TimeoutError:
        raise TransportError(otherwise) from None


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Do what takes the processor or the disk a while off the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)
