"""Folders of shards for tasks of one's own: whatever named arrays they train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.tensors import pack_tensors
from p2pasr.speech.prepare import ShardEntry, ShardIndex

OWN = "p2pasr-own/1"
"""What such a shard says that it is."""


@dataclass(frozen=True, slots=True)
class OwnShard:
    """One piece of a training set.

    Attributes:
        tensors: name → float32, float16, int64, int32, int8 or uint8 array.
        examples: how many examples it holds.
        seconds: how much work it stands for, in seconds of audio or any unit that all shards of the run share: the
            weights of claims and the credit of peers are counted in it.
        dialect: which part of the data it is from, if there are several.
        longest: seconds of its longest clip, where the memory that training takes grows with it; peers of little memory
            leave long ones to others.
    """

    tensors: Mapping[str, npt.NDArray[Any]]
    examples: int
    seconds: float
    dialect: str = ""
    longest: float | None = None


def write_shards(out: Path, shards: Iterable[OwnShard]) -> ShardIndex:
    """Write a folder of shards, as `p2pasr run new --shards` and `--seed-data` take it.

    Shards are named by their digest; equal arrays give equal bytes. `p2pasr.read_tensors` reads one.

    Args:
        out: folder; made if it is not there. Its index is replaced.

    Raises:
        ValueError: a shard holds no example, stands for no work or has an impossible clip.
        TypeError: an array's dtype is another one.
    """
    out.mkdir(parents=True, exist_ok=True)
    index = ShardIndex("", None)
    for shard in shards:
        if shard.examples < 1 or not 0 < shard.seconds < np.inf:
            raise ValueError(f"a shard of {shard.examples} examples and {shard.seconds} s trains nothing")
        data = pack_tensors(shard.tensors, {"format": OWN, "examples": shard.examples})
        if shard.longest is not None and not 0 < shard.longest < np.inf:
            raise ValueError(f"the longest clip of a shard cannot last {shard.longest} s")
        longest = None if shard.longest is None else float(shard.longest)
        seconds, dialect = float(shard.seconds), shard.dialect
        entry = ShardEntry(blob_digest(data).hex(), len(data), shard.examples, seconds, dialect, longest)
        (out / entry.file).write_bytes(data)
        index.shards.append(entry)
    index.save(out)
    return index
