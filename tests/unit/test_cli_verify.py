"""`python -m p2pasr.verify`: proofs, ledgers, calibrations and audits by command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from p2pasr import runs
from p2pasr.averaging.codec import Flat, Layout
from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.averaging.rules import norm
from p2pasr.cli.audit import parse_rounds, show
from p2pasr.cli.calibrate import starting_states as starts
from p2pasr.errors import LocalError
from p2pasr.observer import Look
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.messages import Audit, Finding, Signed, seal
from p2pasr.protocol.state import State, advance
from p2pasr.rerunning import train_segment
from p2pasr.tasks import Checkpoint, Task
from p2pasr.verify.conflict import Conflict
from p2pasr.verify.evidence import ConflictProof, LinkProof, Opening, ProbeProof, Proof, SegmentProof, pack_proof

from .builders import delta_claim, finish_round, make_claim, make_identity, make_manifest, make_state, train_claim
from .conftest import Command, run_config

EVE, ANNE, BOB = make_identity(1), make_identity(2), make_identity(3)


@pytest.fixture
def verify(p2pasr: Command) -> Command:
    """Run `p2pasr verify` in this process."""
    return lambda *arguments: p2pasr("verify", *arguments)


def test_every_command_explains_itself(verify: Command) -> None:
    for command in ("check", "audit", "calibrate", "ledger"):
        result = verify(command, "--help")
        assert result.code == 0
        assert f"verify {command} [OPTIONS]" in result.out


# --- check --------------------------------------------------------------------------------------


@pytest.fixture
def toy_run(tmp_path: Path) -> tuple[RunManifest, State, Path]:
    """A run whose task nobody could build: arithmetic must not try."""
    manifest = make_manifest()
    path = tmp_path / "toy.run.json"
    manifest.write(path)
    return manifest, make_state(manifest), path


def save(folder: Path, proof: Proof) -> Path:
    path = folder / "proof.msgpack"
    path.write_bytes(pack_proof(proof))
    return path


@pytest.fixture
def link_proof(toy_run: tuple[RunManifest, State, Path], tmp_path: Path) -> Path:
    """Proof of a delta that its last checkpoint does not give."""
    manifest, state, _ = toy_run
    liar = train_claim(EVE, manifest, state, lie=0.25)
    return save(tmp_path, LinkProof(liar.claim, state.blob, Opening(liar.checkpoints[-1], liar.way(2))))


def test_a_proof_by_arithmetic_is_told_in_sentences(
    verify: Command, toy_run: tuple[RunManifest, State, Path], link_proof: Path
) -> None:
    result = verify("check", link_proof, "--run", toy_run[2])

    assert (result.code, result.err) == (0, "")
    proved, against = result.out.splitlines()
    assert proved.startswith("proved: ")
    assert "its own last checkpoint does not give" in proved
    assert against.startswith(f"against {EVE.peer}, by arithmetic (link) in ")


def test_a_fresh_process_checks_arithmetic_without_torch(
    toy_run: tuple[RunManifest, State, Path], link_proof: Path
) -> None:
    arguments = ["python -m p2pasr.verify", "check", str(link_proof), "--run", str(toy_run[2]), "--json"]
    script = (
        f"import runpy, sys; sys.argv = {arguments!r}\n"
        "try: runpy.run_module('p2pasr.verify', run_name='__main__')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr.strip()) == (0, "False")
    found = json.loads(done.stdout)
    assert found.pop("seconds") >= 0
    assert "its own last checkpoint" in found.pop("sentence")
    assert found == {"proves": True, "kind": "link", "accused": EVE.peer, "how": "arithmetic"}


def test_what_proves_nothing_ends_with_one_sentence(
    verify: Command, toy_run: tuple[RunManifest, State, Path], tmp_path: Path
) -> None:
    manifest, state, path = toy_run
    honest = train_claim(ANNE, manifest, state)
    proof = save(tmp_path, LinkProof(honest.claim, state.blob, Opening(honest.checkpoints[-1], honest.way(2))))
    result = verify("check", proof, "--run", path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"p2pasr: {proof} proves nothing: the claim's delta is the one")

    result = verify("check", proof, "--run", path, "--json")
    assert result.code == 1
    assert json.loads(result.out)["proves"] is False

    proof.write_bytes(b"junk")
    result = verify("check", proof, "--run", path)
    assert result.code == 1
    assert result.err.startswith(f"p2pasr: {proof} proves nothing: ")
    assert "Traceback" not in result.err


def test_a_proof_of_another_run_proves_nothing_in_this_one(verify: Command, link_proof: Path, tmp_path: Path) -> None:
    make_manifest(name="another").write(tmp_path / "other.json")
    result = verify("check", link_proof, "--run", tmp_path / "other.json")
    assert result.code == 1
    assert "proves nothing" in result.err


def test_a_proof_that_is_not_there_ends_with_one_sentence(
    verify: Command, toy_run: tuple[RunManifest, State, Path], tmp_path: Path
) -> None:
    result = verify("check", tmp_path / "none", "--run", toy_run[2])
    assert (result.code, result.err) == (1, f"p2pasr: {tmp_path / 'none'}: No such file or directory\n")


@dataclass(frozen=True)
class RealClaim:
    """A claim of two segments of the real task, with its checkpoints."""

    claim: Signed[Any]
    state: State
    checkpoints: tuple[bytes, ...]

    def proof(self, segment: int) -> SegmentProof:
        message = self.claim.message
        digests = part_digests(self.checkpoints)
        tree = Tree("trace", message.run, message.round, message.peer)
        opened = [Opening(data, tree.prove(digests, at)) for at, data in enumerate(self.checkpoints)]
        start = opened[segment - 1] if segment else None
        return SegmentProof(self.claim, segment, self.state.blob, start, opened[segment])


@pytest.fixture(scope="module")
def real_task(manifest: RunManifest) -> Task:
    """The run's task."""
    return runs.build_task(manifest)


