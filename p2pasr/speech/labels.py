"""A teacher's labels: for each token of a transcript its most likely ones, and all others as one.

They lie in the shard whose clips they are about, so that they are fetched, named by digest and
checked with it:

=================  ==========  =====================  =============================================
tensor             dtype       shape                  meaning
=================  ==========  =====================  =============================================
``teacher_ids``    int32       (targets, k)           the k most likely tokens, each named once
``teacher_logs``   float16     (targets, k)           their log-probabilities, natural
``teacher_rest``   float32     (targets,)             log-probability of all other tokens together
=================  ==========  =====================  =============================================

Targets are the tokens that a decoder learns: all of a clip's but its first. For 64 of Whisper's
51,865 tokens that is 388 bytes a target, 1/267 of all its logits as float16. The log-probability of
the others is kept instead of the log-sum-exp of all logits: from the latter it would have to be
computed as what is missing from a sum of rounded values, and where little is missing nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from p2pasr.errors import LocalError, Reject
from p2pasr.protocol.signing import Signer, sign, verify
from p2pasr.protocol.tensors import Tensors, pack_tensors, read_tensors, unpack_tensors

IDS: Final = "teacher_ids"
LOGS: Final = "teacher_logs"
REST: Final = "teacher_rest"
META: Final = "teacher"
"""Where a shard's description says who labelled it."""

SIGNED: Final = "teacher-labels"
"""What is signed, as a kind of record: the bytes of the shard without the signature."""


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """What a teacher expects at each target of one clip.

    Attributes:
        ids: int32, shape (targets, k).
        logs: float16, shape (targets, k).
        rest: float32, shape (targets,).
    """

    ids: npt.NDArray[np.int32]
    logs: npt.NDArray[np.float16]
    rest: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Labelling:
    """Who labelled a shard, and with what.

    Attributes:
        name: what the teacher is called; nothing follows from it.
        weights: hex BLAKE3 of the teacher's weights.
        source: hex BLAKE3 of the shard that was labelled.
        mass_mean, mass_min: probability of a target's k tokens together, over all targets.
        peer: ID of who signed.
        signature: hex, of everything else in the shard.
    """

    name: str
    weights: str
    source: str
    mass_mean: float
    mass_min: float
    peer: str
    signature: str = ""

    def __post_init__(self) -> None:
        texts = (self.name, self.weights, self.source, self.peer, self.signature)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("the teacher's description is malformed")


def label_tensors(labels: Sequence[SoftLabels]) -> Tensors:
    """The labels of a shard's clips as its tensors."""
    return {
        IDS: np.concatenate([each.ids for each in labels]),
        LOGS: np.concatenate([each.logs for each in labels]),
        REST: np.concatenate([each.rest for each in labels]),
    }


def clip_labels(tensors: Mapping[str, npt.NDArray[Any]], targets: Sequence[int]) -> list[SoftLabels]:
    """A shard's labels by clip, as views.

    Args:
        targets: how many each clip has.

    Raises:
        Reject: they do not fit the clips, name a token twice, or are no log-probabilities.
    """
    ids, logs, rest = tensors[IDS], tensors[LOGS], tensors[REST]
    count = sum(targets)
    width = ids.shape[-1] if ids.ndim else 0
    layout: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]] = {
        IDS: (np.int32, (count, width)),
        LOGS: (np.float16, (count, width)),
        REST: (np.float32, (count,)),
    }
    if not width or {name: (tensors[name].dtype, tensors[name].shape) for name in layout} != layout:
        raise Reject("its teacher's labels do not fit its tokens")
    ordered = np.sort(ids, axis=1)
    if ordered[:, 0].min(initial=0) < 0 or not (np.diff(ordered, axis=1) > 0).all():
        raise Reject("its teacher names a token twice, or one that cannot be")
    if not (np.isfinite(logs).all() and np.isfinite(rest).all()):
        raise Reject("its teacher's labels hold values that are not numbers")
    ends = np.cumsum(targets).tolist()
    return [
        SoftLabels(ids[start:end], logs[start:end], rest[start:end])
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def signed_shard(data: bytes, signer: Signer) -> bytes:
    """A labelled shard's bytes with the signature of who labelled it, who is named in it."""
    tensors, meta = unpack_tensors(data)
    meta[META] = {**meta[META], "signature": sign(signer, SIGNED, data).hex()}
    return pack_tensors(tensors, meta)


def check_signature(path: Path, labelling: Labelling) -> None:
    """Did the peer that is named as having labelled a shard sign it as it is?

    Raises:
        LocalError: it did not.
    """
    tensors, meta = read_tensors(path)
    unsigned = pack_tensors(tensors, {**meta, META: {**asdict(labelling), "signature": ""}})
    try:
        verify(labelling.peer, SIGNED, unsigned, bytes.fromhex(labelling.signature))
    except (Reject, ValueError) as error:
        raise LocalError(
            f"the shard {path} is not signed by the peer that it names as having labelled it ({error}); label it again"
        ) from error


def translation(source: Mapping[str, int], target: Mapping[str, int], size: int) -> npt.NDArray[np.int64]:
    """How one vocabulary's ids are called in another: shape (size,), -1 where the other has no such token.

    Args:
        source, target: token → id.
        size: ids that the source's model has, which may be more or fewer than its vocabulary.
    """
    ids = np.full(size, -1, dtype=np.int64)
    for token, index in source.items():
        if index < size:
            ids[index] = target.get(token, -1)
    return ids
