"""What a person does with a run besides training in it: start one, score it, take the model out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2pasr import tasks
from p2pasr.errors import LocalError, Reject
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.private import require_probed
from p2pasr.protocol.manifest import RunConfig, RunManifest, parse_manifest, read_manifest, validated
from p2pasr.protocol.state import State, genesis, params_digest, parse_state
from p2pasr.protocol.tensors import Tensors
from p2pasr.speech.prepare import read_index
from p2pasr.speech.shards import check_digest
from p2pasr.tolerances import tolerant
from p2pasr.verify.lineage import Checked, follow
from p2pasr.verify.record import read_record


def default_home() -> Path:
    """Where keys and runs lie unless a person says otherwise: `~/.p2pasr`."""
    return Path.home() / ".p2pasr"


def run_folder(home: Path, run: bytes) -> Path:
    """A run's state folder."""
    return home / "runs" / run.hex()[:16]


def new_run(
    config: RunConfig,
    shards: Path,
    model: str | None = None,
    *,
    task: tasks.Task | None = None,
    dialect: str | None = None,
) -> RunManifest:
    """Make the manifest of a run: its configuration, its shards and its initial state.

    Args:
        shards: a folder that :func:`p2pasr.prepare` filled; every shard is checked against its name.
        model: a local folder of the base model, if it lies elsewhere than the configuration says.
        task: a task of your own; `config.task` then only has to name it.
        dialect: take the shards of this dialect only.

    Raises:
        LocalError: a shard is missing, corrupt, listed twice or made for another model or window, or the task
            cannot be built or does not offer what the run's data need, or `verify` has limits that honest hardware
            does not keep in the task's precision.
    """
    taken = [shard for shard in read_index(shards).shards if dialect in (None, shard.dialect)]
    for shard in taken:
        check_digest(shards / shard.file, shard.digest)
    content = config.model_dump()
    if task is None:
        files = [shards / shard.file for shard in taken]
        pinned = tasks.pin(config.task.kind, config.task.config, model, files)
        task = tasks.build(config.task.kind, pinned, seed=config.seed, model=model, shards=files)
        content["task"]["config"] = pinned
    check_offers(task, config)
    params = task.initial_params()
    content["verify"] = tolerant(config.verify, content["task"]["config"]).model_dump()
    content |= {
        "shards": tuple(asdict(shard) for shard in taken),
        "initial": params_digest(params).hex(),
        "parameters": sum(value.size for value in params.values()),
    }
    return validated(RunManifest, content, "the run")


def check_offers(task: tasks.Task, config: RunConfig) -> None:
    """Does the task offer what the run's data need?

    Raises:
        LocalError: shards are private, and it has no loss for the probe.
    """
    if config.data.policy == "private":
        require_probed(task)


def initial_state(manifest: RunManifest, task: tasks.Task) -> State:
    """The state before round 0, computed here and compared with the manifest.

    Raises:
        LocalError: this machine computes another one than the run's author did, or the task cannot train the run.
    """
    check_offers(task, manifest)
    params = task.initial_params()
    if params_digest(params).hex() != manifest.initial:
        raise LocalError(
            "this machine computes other initial parameters than the run's manifest states; "
            "install the p2pasr version that the run was made with"
        )
    return genesis(manifest, params)


@dataclass(frozen=True, slots=True)
class SavedRun:
    """What a state folder holds of a run.

    Attributes:
        folder: where the peer keeps them.
        held: round → digest of the state before it, as far as the folder still has the state.
    """

    manifest: RunManifest
    folder: Path
    store: BlobStore
    held: dict[int, bytes]

    def state(self, round_number: int | None, like: Tensors | None) -> State:
        """A state by its round; the newest if None.

        Args:
            like: the initial parameters; None where nothing will be made of the state's own.

        Raises:
            LocalError: the folder does not have it.
        """
        if not self.held:
            raise LocalError(f"{self.store.root.parent} holds no state of this run yet")
        chosen = max(self.held) if round_number is None else round_number
        if chosen not in self.held:
            rounds = f"{min(self.held)} to {max(self.held)}"
            raise LocalError(f"the state before round {chosen} is not kept here; rounds {rounds} are")
        return parse_state(self.store.get(self.held[chosen]), self.manifest, like)

    def lineage(self, start: State) -> Iterator[Checked]:
        """The rounds that this peer took part in, each checked against the one before.

        Rounds that it missed leave gaps; behind one, the check goes on from the state that is kept.

        Args:
            start: the state before round 0.

        Raises:
            LocalError: there are no records here, or one cannot be read.
        """
        try:
            records = [read_record(data) for data in Journal.read_records(self.folder)]
        except Reject as error:
            raise LocalError(f"{self.folder / 'lineage'} is damaged ({error})") from error
        if not records:
            raise LocalError(f"{self.folder / 'lineage'} holds no record of a round yet")
        gaps = [place for place in range(1, len(records)) if records[place].round != records[place - 1].next_round]
        for begin, end in itertools.pairwise([0, *gaps, len(records)]):
            linked = records[begin:end]
            first = linked[0].round
            before = start if first == 0 else self.state(first, start.params)
            yield from follow(self.manifest, before, linked, self._average)

    def _average(self, digest: bytes) -> bytes | None:
        return None if self.store.find(digest) is None else self.store.get(digest)