@pytest.fixture(scope="module")
def small(manifest: RunManifest) -> RunManifest:
    """The run with segments that take a moment."""
    rounds = {**manifest.rounds.model_dump(), "steps_per_segment": 2, "samples_per_step": 2, "shards_per_peer": 1}
    return RunManifest.model_validate({**manifest.model_dump(), "rounds": rounds})


@pytest.fixture(scope="module")
def real_claims(small: RunManifest, real_task: Task, shards: Path) -> dict[str, RealClaim]:
    """An honest peer's claim, and that of one whose second segment was made up."""
    state = runs.initial_state(small, real_task)
    claims = {}
    for name, who in (("honest", ANNE), ("cheat", EVE)):
        claim = make_claim(who, small, state, segments=2)
        paths = runs.find_shards(shards, claim.shards)
        first = train_segment(real_task, small, claim, 0, state, None, paths, None)
        second = train_segment(real_task, small, claim, 1, state, first, paths, None)
        if name == "cheat":
            made = Checkpoint.unpack(second)
            second = replace(made, params={k: v + np.float32(1e-3) for k, v in made.params.items()}).pack()
        end = Flat(Checkpoint.unpack(second).params)[slice(0, small.parameters)]
        delta = end - Flat(state.params)[slice(0, small.parameters)]
        parts = Layout.of(small.parameters, small.averaging).encode(delta)
        trees = [Tree(kind, claim.run, 0, who.peer) for kind in ("trace", "delta")]
        roots = [tree.root(part_digests(items)) for tree, items in zip(trees, ((first, second), parts), strict=True)]
        claim = replace(claim, trace_root=roots[0], delta_root=roots[1], delta_norm=norm(delta))
        claims[name] = RealClaim(seal(who, claim), state, (first, second))
    return claims


