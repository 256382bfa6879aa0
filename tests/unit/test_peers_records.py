"""What a peer believes of what the directory returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from p2pasr.peers.records import ATTESTATION_TTL, CLAIM_TTL, MIX_TTL, ROSTER_TTL, Records
from p2pasr.protocol.cohorts import EVERYBODY, cohort_of
from p2pasr.protocol.messages import Message, seal, unseal

from .builders import (
    digest_of,
    make_attestation,
    make_claim,
    make_identity,
    make_manifest,
    make_mix,
    make_roster,
    make_state,
    view_of,
)

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
VIEW = view_of(MANIFEST, STATE)
ME, ANNE, BEN = map(make_identity, (1, 2, 3))


class Link:
    """A network process that returns what was put into it."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bytes]] = []
        self.announced: list[tuple[Any, ...]] = []
        self.waited_for: list[str] = []

    def call(self, method: str, seconds: float, /, **args: Any) -> dict[str, Any]:
        assert method == "lookup"
        self.asked = (args["kind"], args["scope"])
        return {"records": tuple(self.found)}

    def announce(self, slot: str, *args: Any, wait: bool = True) -> None:
        self.announced.append((slot, *args))
        if wait:
            self.waited_for.append(slot)


class World:
    def __init__(self) -> None:
        self.link = Link()
        self.bad: list[str] = []
        self.records = Records(self.link, ME, STATE.run, self.bad.append)

    def publish(self, who: Any, message: Message, owner: str | None = None) -> None:
        self.link.found.append((owner or who.peer, seal(who, message).pack()))


@pytest.fixture
def world() -> World:
    return World()


def test_the_roster_is_everybody_else_who_is_here(world: World) -> None:
    for who in (ME, ANNE, BEN):
        world.publish(who, make_roster(who, STATE))
    assert world.records.roster(EVERYBODY) == {who.peer: make_roster(who, STATE) for who in (ANNE, BEN)}
    assert world.link.asked == ("roster", "all")
    assert world.bad == []


def test_whoever_leaves_is_no_longer_here(world: World) -> None:
    world.publish(ANNE, make_roster(ANNE, STATE, stage="leaving"))
    assert world.records.roster(EVERYBODY) == {}


def test_claims_are_those_of_this_round(world: World) -> None:
    world.publish(ANNE, make_claim(ANNE, MANIFEST, STATE))
    world.publish(BEN, make_claim(BEN, MANIFEST, STATE, round=5))
    world.publish(ME, make_claim(ME, MANIFEST, STATE))
    assert set(world.records.claims(VIEW)) == {ANNE.peer}
    assert world.link.asked == ("claim", "0")
    assert world.bad == [], "a claim for another round is held against nobody"


def test_a_claim_that_breaks_a_rule_is_left_out_and_told(world: World) -> None:
    world.publish(ANNE, make_claim(ANNE, MANIFEST, STATE, samples=7))
    world.publish(BEN, make_claim(BEN, MANIFEST, STATE))
    assert set(world.records.claims(VIEW)) == {BEN.peer}
    (sentence,) = world.bad
    assert "states 7 samples" in sentence
    assert sentence.endswith(f"(in the directory, from …{ANNE.peer[-6:]})")


def test_attestations_are_those_of_this_run(world: World) -> None:
    world.publish(ANNE, make_attestation(ANNE, STATE))
    world.publish(BEN, make_attestation(BEN, STATE, run=digest_of("another run")))
    world.publish(ME, make_attestation(ME, STATE))
    found = world.records.attestations(VIEW, EVERYBODY)
    assert {peer: signed.message for peer, signed in found.items()} == {ANNE.peer: make_attestation(ANNE, STATE)}
    assert len(world.bad) == 1


def test_a_record_under_somebody_elses_name_is_left_out_and_told(world: World) -> None:
    world.publish(ANNE, make_attestation(ANNE, STATE), owner=BEN.peer)
    assert world.records.attestations(VIEW, EVERYBODY) == {}
    assert world.bad == [f"…{BEN.peer[-6:]} published a attestation of …{ANNE.peer[-6:]}"]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", bytes(9000), seal(ANNE, make_roster(ANNE, STATE)).pack()])
