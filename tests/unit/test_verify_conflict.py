"""Two different statements of one peer: proof that convinces a stranger, and nothing else does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pasr.errors import Reject
from p2pasr.protocol.encoding import pack
from p2pasr.protocol.messages import seal
from p2pasr.verify.conflict import Conflict, contradict

from .builders import make_claim, make_identity, make_manifest, make_receipt, make_state

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
EVE, ANNE = make_identity(1), make_identity(2)
CLAIM = seal(EVE, make_claim(EVE, MANIFEST, STATE))
OTHER_CLAIM = seal(EVE, make_claim(EVE, MANIFEST, STATE, loss_after=0.123))
RECEIPT = seal(EVE, make_receipt(EVE, STATE, (CLAIM,), {0: b"one result"}))
OTHER_RECEIPT = seal(EVE, make_receipt(EVE, STATE, (CLAIM,), {0: b"another"}))


@pytest.mark.parametrize(("first", "second"), [(CLAIM, OTHER_CLAIM), (RECEIPT, OTHER_RECEIPT)])
def test_a_proof_survives_its_journey_and_names_the_cheat(first: object, second: object) -> None:
    proof = Conflict.unpack(Conflict(first, second).pack())  # type: ignore[arg-type]
    assert proof.peer == EVE.peer
    assert (proof.first, proof.second) == (first, second)
    assert "two different" in str(proof)


def test_what_an_honest_peer_signs_is_no_contradiction() -> None:
    assert not contradict(CLAIM, CLAIM)
    assert not contradict(CLAIM, seal(ANNE, make_claim(ANNE, MANIFEST, STATE)))
    assert not contradict(CLAIM, seal(EVE, make_claim(EVE, MANIFEST, STATE, round=STATE.round + 1)))
    assert not contradict(CLAIM, RECEIPT)
    other_group = make_receipt(EVE, STATE, (CLAIM,), {0: b"another"}, group=bytes(32))
    assert not contradict(RECEIPT, seal(EVE, other_group))


def test_claiming_a_round_again_from_the_state_that_holds_is_honest() -> None:
    after_the_fork = replace(STATE, credit={ANNE.peer: 60.0})
    assert after_the_fork.round == STATE.round
    assert after_the_fork.digest != STATE.digest
    again = seal(EVE, make_claim(EVE, MANIFEST, after_the_fork))
    assert not contradict(CLAIM, again)
    assert not contradict(again, OTHER_CLAIM)
    with pytest.raises(Reject, match="proves nothing"):
        Conflict.unpack(pack({"first": CLAIM.pack(), "kind": "claim", "second": again.pack()}))
    assert not contradict(RECEIPT, seal(EVE, make_receipt(EVE, after_the_fork, (CLAIM,), {0: b"another"})))


def test_statements_that_agree_are_no_proof() -> None:
    with pytest.raises(ValueError, match="do not contradict"):
        Conflict(CLAIM, CLAIM)
    with pytest.raises(Reject, match="proves nothing"):
        Conflict.unpack(pack({"first": CLAIM.pack(), "kind": "claim", "second": CLAIM.pack()}))


def test_a_forged_or_malformed_proof_is_refused() -> None:
    good = {"first": CLAIM.pack(), "kind": "claim", "second": OTHER_CLAIM.pack()}
    forged = OTHER_CLAIM.pack().replace(OTHER_CLAIM.signature, bytes(64))
    for change in (
        {"second": forged},
        {"kind": "receipt"},
        {"kind": "roster"},
        {"kind": ()},
        {"first": 1},
        {"more": 1},
    ):
        with pytest.raises(Reject):
            Conflict.unpack(pack({**good, **change}))
    for junk in (b"", pack(None), pack({}), bytes(10)):
        with pytest.raises(Reject):
            Conflict.unpack(junk)