def test_a_segment_is_trained_again(
    verify: Command, small: RunManifest, real_claims: dict[str, RealClaim], shards: Path, tmp_path: Path
) -> None:
    small.write(tmp_path / "run.json")
    proof = save(tmp_path, real_claims["cheat"].proof(1))
    result = verify("check", proof, "--run", tmp_path / "run.json", "--shards", shards, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert (found["proves"], found["how"], found["accused"]) == (True, "trained again", EVE.peer)
    assert "ends elsewhere" in found["sentence"]

    for name, segment in (("cheat", 0), ("honest", 1)):
        proof = save(tmp_path, real_claims[name].proof(segment))
        result = verify("check", proof, "--run", tmp_path / "run.json", "--shards", shards)
        assert result.code == 1
        assert "proves nothing: the segment, trained again, is same" in result.err


def test_without_shards_a_segment_is_not_judged(
    verify: Command, small: RunManifest, real_claims: dict[str, RealClaim], tmp_path: Path
) -> None:
    small.write(tmp_path / "run.json")
    proof = save(tmp_path, real_claims["cheat"].proof(1))
    result = verify("check", proof, "--run", tmp_path / "run.json")
    assert result.code == 1
    assert "name the shards with --shards" in result.err
    assert "proves nothing" not in result.err


def test_a_probe_proof_is_checked_by_the_loss_on_the_runs_shards(verify: Command, shards: Path, tmp_path: Path) -> None:
    private = runs.new_run(run_config(data={"policy": "private"}), shards)
    private.write(tmp_path / "run.json")
    state = runs.initial_state(private, runs.build_task(private))
    for delta, proves in ((np.full(private.parameters, 0.5), True), (np.zeros(private.parameters), False)):
        own = {"shards": (bytes(32),), "seconds": 60.0, "trace_root": bytes(32)}
        claim = seal(EVE, delta_claim(EVE, private, state, delta.astype(np.float32), **own))
        layout = Layout.of(private.parameters, private.averaging)
        whole = b"".join(layout.encode(delta.astype(np.float32)))
        proof = save(tmp_path, ProbeProof(claim, state.blob, whole))
        result = verify("check", proof, "--run", tmp_path / "run.json", "--shards", shards, "--json")
        found = json.loads(result.out)
        assert (result.code, found["proves"]) == ((0, True) if proves else (1, False))
        assert "takes the loss on the probe from" in found["sentence" if proves else "reason"]
    result = verify("check", proof, "--run", tmp_path / "run.json")
    assert result.code == 1
    assert "name its shards with --shards" in result.err


def test_shards_are_compared_with_their_digests_before_anybody_is_blamed(
    shards: Path, manifest: RunManifest, tmp_path: Path
) -> None:
    digests = [bytes.fromhex(ref.digest) for ref in manifest.shards]
    assert list(runs.find_shards(shards, digests[::-1])) == list(runs.shard_paths(shards))[::-1]
    with pytest.raises(LocalError, match="does not hold shard"):
        runs.find_shards(shards, [bytes(32)])
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoilt = runs.shard_paths(tmp_path)[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"\xff")
    with pytest.raises(LocalError, match="is corrupt"):
        runs.find_shards(tmp_path, digests[:1])


# --- ledger ---------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> tuple[RunManifest, Path]:
    """The state folder of a peer after two rounds, in the second of which Eve was banned."""
    manifest = make_manifest()
    folder = runs.run_folder(tmp_path / "home", manifest.run_id)
    journal, store = Journal(folder), BlobStore(folder / "blobs")
    store.put("manifest", manifest.canonical())
    states = [make_state(manifest)]
    for number in range(2):
        before = states[-1]
        finished = finish_round(manifest, before)
        merged = [claim.message for claim in finished.record.members]
        after = advance(before, manifest, merged, before.params, {})
        if number == 1:
            credit = {**after.credit, EVE.peer: 9e6, BOB.peer: 5e3}
            after = replace(after, bans={EVE.peer: 1}, credit=credit, strikes={ANNE.peer: (2, 1)})
        journal.record(number, finish_round(manifest, before, after.digest).record.pack())
        states.append(after)
    for state in states:
        journal.hold(state.round, store.put("state", state.blob))
    claims = [seal(EVE, make_claim(EVE, manifest, states[0], loss_after=loss)) for loss in (1.0, 2.0)]
    journal.prove("proof", pack_proof(ConflictProof(Conflict(*claims))))
    findings = tuple(
        Finding(who.peer, bytes(32), 0, finding, 0.0, bytes(32), bytes(32))
        for who, finding in ((ANNE, "same"), (ANNE, "same"), (EVE, "different"))
    )
    journal.note_audit(0, seal(BOB, Audit(manifest.run_id, BOB.peer, 0, states[1].digest, findings)).pack())
    journal.close()
    manifest.write(tmp_path / "run.json")
    return manifest, tmp_path


def test_the_ledger_ranks_peers_by_credit_and_banned_ones_last(verify: Command, home: tuple[RunManifest, Path]) -> None:
    _, folder = home
    result = verify("ledger", folder / "run.json", "--state-dir", folder / "home", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert (found["round"], found["credit_verified"]) == (2, True)
    assert [row["peer"] for row in found["peers"]] == [BOB.peer, ANNE.peer, EVE.peer]
    bob, anne, eve = found["peers"]
    assert (bob["credit"], bob["trust"]) == (5e3, 1.0)
    assert anne["credit"] > 0
    assert (anne["trust"], anne["strikes"], anne["suspended"]) == (0.25, 2, 9)
    assert (bob["strikes"], bob["suspended"]) == (0, None)
    assert anne["rounds"] == [0, 1]
    assert anne["checked"] == {"same": 2}
    assert (eve["banned"], eve["proofs"], eve["checked"]) == (1, ["conflict"], {"different": 1})


def test_the_ledger_thanks_the_first(verify: Command, home: tuple[RunManifest, Path]) -> None:
    _, folder = home
    result = verify("ledger", folder / "run.json", "--state-dir", folder / "home")
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith("Thank you, ")
    assert BOB.peer in result.out.splitlines()[-1]
    assert f"{ANNE.peer} is suspended until round 9." in result.out
    assert result.out.index(BOB.peer[-6:]) < result.out.index(ANNE.peer[-6:]) < result.out.index(EVE.peer[-6:])


def test_a_damaged_note_of_the_peer_is_said_to_be(verify: Command, home: tuple[RunManifest, Path]) -> None:
    manifest, folder = home
    run = runs.run_folder(folder / "home", manifest.run_id)
    (run / "audits" / "00000000.msgpack").write_bytes(b"junk")
    result = verify("ledger", folder / "run.json", "--state-dir", folder / "home")
    assert result.code == 1
    assert "is damaged" in result.err


# --- audit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [(None, (0, 49)), ("7", (7, 7)), ("10-20", (10, 20)), ("0-0", (0, 0))])
def test_a_range_of_rounds_is_read(text: str | None, expected: tuple[int, int]) -> None:
    assert parse_rounds(text, 50) == expected


@pytest.mark.parametrize("text", ["", "-", "5-", "-5", "20-10", "a-b", "1-2-3", "1.5"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(LocalError, match="is no range of rounds"):
        parse_rounds(text, 50)


def test_an_observer_needs_somebody_to_join_through(
    verify: Command, home: tuple[RunManifest, Path], tmp_path: Path
) -> None:
    _, folder = home
    for options in ((), ("--state-dir", folder / "home")):
        result = verify("audit", "--run", folder / "run.json", *options)
        assert result.code == 1
        assert "name a peer of the run with --initial-peers" in result.err


def test_checks_are_shown_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = Finding(EVE.peer, bytes(32), 3, "different", 0.05, bytes(32), bytes(32))
    show([Look(7, "segment", found)], ["evidence/proof.msgpack"], as_json=False)
    told = capsys.readouterr().out
    assert "different" in told
    assert "5.0e-02" in told
    assert "proof: evidence/proof.msgpack" in told
    show([Look(7, "segment", found)], [], as_json=True)
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check == {
        "round": 7, "peer": EVE.peer, "what": "segment", "item": 3, "finding": "different", "error": 0.05
    }  # fmt: skip


# --- calibrate ------------------------------------------------------------------------------------


def test_a_calibration_starts_from_the_first_state_and_the_newest_that_is_trained_from(tmp_path: Path) -> None:
    manifest = make_manifest(rounds={"rounds": 2})
    first = make_state(manifest)
    manifest.write(tmp_path / "run.json")
    run = str(tmp_path / "run.json")
    with pytest.raises(LocalError, match="knows nothing of run"):
        starts(run, tmp_path / "home", first)
    folder = runs.run_folder(tmp_path / "home", manifest.run_id)
    journal, store = Journal(folder), BlobStore(folder / "blobs")
    states = [first]
    for number in range(3):
        assert [state.round for state in starts(run, tmp_path / "home", first)] == [0, 1][: max(1, number)]
        journal.hold(number, store.put("state", states[-1].blob))
        states.append(advance(states[-1], manifest, [], first.params, {}))
    assert [state.round for state in starts(run, tmp_path / "home", first)] == [0, 1]
    journal.close()


def test_a_calibration_trains_in_other_classes_and_proposes_a_limit(
    verify: Command, small: RunManifest, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2pasr import calibration

    plain = calibration.HardwareClass("plain", "cpu", threads=1, capability="default")
    own = calibration.HardwareClass("own", "cpu")
    monkeypatch.setattr(calibration, "classes_here", lambda _device: [own, plain])
    small.write(tmp_path / "run.json")
    place, file = ("--run", tmp_path / "run.json", "--shards", shards), tmp_path / "errors.json"
    result = verify("calibrate", *place, "--segments", "2", "--json", "--out", file)
    found = json.loads(result.out)
    assert json.loads(file.read_text()) == found
    assert (found["precision"], found["run"]) == ("fp32", small.run_id.hex())
    assert {row["class"] for row in found["errors"]} == {"own", "plain", *calibration.CONTROLS}
    assert all(row["error"] == 0.0 for row in found["errors"] if row["class"] == "own")
    assert found["smallest_cheat"] > 0.01
    largest = max(row["error"] for row in found["errors"] if row["class"] == "plain")
    assert 0 < largest < 1e-2
    if found["refused"]:
        assert result.code == 1
    else:
        assert (result.code, found["close"]) == (0, pytest.approx(3 * largest))
    assert {row["group"] for row in found["errors"]} == {"param", "moment exp_avg", "moment exp_avg_sq"}


def test_a_calibration_refuses_a_limit_in_which_a_small_cheat_could_hide(
    verify: Command, small: RunManifest, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2pasr import calibration

    monkeypatch.setattr(calibration, "classes_here", lambda _device: [calibration.HardwareClass("own", "cpu")])
    for far, refused in ((0.04, True), (0.005, False)):
        run = small.model_copy(update={"verify": small.verify.model_copy(update={"far": far})})
        run.write(tmp_path / "run.json")
        result = verify("calibrate", "--run", tmp_path / "run.json", "--shards", shards, "--segments", "1")
        assert ("verify.far (0.04) is more than a fifth of what the smallest cheat differs by" in result.err) == refused
        assert result.code == (1 if refused else 0)


def test_what_a_calibration_measured_in_a_folder_that_does_not_exist_is_one_sentence(
    verify: Command, small: RunManifest, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from p2pasr import calibration

    monkeypatch.setattr(calibration, "classes_here", lambda _device: [calibration.HardwareClass("own", "cpu")])
    small.write(tmp_path / "run.json")
    place = ("--run", tmp_path / "run.json", "--shards", shards, "--out", tmp_path / "no" / "errors.json")
    result = verify("calibrate", *place, "--segments", "1")
    assert result.code == 1
    assert "the measurements cannot be written to" in result.err