def test_what_is_no_record_of_the_kind_is_left_out_and_told(world: World, data: bytes) -> None:
    world.link.found.append((ANNE.peer, data))
    world.publish(BEN, make_claim(BEN, MANIFEST, STATE))
    assert set(world.records.claims(VIEW)) == {BEN.peer}
    assert len(world.bad) == 1


def test_announcements_are_signed_and_go_where_they_are_looked_for(world: World) -> None:
    claim = seal(ME, make_claim(ME, MANIFEST, STATE))
    attestation = seal(ME, make_attestation(ME, STATE))
    roster = make_roster(ME, STATE)
    world.records.announce_claim(claim, EVERYBODY)
    world.records.announce_attestation(attestation, EVERYBODY)
    world.records.announce_roster(roster, EVERYBODY)
    assert world.link.announced == [
        ("claim", "claim", "0", claim.pack(), CLAIM_TTL),
        ("attestation", "attestation", "all", attestation.pack(), ATTESTATION_TTL),
        ("roster", "roster", "all", seal(ME, roster).pack(), ROSTER_TTL),
    ]
    assert unseal(world.link.announced[2][3], type(roster)).message == roster


def test_nobody_waits_until_the_roster_is_published_but_who_leaves(world: World) -> None:
    world.records.announce_claim(seal(ME, make_claim(ME, MANIFEST, STATE)), EVERYBODY)
    world.records.announce_roster(make_roster(ME, STATE), EVERYBODY)
    assert world.link.waited_for == ["claim"]
    world.records.announce_roster(make_roster(ME, STATE, stage="leaving"), EVERYBODY)
    assert world.link.waited_for == ["claim", "roster"]


@pytest.mark.parametrize("bits", [1, 3, 10])
def test_a_cohort_reads_and_writes_in_places_of_its_own(world: World, bits: int) -> None:
    cohort = cohort_of(STATE.run, ME.peer, bits)
    view = dataclasses.replace(VIEW, cohort=cohort)
    asked = []
    for read in (
        lambda: world.records.roster(cohort),
        lambda: world.records.claims(view),
        lambda: world.records.attestations(VIEW, cohort),
        lambda: world.records.mixes(cohort, 7),
    ):
        read()
        asked.append(world.link.asked)
    world.records.announce_roster(make_roster(ME, STATE), cohort)
    world.records.announce_claim(seal(ME, make_claim(ME, MANIFEST, STATE)), cohort)
    world.records.announce_attestation(seal(ME, make_attestation(ME, STATE)), cohort)
    mix = seal(ME, make_mix(ME, STATE, round=7))
    world.records.announce_mix(mix, cohort)

    name = f"{bits}-{cohort.index}"
    assert asked == [("roster", name), ("claim", f"{name}-0"), ("attestation", name), ("mix", f"{name}-7")]
    assert [(kind, scope) for _, kind, scope, *_ in world.link.announced] == asked
    assert world.link.announced[-1] == ("mix", "mix", f"{name}-7", mix.pack(), MIX_TTL)


def test_what_a_peer_publishes_in_another_cohort_is_left_out_and_told(world: World) -> None:
    ours, theirs = (cohort_of(STATE.run, who.peer, 8) for who in (ANNE, BEN))
    assert ours != theirs
    for who in (ANNE, BEN):
        world.publish(who, make_attestation(who, STATE))
    assert set(world.records.attestations(VIEW, ours)) == {ANNE.peer}
    assert world.bad == [f"…{BEN.peer[-6:]} published a attestation in cohort {ours.name}, where it does not belong"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"run": digest_of("another run")}, "for another run"),
        ({"cohorts": (1, 0)}, "impossible cohorts"),
        ({"cohorts": (0, 0)}, "impossible cohorts"),
        ({"cohorts": (256,)}, "impossible cohorts"),
        ({"cohorts": ()}, "votes for nothing that has a name"),
        ({"chosen": bytes(32)}, "votes for nothing that has a name"),
    ],
)
def test_a_mix_that_breaks_a_rule_is_left_out_and_told(world: World, change: dict[str, Any], sentence: str) -> None:
    cohort = cohort_of(STATE.run, ANNE.peer, 8)
    world.publish(ANNE, make_mix(ANNE, STATE))
    assert set(world.records.mixes(cohort, 0)) == {ANNE.peer}
    world.link.found.clear()
    world.publish(ANNE, make_mix(ANNE, STATE, **change))
    assert world.records.mixes(cohort, 0) == {}
    assert sentence in world.bad[0]
