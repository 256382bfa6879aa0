"""Taking a member out of finished rounds again: whose term it is, to the bit, and what is no undo."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging import rules
from p2pasr.averaging.codec import Flat, Layout, Vector
from p2pasr.averaging.partfile import PartFile
from p2pasr.errors import Reject
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.tensors import pack_tensors, unpack_tensors
from p2pasr.verify.undo import MergedRound, Undo, is_merged, max_undo_bytes, read_undo, undo_of

from .builders import finish_round, initial_params, make_identity, make_manifest, make_state, random_delta

LIKE = initial_params()
PEERS = [make_identity(number).peer for number in (1, 2, 3)]
WEIGHTS = (1.0, 2.0, 5.0)

codecs = st.sampled_from(["float32", "float16", "int8", "int4"])
clips = st.sampled_from([None, 1.0, 2.0])
positions = st.integers(0, 2)


def manifest_of(codec: str = "float32", clip: float | None = None, rate: float = 1.0) -> RunManifest:
    return make_manifest(
        averaging={
            "codec": codec,
            "block": 16,
            "part_values": 256,
            "rule": {"clip_norm": clip},
            "outer": {"learning_rate": rate},
        }
    )


def deltas_of(manifest: RunManifest) -> list[bytes]:
    """The encoded deltas of :func:`finish_round`."""
    return [b"".join(Layout.of(manifest.parameters, manifest.averaging).encode(random_delta(n))) for n in range(3)]


@contextmanager
def merged(
    manifest: RunManifest, staying: Collection[int], number: int = 0, weights: tuple[float, ...] = WEIGHTS
) -> Iterator[MergedRound]:
    """A round of three members in which those that stay have given their deltas."""
    layout = Layout.of(manifest.parameters, manifest.averaging)
    record = finish_round(manifest, replace(make_state(manifest), round=number)).record
    decoded = [layout.decode(delta) for delta in deltas_of(manifest)]
    average = b"".join(
        layout.codec.encode(
            rules.aggregate(
                {at: delta[cut] for at, delta in enumerate(decoded)},
                weights,
                manifest.averaging.rule,
                rules.Center(None, ()),
            )
        )
        for cut in layout.cuts()
    )
    with TemporaryDirectory() as folder, ExitStack() as files:

        def opened(name: str, data: bytes) -> PartFile:
            path = Path(folder) / name
            path.write_bytes(data)
            return files.enter_context(PartFile(path, layout))

        given = {at: opened(str(at), deltas_of(manifest)[at]) for at in staying}
        yield MergedRound(record, weights, opened("average", average), given)


def flat(undo: Undo) -> Vector:
    return Flat(undo.change)[:]


@given(st.sampled_from(["float32", "float16"]), positions, st.floats(0.1, 10.0))
def test_without_clipping_it_is_the_members_share_of_the_mean_times_its_delta(
    codec: str, out: int, rate: float
) -> None:
    manifest = manifest_of(codec, rate=rate)
    with merged(manifest, {0, 1, 2} - {out}) as each:
        undo = undo_of(PEERS[out], [each], manifest, LIKE)
    delta = Layout.of(manifest.parameters, manifest.averaging).decode(deltas_of(manifest)[out])
    rounding = 1e-5 if codec == "float32" else 5e-3
    np.testing.assert_allclose(flat(undo), rate * WEIGHTS[out] / sum(WEIGHTS) * delta, atol=rounding * rate)
    assert undo.removed == ((0, PEERS[out]),)
    assert undo.rounds == (0,)


@given(codecs, clips, positions)
def test_what_is_left_of_a_round_is_what_the_others_had_in_it(codec: str, clip: float | None, out: int) -> None:
    manifest = manifest_of(codec, clip)
    layout = Layout.of(manifest.parameters, manifest.averaging)
    with merged(manifest, {0, 1, 2} - {out}) as each:
        undo = undo_of(PEERS[out], [each], manifest, LIKE)
        average = np.concatenate(
            [layout.codec.decode(each.average.read(index), layout.part_size(index)) for index in range(layout.parts)]
        )
    rest = np.zeros_like(average)
    for cut in layout.cuts():
        others = {at: layout.decode(deltas_of(manifest)[at])[cut] for at in range(3) if at != out}
        for at, part in rules.clip(others, clip).items():
            rest[cut] += np.float32(WEIGHTS[at] / sum(WEIGHTS)) * part
    params = Flat(LIKE)[:]
    left = Flat(undo.taken_from({name: value + _named(average)[name] for name, value in LIKE.items()}))[:]
    np.testing.assert_allclose(left, params + rest, atol=1e-5)


def _named(values: Vector) -> dict[str, Vector]:
    start, named = 0, {}
    for name in sorted(LIKE):
        named[name] = values[start : start + LIKE[name].size].reshape(LIKE[name].shape)
        start += LIKE[name].size
    return named


@given(codecs, clips, positions)
def test_rounds_add_up_in_ascending_order_and_the_same_bytes_come_each_time(
    codec: str, clip: float | None, out: int
) -> None:
    manifest, staying = manifest_of(codec, clip), {0, 1, 2} - {out}
    with merged(manifest, staying, 0) as first, merged(manifest, sorted(staying)[::-1], 1) as second:
        one, other = (undo_of(PEERS[out], [each], manifest, LIKE) for each in (first, second))
        both, again = (undo_of(PEERS[out], [first, second], manifest, LIKE) for _ in range(2))
    np.testing.assert_array_equal(flat(both), flat(one) + flat(other))
    assert b"".join(both.pieces) == b"".join(again.pieces)
    assert both.removed == ((0, PEERS[out]), (1, PEERS[out]))


def test_who_gave_its_delta_to_nobody_any_more_is_taken_out_too_and_named() -> None:
    manifest = manifest_of()
    with merged(manifest, {0}) as each:
        undo = undo_of(PEERS[2], [each], manifest, LIKE)
    others = [Layout.of(manifest.parameters, manifest.averaging).decode(deltas_of(manifest)[at]) for at in (1, 2)]
    np.testing.assert_allclose(flat(undo), (2 * others[0] + 5 * others[1]) / 8, atol=1e-5)
    assert undo.removed == tuple(sorted((0, PEERS[at]) for at in (1, 2)))


def test_who_weighed_nothing_need_not_give_its_delta() -> None:
    manifest = manifest_of()
    with merged(manifest, {0}, weights=(1.0, 0.0, 3.0)) as each:
        undo = undo_of(PEERS[2], [each], manifest, LIKE)
    delta = Layout.of(manifest.parameters, manifest.averaging).decode(deltas_of(manifest)[2])
    np.testing.assert_allclose(flat(undo), 0.75 * delta, atol=1e-5)
    assert undo.removed == ((0, PEERS[2]),)


def test_a_member_is_in_a_round_if_a_part_of_it_is() -> None:
    record = finish_round(manifest_of(), make_state(manifest_of())).record
    assert all(is_merged(record, peer) for peer in PEERS)
    assert not is_merged(record, make_identity(9).peer)
    assert not is_merged(replace(record, receipts=()), PEERS[0])


# --- the blob ---------------------------------------------------------------------------------------


UNDO = Undo(PEERS[0], ((3, PEERS[0]), (4, PEERS[0])), {name: value * np.float32(0.5) for name, value in LIKE.items()})
BLOB = b"".join(UNDO.pieces)


def test_an_undo_is_read_as_it_was_written_and_no_longer_than_allowed() -> None:
    read = read_undo(BLOB, LIKE)
    assert (read.peer, read.removed, read.rounds) == (UNDO.peer, UNDO.removed, (3, 4))
    assert b"".join(read.pieces) == BLOB
    assert len(BLOB) <= max_undo_bytes(make_manifest())


def respelled(arrays: dict[str, Any] | None = None, **meta: Any) -> bytes:
    tensors, description = unpack_tensors(BLOB)
    return pack_tensors(tensors | (arrays or {}), description | meta)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"no undo",
        BLOB[:-1],
        respelled({"more": np.zeros(1, np.float32)}),
        respelled({"decoder.b": np.zeros(400, np.float16)}),
        respelled({"decoder.b": np.zeros((20, 20), np.float32)}),
        respelled({"decoder.b": np.full(400, np.nan, np.float32)}),
        respelled(format="p2pasr-state/1"),
        respelled(more=1),
        respelled(peer=7),
        respelled(peer=PEERS[1]),
        respelled(removed=7),
        respelled(removed=[]),
        respelled(removed=[[3]]),
        respelled(removed=[["3", PEERS[0]]]),
        respelled(removed=[[3, [PEERS[0]]]]),
        respelled(removed=[[4, PEERS[0]], [3, PEERS[0]]]),
        respelled(removed=[[3, PEERS[0]], [3, PEERS[0]]]),
    ],
)
def test_what_is_no_undo_of_these_parameters_is_refused(blob: bytes) -> None:
    with pytest.raises(Reject):
        read_undo(blob, LIKE)


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_an_undo_of_which_a_byte_was_changed_is_refused_or_reads_as_another(position: int, bits: int) -> None:
    changed = BLOB[:position] + bytes([BLOB[position] ^ bits]) + BLOB[position + 1 :]
    try:
        read = read_undo(changed, LIKE)
    except Reject:
        return
    assert b"".join(read.pieces) == changed != BLOB
