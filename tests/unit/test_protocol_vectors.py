"""Golden bytes: what is signed, hashed or averaged comes out the same in every version, on every machine.

`python -m tests.unit.test_protocol_vectors` writes the file anew, after a change of the protocol that is
meant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr.averaging import outer, rules
from p2pasr.averaging.codec import Codec, Layout
from p2pasr.averaging.merkle import Tree
from p2pasr.protocol.admission import work
from p2pasr.protocol.assignment import assign, segment_seed
from p2pasr.protocol.cohorts import MAX_BITS, Cohort, cohort_of
from p2pasr.protocol.encoding import blob_digest, digest, keyed_bytes, pack
from p2pasr.protocol.manifest import OuterSection, RuleSection
from p2pasr.protocol.messages import Invite, message_digest, seal
from p2pasr.protocol.signing import sign
from p2pasr.protocol.state import advance, remember
from p2pasr.protocol.tensors import pack_tensors

from .builders import (
    digest_of,
    initial_params,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_mix,
    make_receipt,
    make_roster,
    make_state,
)

PATH = Path(__file__).parents[1] / "vectors" / "protocol.json"

VALUES: list[Any] = [
    None,
    True,
    0,
    127,
    128,
    65_536,
    (1 << 64) - 1,
    -1,
    -33,
    -(1 << 63),
    0.0,
    -0.0,
    1.5,
    1e-300,
    "",
    "廣東話",
    b"",
    b"\x00\xff",
    [1, [2, [3]]],
    {"b": 1, "a": {"d": None, "c": [True, "x"]}},
    {"é": 1, "e": 2, "z": 3},
    "x" * 32,
    b"x" * 256,
    list(range(16)),
]

WHO = make_identity(1)
CENTERED_CLIP = RuleSection(kind="centered-clip", radius=0.7)


def vectors() -> dict[str, str]:
    """Name → hex."""
    return {name: data.hex() for name, data in (*_encoding(), *_records(), *_averaging(), *_states())}


def _encoding() -> Iterator[tuple[str, bytes]]:
    for number, value in enumerate(VALUES):
        yield f"pack {number:02d}", pack(value)
    yield "digest", digest("claim", b"body")
    yield "blob digest", blob_digest(b"body")
    yield "keyed bytes", keyed_bytes(b"key", 40)
    yield "peer id", WHO.peer.encode()
    yield "signature", sign(WHO, "claim", b"body")
    tensors = {
        "weight": np.array([[1.5, -2.0], [0.0, 3.25]], dtype=np.float32),
        "half": np.array([1, -0.5], dtype=np.float16),
        "ids": np.array([-1, 1 << 40], dtype=np.int64),
        "counts": np.array([7, -7], dtype=np.int32),
        "codes": np.array([-128, 127, 0], dtype=np.int8),
        "bytes": np.array([255], dtype=np.uint8),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "scalar": np.float32(4).reshape(()),
    }
    yield "tensors", pack_tensors(tensors, {"format": "vectors/1", "round": 3, "dialect": "粵", "loss": 0.1})
    yield "tensors, none", pack_tensors({}, {})


def _records() -> Iterator[tuple[str, bytes]]:
    manifest = make_manifest()
    state = make_state(manifest)
    yield "manifest", manifest.canonical()
    yield "run id", manifest.run_id
    claim = make_claim(WHO, manifest, state)
    messages = [
        make_roster(WHO, state),
        claim,
        make_attestation(WHO, state),
        make_receipt(WHO, state, [seal(WHO, claim)], {0: b"result", 1: b"other"}),
        make_mix(WHO, state),
        Invite(state.run, WHO.peer, make_identity(2).peer, 7),
    ]
    for message in messages:
        yield message.kind, seal(WHO, message).pack()
        yield f"{message.kind} digest", message_digest(message)
    yield "proof of work", work(manifest.run_id, WHO.peer, 8, 0, lambda _: None).to_bytes(8, "big")
    yield "assignment", b"".join(assign(manifest, state.digest, {}, WHO.peer))
    yield "segment seed", segment_seed(state.digest, WHO.peer, 3)
    yield "cohorts", bytes(cohort_of(manifest.run_id, WHO.peer, bits).index & 255 for bits in range(MAX_BITS + 1))
    yield "assignment in a cohort", b"".join(assign(manifest, state.digest, {}, WHO.peer, Cohort(1, 1)))


def _averaging() -> Iterator[tuple[str, bytes]]:
    delta = np.arange(-20, 20).astype(np.float32) / np.float32(7)
    delta[5], delta[30] = np.float32(1e-9), np.float32(1000)
    for codec in (Codec("float32"), Codec("float16"), Codec("int8", 16), Codec("int4", 16)):
        encoded = codec.encode(delta)
        yield f"{codec.name} encoding", encoded
        yield f"{codec.name} decoding", codec.decode(encoded, len(delta)).tobytes()
        yield f"{codec.name} parts", b"".join(Layout(40, 32, codec).encode(delta))
    contents = [digest_of(f"part {number}") for number in range(5)]
    tree = Tree("delta", digest_of("run"), 7, WHO.peer)
    for count in (1, 2, 3, 4, 5):
        yield f"merkle root of {count}", tree.root(contents[:count])
    yield "merkle proof", b"".join(tree.prove(contents, 2))
    parts = {0: delta, 2: delta * np.float32(0.5), 1: delta[::-1].copy()}
    yield "weighted mean", rules.weighted_mean(parts, (60.0, 61.5, 200.0)).tobytes()
    order = rules.drawn_order(digest_of("state"), [make_identity(number).peer for number in (1, 2, 3)])
    yield "drawn order", bytes(order)
    for reference in (None, delta * np.float32(0.3)):
        clipped = rules.aggregate(parts, (1.0,) * 3, CENTERED_CLIP, rules.Center(reference, order))
        yield f"centered clip {'without' if reference is None else 'with'} a reference", clipped.tobytes()


def _states() -> Iterator[tuple[str, bytes]]:
    manifest = make_manifest()
    state = make_state(manifest)
    yield "genesis", state.digest
    claims = [make_claim(make_identity(number), manifest, state) for number in (1, 2)]
    delta = {name: value * np.float32(0.125) for name, value in initial_params().items()}
    for kind in ("fedavg", "nesterov", "fedavgm", "fedadam"):
        section = OuterSection(kind=kind, learning_rate=0.7)
        params, moments = outer.step(state.params, state.moments, delta, section, 0)
        after = advance(state, manifest, claims, params, moments)
        yield f"state after a round of {kind}", after.digest
        params, moments = outer.step(after.params, after.moments, delta, section, 1)
        last = advance(after, manifest, [], params, moments)
        yield f"state after two rounds of {kind}", last.digest
    remembered = remember({}, delta, CENTERED_CLIP)
    yield "state with a reference", advance(state, manifest, claims, state.params, remembered).digest
    yield "ledger", after.blob[8 : 8 + int.from_bytes(after.blob[:8], "little")]


def test_the_bytes_of_the_protocol_are_those_of_the_file() -> None:
    assert vectors() == json.loads(PATH.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (None, "c0"),
        (-33, "d0df"),
        (1.5, "cb3ff8000000000000"),
        ({"b": 1, "a": {"d": None, "c": [True, "x"]}}, "82a16182a16392c3a178a164c0a16201"),
        ([1, [2, [3]]], "920192029103"),
        (b"\x00\xff", "c40200ff"),
    ],
)
def test_some_of_the_bytes_are_those_that_the_msgpack_specification_gives(value: Any, data: str) -> None:
    assert pack(value).hex() == data
    assert json.loads(PATH.read_text(encoding="utf-8"))[f"pack {VALUES.index(value):02d}"] == data


if __name__ == "__main__":
    PATH.write_text(json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