def open_run(run: str, state_dir: Path | None = None) -> SavedRun:
    """Open what this machine has of a run.

    Args:
        run: a manifest file or a run id.
        state_dir: a peer's state folder; the default one if None.

    Raises:
        LocalError: the run is not known here.
    """
    home = state_dir or default_home()
    manifest, run_id = read_run(run)
    folder = run_folder(home, run_id)
    if not folder.is_dir():
        raise LocalError(f"{home} knows nothing of run {run_id.hex()[:16]}; name a peer's folder with --state-dir")
    store = BlobStore(folder / "blobs")
    held = Journal.read_held(folder)
    found = {number: digest for number, digest in held.items() if store.find(digest) is not None}
    return SavedRun(manifest or _stored_manifest(store, run_id), folder, store, found)


def _stored_manifest(store: BlobStore, run_id: bytes) -> RunManifest:
    try:
        return parse_manifest(store.get(run_id))
    except Reject as error:
        raise LocalError(f"run id {run_id.hex()[:16]} names something that is no manifest ({error})") from error


def read_run(run: str) -> tuple[RunManifest | None, bytes]:
    """What a person means by a run: its manifest if they name the file, and its id.

    Raises:
        LocalError: it is neither a manifest file nor a run id.
    """
    if os.path.isfile(run):  # noqa: PTH113 (Path.is_file raises where a name is too long for a file's)
        manifest = read_manifest(Path(run))
        return manifest, manifest.run_id
    return None, parse_run_id(run)


def parse_run_id(text: str) -> bytes:
    """A run id from its 64 hex digits.

    Raises:
        LocalError: it is neither that nor a file.
    """
    try:
        run_id = bytes.fromhex(text)
    except ValueError:
        run_id = b""
    if len(run_id) != 32:
        raise LocalError(f"{text!r} is neither a manifest file nor a run id (64 hex digits)")
    return run_id


def evaluate(
    manifest: RunManifest,
    params: Tensors | None,
    shards: Path,
    *,
    device: str = "cpu",
    model: str | None = None,
    task: tasks.Task | None = None,
) -> Mapping[str, Any]:
    """Score parameters on a folder of held-out shards; None scores the untrained base.

    Args:
        task: built from the manifest before, to spare building it again.
    """
    built = task or build_task(manifest, device, model)
    return built.evaluate(params, shard_paths(shards))


def export(manifest: RunManifest, state: State, out: Path, *, task: tasks.Task | None = None) -> None:
    """Write a state's model for others to load (for LoRA: a PEFT adapter folder)."""
    built = task or build_task(manifest)
    out.mkdir(parents=True, exist_ok=True)
    dialects = sorted({shard.dialect for shard in manifest.shards})
    about = {
        "run": manifest.run_id.hex(),
        "name": manifest.name,
        "round": state.round,
        "state": state.digest.hex(),
        "seconds_merged": state.work,
        "dialects": dialects,
    }
    built.export(state.params, out, about)


def build_task(manifest: RunManifest, device: str = "cpu", model: str | None = None) -> tasks.Task:
    """The task of a run."""
    return tasks.build(manifest.task.kind, manifest.task.config, seed=manifest.seed, device=device, model=model)


def shard_paths(folder: Path) -> Sequence[Path]:
    """The shard files of a prepared folder, in the order of its index."""
    return [folder / shard.file for shard in read_index(folder).shards]


def find_shards(folder: Path, digests: Sequence[bytes]) -> Sequence[Path]:
    """The files of certain shards in a prepared folder, each compared with its digest.

    Raises:
        LocalError: one is missing or corrupt.
    """
    files = {shard.digest: folder / shard.file for shard in read_index(folder).shards}
    for digest in map(bytes.hex, digests):
        if digest not in files:
            raise LocalError(f"{folder} does not hold shard {digest[:12]}…; name a folder with all shards of the run")
        check_digest(files[digest], digest)
    return [files[digest.hex()] for digest in digests]
