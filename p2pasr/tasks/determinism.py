"""The same inputs give the same bits: seeds, algorithms, the device and the name of the hardware."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from p2pasr.errors import LocalError
from p2pasr.protocol.encoding import keyed_bytes


def usable_device(name: str) -> torch.device:
    """A device by the name that torch knows it by, such as "cpu" or "cuda:1".

    "meta", which computes nothing, is one only within `torch.device("meta")`: for whoever wants a task's shapes.

    Raises:
        LocalError: torch has no such device here.
    """
    try:
        device = torch.device(name)
        if torch.get_default_device() != device or device.type != "meta":
            torch.zeros(1, device=device).item()  # "meta" makes tensors, but computes nothing
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).strip().split("\n")[0]
        raise LocalError(f"the device {name!r} cannot be used ({reason:.80}); try cpu, cuda or cuda:1") from error
    return device


@contextlib.contextmanager
def reproducible(seed: bytes, device: torch.device) -> Iterator[None]:
    """Run a block with torch's generators seeded and only deterministic algorithms.

    Restores the caller's generators and setting afterwards.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic  # its attribute is unknown to type checkers
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(keyed_bytes(seed + b"torch", 8), "big"))
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # a search for bugs that writes all memory twice
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            memory.fill_uninitialized_memory = before[1]


def shuffled(count: int, key: bytes) -> list[int]:
    """A permutation of range(count), the same for the same key with every version of every library."""
    ranks = np.frombuffer(keyed_bytes(key, 8 * count), dtype="<u8")
    return np.argsort(ranks, kind="stable").tolist()  # type: ignore[no-any-return]


def sample_batches(clips: int, batch_size: int, seed: bytes) -> Iterator[list[int]]:
    """Endless batches of clip indices: whole shuffled passes over the clips, cut into batches."""
    queue: list[int] = []
    for turn in itertools.count():
        queue += shuffled(clips, seed + turn.to_bytes(8, "big"))
        while len(queue) >= batch_size:
            yield queue[:batch_size]
            del queue[:batch_size]


def uniform(shape: tuple[int, ...], bound: float, key: bytes) -> npt.NDArray[np.float32]:
    """Values from the uniform distribution over [-bound, bound), equal bits on every machine.

    24 bits each, so that every step of the arithmetic is exact but the last multiplication.
    """
    count = int(np.prod(shape))
    raw = np.frombuffer(keyed_bytes(key, 4 * count), dtype="<u4") >> np.uint32(8)
    unit = raw.astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    values: npt.NDArray[np.float32] = np.multiply(unit, np.float32(bound)).reshape(shape)
    return values


def hardware_class(device: torch.device, precision: str) -> str:
    """Device model, library builds, instruction set, precision and threads, as one short word."""
    build = f"torch{torch.__version__}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).replace(" ", "-")
        return f"cuda/{name}/cuda{torch.version.cuda}/{build}/{precision}"
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
    return f"cpu/{capability}/{torch.get_num_threads()}t/{build}/{precision}"
