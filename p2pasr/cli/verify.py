"""`p2pasr verify` and `python -m p2pasr.verify`: see for oneself what peers did."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2pasr.cli import audit, calibrate, ledger
from p2pasr.cli.score import ModelDir
from p2pasr.errors import LocalError, RemoteError

if TYPE_CHECKING:
    from p2pasr.protocol.manifest import RunManifest
    from p2pasr.verify.evidence import Judge

app = typer.Typer(
    help="See for oneself what the peers of a run did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
app.command("audit")(audit.audit)
app.command("calibrate")(calibrate.calibrate)
app.command("ledger")(ledger.ledger)


@app.command()
def check(
    proof: Annotated[Path, typer.Argument(metavar="PROOF", help="a file from the evidence folder of a peer's run")],
    run: Annotated[Path, typer.Option(metavar="MANIFEST", help="the run's manifest file")],
    shards: Annotated[
        Path | None,
        typer.Option(metavar="SHARDS", help="folder with the run's shards, to train a segment again or for the probe"),
    ] = None,
    model: ModelDir = None,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of sentences")] = False,
) -> None:
    """Check a proof that a peer cheated.

    Nothing is needed but the run's manifest, and its shards for a segment or a delta on the probe. Ends with an error
    if it proves nothing.
    """
    from p2pasr.protocol.manifest import read_manifest
    from p2pasr.verify.evidence import MAX_PROOF_BYTES, Judge, unpack_proof

    started = time.perf_counter()
    manifest = read_manifest(run)
    if proof.stat().st_size > MAX_PROOF_BYTES:
        raise LocalError(f"{proof} is longer than any proof")
    try:
        read = unpack_proof(proof.read_bytes())
        how = {"segment": "trained again", "probe": "the loss on the probe"}.get(read.kind, "arithmetic")
        trained = how != "arithmetic"
        judge = _training_judge(manifest, shards, device, model) if trained and shards else Judge(manifest)
        sentence = read.check(judge)
    except RemoteError as error:
        if as_json:
            typer.echo(json.dumps({"proves": False, "reason": str(error)}, ensure_ascii=False, indent=1))
        raise LocalError(f"{proof} proves nothing: {error}") from error
    found: dict[str, Any] = {
        "proves": True,
        "kind": read.kind,
        "accused": read.accused,
        "sentence": sentence,
        "how": how,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    typer.echo(f"proved: {sentence}")
    typer.echo(f"against {read.accused}, by {found['how']} ({read.kind}) in {found['seconds']:.2f} s")


def _training_judge(manifest: RunManifest, shards: Path, device: str, model: str | None) -> Judge:
    from p2pasr import runs
    from p2pasr.private import require_probed
    from p2pasr.protocol.messages import Claim
    from p2pasr.protocol.state import State
    from p2pasr.protocol.tensors import Tensors
    from p2pasr.rerunning import train_segment
    from p2pasr.verify.evidence import Judge

    task = runs.build_task(manifest, device, model)
    like = runs.initial_state(manifest, task).params

    def rerun(claim: Claim, segment: int, before: State, start: bytes | None) -> bytes:
        paths = runs.find_shards(shards, claim.shards)
        return train_segment(task, manifest, claim, segment, before, start, paths, None)

    def probe_loss(params: Tensors) -> float:
        paths = runs.find_shards(shards, [bytes.fromhex(shard.digest) for shard in manifest.shards])
        return require_probed(task).probe_loss(params, paths)

    return Judge(manifest, like, rerun, probe_loss)
