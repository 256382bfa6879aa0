"""The probe: when a loss is proof, when it is nobody's fault, and what a proof of it must hold."""

from __future__ import annotations

import dataclasses
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging.codec import Layout
from p2pasr.errors import LocalError, Reject
from p2pasr.protocol.messages import seal
from p2pasr.protocol.private import NO_TRACE
from p2pasr.protocol.tensors import Tensors
from p2pasr.verify.evidence import Judge, ProbeProof, pack_proof, unpack_proof
from p2pasr.verify.probe import LEAST_LOSS, SLACK, Measured, measure

from .builders import delta_claim, digest_of, make_identity, make_manifest, make_state, random_delta

MANIFEST = make_manifest(data={"policy": "private", "probe_margin": 0.1})
STATE = make_state(MANIFEST)
EVE = make_identity(1)
DELTA = random_delta(7)
LAYOUT = Layout.of(MANIFEST.parameters, MANIFEST.averaging)


def far(params: Tensors) -> float:
    """A loss that grows with the way from where the run starts."""
    moved = sum(float(np.square(params[name] - STATE.params[name]).sum()) for name in params)
    return 1.0 + moved**0.5


def proof_of(delta: np.ndarray = DELTA) -> ProbeProof:
    claim = delta_claim(EVE, MANIFEST, STATE, delta, shards=(digest_of("own"),), seconds=60.0, trace_root=NO_TRACE)
    return ProbeProof(seal(EVE, claim), STATE.blob, b"".join(LAYOUT.encode(delta)))


JUDGE = Judge(MANIFEST, STATE.params, probe_loss=far)


@given(st.floats(0, 100), st.floats(0, 200), st.floats(0, 1))
def test_a_loss_within_the_margin_is_no_proof_and_one_beyond_margin_and_slack_is(
    before: float, after: float, margin: float
) -> None:
    limit = before + margin * max(before, LEAST_LOSS)
    measured = Measured(before, after, limit)
    assert measured.is_proof == (after > limit)
    if measured.finding == "different":
        assert measured.is_proof
        assert Measured(before, after - SLACK * (1 + before) / 2, limit).is_proof, "others who measure less agree"
    else:
        assert after <= limit + SLACK * (1 + before)


@pytest.mark.parametrize("after", [inf, nan])
def test_a_delta_that_leaves_no_loss_is_proof(after: float) -> None:
    assert Measured(1.0, after, 1.1).is_proof


@pytest.mark.parametrize("before", [inf, nan])
def test_nobody_is_blamed_for_a_state_that_has_no_loss(before: float) -> None:
    assert not Measured(before, nan, before).is_proof


def test_a_delta_is_measured_as_others_decode_it_and_in_whole() -> None:
    measured = measure(STATE, b"".join(LAYOUT.encode(DELTA)), MANIFEST, far)
    assert measured.before == 1.0
    assert measured.after == pytest.approx(1.0 + float(np.linalg.norm(DELTA)), rel=1e-5)
    assert measured.limit == pytest.approx(1.1)


def test_the_largest_delta_that_can_be_decoded_leads_the_largest_parameters_to_no_infinity() -> None:
    state = dataclasses.replace(STATE, params={n: np.full_like(v, 3.4028235e38) for n, v in STATE.params.items()})
    seen: list[Tensors] = []

    def loss(params: Tensors) -> float:
        seen.append(params)
        return 1.0

    huge = b"".join(LAYOUT.encode(np.full(MANIFEST.parameters, 3e38, dtype=np.float32)))
    measure(state, huge, MANIFEST, loss)
    assert all(np.isfinite(value).all() for params in seen for value in params.values())


def test_a_proof_convinces_whoever_reads_its_bytes() -> None:
    read = unpack_proof(pack_proof(proof_of()))
    assert read == proof_of()
    assert read.accused == EVE.peer
    assert "in round 0 takes the loss on the probe from 1.0000 to" in read.check(JUDGE)


def test_a_harmless_delta_is_no_proof() -> None:
    with pytest.raises(Reject, match=r"the delta takes the loss on the probe from 1\.0000 to 1\.0000"):
        proof_of(np.zeros_like(DELTA)).check(JUDGE)


def test_a_proof_with_another_delta_or_one_too_short_is_refused() -> None:
    other = b"".join(LAYOUT.encode(random_delta(8)))
    with pytest.raises(Reject, match="another delta than was claimed"):
        dataclasses.replace(proof_of(), delta=other).check(JUDGE)
    with pytest.raises(Reject, match="an encoded delta has"):
        dataclasses.replace(proof_of(), delta=other[:-1]).check(JUDGE)


def test_a_proof_in_a_run_whose_shards_are_shared_is_refused() -> None:
    with pytest.raises(Reject, match="about a probe, and the run has none"):
        proof_of().check(dataclasses.replace(JUDGE, manifest=make_manifest()))


def test_who_cannot_compute_the_loss_is_told_what_is_needed() -> None:
    with pytest.raises(LocalError, match="name its shards with --shards"):
        proof_of().check(Judge(MANIFEST, STATE.params))
