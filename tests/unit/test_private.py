"""A peer's own shards on its own disk, and the runs and tasks that they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2pasr import tasks
from p2pasr.errors import LocalError
from p2pasr.peers.blobs import BlobStore
from p2pasr.private import check_use, open_private, require_probed, require_shards, within
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.tiers import EVERY
from p2pasr.runs import initial_state, new_run, shard_paths
from p2pasr.speech.prepare import Settings, prepare
from p2pasr.speech.shards import read_shard

from .builders import ToyTask
from .conftest import MODEL, recordings, run_config

PRIVATE = {"policy": "private"}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two shards that no run has."""
    rows = [{"audio": f"{number}.wav", "text": "水"} for number in range(4)]
    recordings(tmp_path / "in", rows)
    prepare(tmp_path / "in", tmp_path / "own", Settings(MODEL, dialect="yue", clips_per_shard=2))
    return tmp_path / "own"


def test_private_shards_are_read_from_where_they_lie_and_never_stored(own: Path, store: BlobStore) -> None:
    private = open_private(own, store)
    assert [path.parent for path in private.paths.values()] == [own.resolve()] * 2
    assert list(private.seconds.values()) == pytest.approx([1.2, 1.2])
    assert all(store.find(digest) is None for digest in private.paths)
    assert len(private.secret) == 32
    assert private.secret == open_private(own, store).secret


def test_private_shards_that_others_are_served_are_refused(own: Path, store: BlobStore) -> None:
    digest, path = next(iter(open_private(own, store).paths.items()))
    store.lend(path, digest)
    with pytest.raises(LocalError, match="is given to others too"):
        open_private(own, store)


def test_a_peer_of_a_tier_keeps_those_private_shards_that_it_can_train(own: Path, store: BlobStore) -> None:
    private = open_private(own, store)
    assert set(private.longest.values()) == {0.6}
    first, second = private.paths
    mixed = replace(private, longest={first: 12.0, second: 5.0})
    assert list(within(mixed, 5).paths) == [second]
    assert within(mixed, EVERY) == mixed


def test_a_damaged_private_shard_is_refused(own: Path, store: BlobStore) -> None:
    path = next(iter(open_private(own, store).paths.values()))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(LocalError, match="is corrupt"):
        open_private(own, store)


def test_private_shards_in_a_run_that_shares_its_own_are_refused(
    own: Path, store: BlobStore, manifest: RunManifest
) -> None:
    with pytest.raises(LocalError, match="shards that everybody can fetch and would not use --private-shards"):
        check_use(open_private(own, store), manifest)
    check_use(None, manifest)
    require_shards(None, manifest)


def test_the_probe_is_not_trained_on(own: Path, store: BlobStore) -> None:
    manifest = new_run(run_config(data=PRIVATE), own)
    with pytest.raises(LocalError, match="belongs to the run's probe, which nobody trains on"):
        check_use(open_private(own, store), manifest)


def test_a_peer_without_shards_of_its_own_is_told_to_name_them(own: Path, store: BlobStore, shards: Path) -> None:
    manifest = new_run(run_config(data=PRIVATE), shards)
    private = open_private(own, store)
    check_use(private, manifest)
    require_shards(private, manifest)
    with pytest.raises(LocalError, match="prepare yours with p2pasr data prepare and name the folder with --private"):
        require_shards(None, manifest)


def test_a_task_without_a_loss_for_the_probe_is_refused_in_private_runs_only(
    shards: Path, manifest: RunManifest
) -> None:
    class Plain(ToyTask):
        def initial_params(self) -> dict[str, np.ndarray]:
            return {"value": np.zeros(300, dtype=np.float32)}

    new_run(run_config(), shards, task=Plain())
    with pytest.raises(LocalError, match=r"Plain has no probe_loss; see p2pasr\.Probed"):
        new_run(run_config(data=PRIVATE), shards, task=Plain())
    private = manifest.model_copy(update={"data": manifest.data.model_copy(update=PRIVATE)})
    with pytest.raises(LocalError, match="needs a task that says its loss on the probe"):
        initial_state(private, Plain())


def test_lora_says_the_same_loss_in_pieces_and_a_greater_one_of_worse_parameters(
    make_task: Callable[..., tasks.Task], shards: Path
) -> None:
    task, paths = make_task(), shard_paths(shards)
    params = task.initial_params()
    first = require_probed(task).probe_loss(params, paths)
    assert make_task(micro_batch=3).probe_loss(params, paths) == pytest.approx(first, rel=1e-5)
    bent = {name: value + np.float32(0.5) for name, value in params.items()}
    assert task.probe_loss(bent, paths) > first


def test_lora_says_its_loss_for_a_token_and_not_for_a_shard(make_task: Callable[..., tasks.Task], shards: Path) -> None:
    task, paths = make_task(), shard_paths(shards)
    params = task.initial_params()
    tokens = [sum(len(clip.tokens) - 1 for clip in read_shard(path).clips) for path in paths]
    each = [task.probe_loss(params, [path]) for path in paths]
    assert task.probe_loss(params, paths) == pytest.approx(np.average(each, weights=tokens), rel=1e-5)
