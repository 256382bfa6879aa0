"""Train speech recognition together, from home, with nobody in charge.

The names below are the public interface. They are loaded when first used, so that `import p2pasr`
costs nothing and a network process never loads what only training needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from p2pasr.errors import LocalError, P2pasrError, RemoteError, TransportError
    from p2pasr.peer import Peer, PeerOptions
    from p2pasr.protocol.manifest import RunConfig, RunManifest, read_config, read_manifest
    from p2pasr.protocol.state import State
    from p2pasr.protocol.tensors import read_tensors
    from p2pasr.runs import evaluate, export, new_run
    from p2pasr.shards import OwnShard, write_shards
    from p2pasr.speech.prepare import Settings, prepare
    from p2pasr.tasks import Bounded, Checkpoint, Probed, SegmentPlan, SegmentReport, Task
    from p2pasr.tasks.training import GradientTask, TrainingConfig, fresh_params, trainable

_HOMES = {
    "LocalError": "p2pasr.errors",
    "P2pasrError": "p2pasr.errors",
    "RemoteError": "p2pasr.errors",
    "TransportError": "p2pasr.errors",
    "Peer": "p2pasr.peer",
    "PeerOptions": "p2pasr.peer",
    "RunConfig": "p2pasr.protocol.manifest",
    "RunManifest": "p2pasr.protocol.manifest",
    "read_config": "p2pasr.protocol.manifest",
    "read_manifest": "p2pasr.protocol.manifest",
    "evaluate": "p2pasr.runs",
    "export": "p2pasr.runs",
    "new_run": "p2pasr.runs",
    "Settings": "p2pasr.speech.prepare",
    "prepare": "p2pasr.speech.prepare",
    "Bounded": "p2pasr.tasks",
    "Checkpoint": "p2pasr.tasks",
    "Probed": "p2pasr.tasks",
    "SegmentPlan": "p2pasr.tasks",
    "SegmentReport": "p2pasr.tasks",
    "State": "p2pasr.protocol.state",
    "read_tensors": "p2pasr.protocol.tensors",
    "OwnShard": "p2pasr.shards",
    "write_shards": "p2pasr.shards",
    "GradientTask": "p2pasr.tasks.training",
    "TrainingConfig": "p2pasr.tasks.training",
    "fresh_params": "p2pasr.tasks.training",
    "trainable": "p2pasr.tasks.training",
    "Task": "p2pasr.tasks",
}

__all__ = [
    "Bounded",
    "Checkpoint",
    "GradientTask",
    "LocalError",
    "OwnShard",
    "P2pasrError",
    "Peer",
    "PeerOptions",
    "Probed",
    "RemoteError",
    "RunConfig",
    "RunManifest",
    "SegmentPlan",
    "SegmentReport",
    "Settings",
    "State",
    "Task",
    "TrainingConfig",
    "TransportError",
    "evaluate",
    "export",
    "fresh_params",
    "new_run",
    "prepare",
    "read_config",
    "read_manifest",
    "read_tensors",
    "trainable",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'p2pasr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
