"""Reading and writing a run's records through the network process, checked as they come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from p2pasr.errors import Ignore, Reject
from p2pasr.peers.link import Link
from p2pasr.protocol.admission import surplus
from p2pasr.protocol.cohorts import Cohort
from p2pasr.protocol.messages import Accusation, Attestation, Audit, Claim, Message, Mix, Roster, Signed, seal, unseal
from p2pasr.protocol.rules import RoundView, check_attestation, check_claim, check_mix, check_roster, check_work
from p2pasr.protocol.signing import Signer, short

ROSTER_TTL: Final = 20.0
"""Seconds after its last sign of life that a peer counts as gone."""

CLAIM_TTL: Final = 120.0
ATTESTATION_TTL: Final = 60.0
AUDIT_TTL: Final = 600.0
ACCUSATION_TTL: Final = 600.0
MIX_TTL: Final = 120.0
LOOKUP_SECONDS: Final = 20.0

M = TypeVar("M", bound=Message)
S = TypeVar("S", Claim, Attestation)


class Records:
    """One peer's view of a run's directory, of which it reads and writes what concerns one cohort.

    Args:
        link: the network process.
        signer: this peer's key.
        run: the run's id.
        on_bad: told, in one sentence, of each record that is provably bad.
    """

    def __init__(self, link: Link, signer: Signer, run: bytes, on_bad: Callable[[str], None]) -> None:
        self._link = link
        self._signer = signer
        self._run = run
        self._on_bad = on_bad

    @property
    def peer(self) -> str:
        """This peer's ID."""
        return self._signer.peer

    def roster(self, cohort: Cohort) -> dict[str, Roster]:
        """Everybody of a cohort who is here now, this peer left out."""
        found = self._read("roster", cohort, Roster, lambda signed: check_roster(signed.message, self._run))
        found.pop(self.peer, None)
        return {peer: signed.message for peer, signed in found.items() if signed.message.stage != "leaving"}

    def claims(self, view: RoundView) -> dict[str, Signed[Claim]]:
        """The valid claims of a round, this peer's own left out."""
        number, cohort = view.round, view.cohort
        found = self._read("claim", cohort, Claim, lambda signed: check_claim(signed.message, view), number)
        found.pop(self.peer, None)
        return _without_surplus(found, view)

    def broken(self, view: RoundView) -> dict[str, Signed[Claim]]:
        """The claims of a round by peers of earlier rounds that name other work than their authors had to do."""

        def check(signed: Signed[Claim]) -> None:
            claim = signed.message
            if (claim.run, claim.round, claim.state) != (view.run, view.round, view.state):
                raise Ignore("it is for another round")
            if claim.peer not in view.credit:
                raise Ignore("keys are free, and nobody loses by a ban of one")
            try:
                check_work(claim, view)
            except Reject:
                return
            raise Ignore("nothing is wrong with it")

        return self._read("claim", view.cohort, Claim, check, view.round)

    def attestations(self, view: RoundView, cohort: Cohort) -> dict[str, Signed[Attestation]]:
        """What everybody in a cohort attests now who takes part as far as this view says, this peer left out."""
        found = self._read("attestation", cohort, Attestation, lambda s: check_attestation(s.message, view))
        found.pop(self.peer, None)
        return _without_surplus(found, view)

    def mixes(self, cohort: Cohort, number: int) -> dict[str, Signed[Mix]]:
        """What a cohort states about a mix, this peer too if it has stated anything."""
        return self._read("mix", cohort, Mix, lambda signed: check_mix(signed.message, cohort, self._run), number)

    def announce_roster(self, roster: Roster, cohort: Cohort) -> None:
        """Say what this peer does now; replaces what it said before.

        Training does not stop for it; only a peer that leaves waits until it is said.
        """
        wait = roster.stage == "leaving"
        self._link.announce("roster", "roster", cohort.name, seal(self._signer, roster).pack(), ROSTER_TTL, wait=wait)

    def announce_claim(self, claim: Signed[Claim], cohort: Cohort) -> None:
        """Publish this peer's claim."""
        self._link.announce("claim", "claim", _scope(cohort, claim.message.round), claim.pack(), CLAIM_TTL)

    def announce_attestation(self, attestation: Signed[Attestation], cohort: Cohort) -> None:
        """Publish this peer's attestation; replaces the one before, but what another cohort saw expires there."""
        self._link.announce("attestation", "attestation", cohort.name, attestation.pack(), ATTESTATION_TTL)

    def announce_mix(self, mix: Signed[Mix], cohort: Cohort) -> None:
        """State this peer's view of a mix; replaces what it stated before."""
        self._link.announce("mix", "mix", _scope(cohort, mix.message.round), mix.pack(), MIX_TTL)

    def announce_audit(self, audit: Signed[Audit], cohort: Cohort) -> None:
        """Publish what this peer found when it checked a round."""
        scope = _scope(cohort, audit.message.round)
        self._link.announce("audit", "audit", scope, audit.pack(), AUDIT_TTL, wait=False)

    def audits(self, cohort: Cohort, number: int) -> dict[str, Signed[Audit]]:
        """What members of a cohort found when they checked a round."""
        return self._read("audit", cohort, Audit, self._check_run, number)

    def announce_accusation(self, accusation: Signed[Accusation], cohort: Cohort) -> None:
        """Publish where the proofs that this peer holds can be had; replaces what it said before."""
        self._link.announce("accusation", "accusation", cohort.name, accusation.pack(), ACCUSATION_TTL, wait=False)

    def accusations(self, cohort: Cohort) -> dict[str, Signed[Accusation]]:
        """Where others of a cohort say that proofs can be had."""
        found = self._read("accusation", cohort, Accusation, self._check_run)
        found.pop(self.peer, None)
        return found

    def _check_run(self, signed: Signed[Audit] | Signed[Accusation]) -> None:
        if signed.message.run != self._run:
            raise Reject(f"{short(signed.message.peer)} speaks of another run")

    def _read(
        self,
        kind: str,
        cohort: Cohort,
        expected: type[M],
        check: Callable[[Signed[M]], None],
        number: int | None = None,
    ) -> dict[str, Signed[M]]:
        records = self._link.call("lookup", LOOKUP_SECONDS, kind=kind, scope=_scope(cohort, number))["records"]
        found: dict[str, Signed[M]] = {}
        for owner, data in records:
            try:
                signed = unseal(data, expected)
                check(signed)
            except Ignore:
                continue
            except Reject as error:
                self._on_bad(f"{error} (in the directory, from {short(owner)})")
                continue
            if signed.message.peer != owner:
                self._on_bad(f"{short(owner)} published a {kind} of {short(signed.message.peer)}")
            elif not cohort.has(self._run, owner):
                self._on_bad(f"{short(owner)} published a {kind} in cohort {cohort.name}, where it does not belong")
            else:
                found[owner] = signed
        return found


def _without_surplus(found: dict[str, Signed[S]], view: RoundView) -> dict[str, Signed[S]]:
    """Records but for those of guests that are more than their inviter can bring."""
    left_out = surplus((signed.message for signed in found.values()), view.manifest, view.guests)
    return {peer: signed for peer, signed in found.items() if peer not in left_out}


def _scope(cohort: Cohort, number: int | None) -> str:
    """Where a cohort's records lie, those of one round each in a place of their own."""
    if number is None:
        return cohort.name
    return f"{cohort.name}-{number}" if cohort.bits else str(number)
