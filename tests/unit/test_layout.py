"""The house: links at the top level, one import name, a wheel that holds everything."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["peers", "averaging", "verify", "bootstrap"])
def test_the_four_parts_are_links_into_the_package(part: str) -> None:
    link = ROOT / part
    assert link.is_symlink()
    assert link.readlink() == Path("p2pasr") / part
    assert (link / "__init__.py").is_file()


def test_a_wheel_from_the_committed_files_holds_every_module_and_the_demo_model(tmp_path: Path) -> None:
    tracked = _git("ls-files", "-z").split("\0")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--local", str(ROOT), str(clone)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(clone)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("p2pasr-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {path for path in tracked if path.startswith("p2pasr/") and (clone / path).is_file()}
    assert wanted - packed == set()
    assert {path.split("/")[0] for path in packed if not path.startswith("p2pasr-")} == {"p2pasr"}


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    named = {_name(line) for line in lines} - {"p2pasr"}
    pinned = {_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    assert named <= pinned


def test_nothing_that_is_committed_names_a_path_of_one_machine() -> None:
    for path in filter(None, _git("ls-files", "-z").split("\0")):
        if path.endswith((".py", ".md", ".toml", ".txt", ".yaml", "Makefile", "run")) and (ROOT / path).is_file():
            text = (ROOT / path).read_text(encoding="utf-8")
            assert "/wo" + "rk/" not in text, path
            assert "/ro" + "ot/" not in text, path


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _name(line: str) -> str:
    for mark in "=<>![; ":
        line = line.split(mark)[0]
    return line.lower().replace("_", "-")
