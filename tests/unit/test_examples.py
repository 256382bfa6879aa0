"""The configurations that come with the package and its repository."""

from __future__ import annotations

import re
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import pytest

from p2pasr.catalogue import DIALECTS, write_shapes
from p2pasr.plan import sketch
from p2pasr.protocol.manifest import read_config, validated
from p2pasr.tasks import KINDS

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.yaml"))
DEMOS = sorted(Path(str(resources.files("p2pasr.demo"))).glob("tasks/*.yaml"))


@pytest.mark.parametrize("path", [*EXAMPLES, *DEMOS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_is_a_run(path: Path) -> None:
    config = read_config(path)
    module: Any = import_module(KINDS[config.task.kind])
    validated(module.CONFIG, config.task.config, "task.config")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of Whispers of published sizes, without weights."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder)
    return folder


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem.startswith("features")], ids=lambda p: p.stem)
def test_a_small_model_has_as_many_parameters_as_its_example_says_and_at_most_40_million(
    path: Path, shapes: Path
) -> None:
    config = dict(read_config(path).task.config)
    classes = {
        "dialects": DIALECTS,
        "speakers": [f"{index:016x}" for index in range(100)],
        "pronunciations": {"yue": {chr(0x4E00 + index): [f"phoneme {index}"] for index in range(300)}},
    }
    task = sketch("features", {**config, **classes, "model": str(shapes / Path(config["model"]).name)})
    said = re.search(r"([\d.]+) million parameters", path.read_text(encoding="utf-8"))
    millions = sum(parameter.numel() for parameter in task.trained.values()) / 1e6

    assert said is not None
    assert millions == pytest.approx(float(said[1]), rel=0.01)
    assert 5 <= millions <= 40


def test_every_kind_of_task_has_an_example_and_a_demo() -> None:
    for paths in (EXAMPLES, DEMOS):
        assert {read_config(path).task.kind for path in paths} == KINDS.keys()
