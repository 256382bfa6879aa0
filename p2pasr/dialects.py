"""Several dialects in one swarm: a run for each, which share their entry points and their configuration.

An adapter for each dialect is averaged only by those who train it. A peer says which it has recordings
of or cares about; an accent model chooses among the adapters afterwards (`p2pasr route`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from p2pasr.errors import LocalError
from p2pasr.protocol.manifest import RunConfig, RunManifest
from p2pasr.runs import new_run
from p2pasr.speech.prepare import read_index

FORMAT: Final = "p2pasr-dialects/1"


def new_runs(config: RunConfig, shards: Path, model: str | None = None) -> dict[str, RunManifest]:
    """A run for each dialect of a folder of shards: dialect code → its manifest.

    Args:
        shards, model: as for :func:`p2pasr.runs.new_run`.

    Raises:
        LocalError: as :func:`p2pasr.runs.new_run`, or there is only one dialect.
    """
    found = sorted({shard.dialect for shard in read_index(shards).shards})
    if len(found) < 2:
        raise LocalError(f"{shards} holds one dialect only ({found[0]}); leave --per-dialect out")
    named = {dialect: config.model_copy(update={"name": f"{config.name} ({dialect})"[:128]}) for dialect in found}
    return {dialect: new_run(each, shards, model, dialect=dialect) for dialect, each in named.items()}


def write_runs(path: Path, manifests: Mapping[str, RunManifest]) -> dict[str, Path]:
    """Write the manifests of a swarm's dialects, and a file that names them all, which peers share.

    Args:
        path: of the file that names them; manifests lie beside it.

    Returns:
        Dialect → its manifest's path.
    """
    stem = path.name.removesuffix(".json").removesuffix(".dialects")
    files = {dialect: path.with_name(f"{stem}.{dialect}.run.json") for dialect in manifests}
    for dialect, manifest in manifests.items():
        manifest.write(files[dialect])
    runs = {dialect: {"run": m.run_id.hex(), "manifest": files[dialect].name} for dialect, m in manifests.items()}
    path.write_text(json.dumps({"format": FORMAT, "dialects": runs}, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return files


def run_of(path: Path, dialect: str) -> str:
    """The run of a dialect: its manifest if that lies beside the file, or else its id.

    Raises:
        LocalError: the file is none that names the runs of dialects, or has no such dialect.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        runs: dict[str, Any] = content["dialects"]
        entry = runs.get(dialect)
        found = None if entry is None else (str(entry["run"]), path.with_name(Path(str(entry["manifest"])).name))
    except OSError as error:
        raise LocalError(f"{path} cannot be read ({error.strerror}); --dialect goes with a file of dialects") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LocalError(
            f"{path} does not name runs of dialects ({error}); p2pasr run new --per-dialect does"
        ) from error
    if found is None:
        raise LocalError(f"{path} has no dialect {dialect!r}; it has {', '.join(sorted(runs))}")
    run, manifest = found
    return str(manifest) if manifest.is_file() else run
