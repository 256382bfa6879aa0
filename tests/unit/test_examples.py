"""The configurations that come with the package and its repository."""

from __future__ import annotations

from importlib import import_module, resources
from pathlib import Path
from typing import Any

import pytest

from p2pasr.protocol.manifest import read_config, validated
from p2pasr.tasks import KINDS

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*.yaml"))
DEMOS = sorted(Path(str(resources.files("p2pasr.demo"))).glob("tasks/*.yaml"))


@pytest.mark.parametrize("path", [*EXAMPLES, *DEMOS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_is_a_run(path: Path) -> None:
    config = read_config(path)
    module: Any = import_module(KINDS[config.task.kind])
    validated(module.CONFIG, config.task.config, "task.config")


def test_every_kind_of_task_has_an_example_and_a_demo() -> None:
    for paths in (EXAMPLES, DEMOS):
        assert {read_config(path).task.kind for path in paths} == KINDS.keys()
