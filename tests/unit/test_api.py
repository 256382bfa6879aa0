"""The public interface: every name is there, and nothing is loaded before it is used."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import p2pasr
from p2pasr import errors

HEAVY = ("torch", "transformers", "peft", "hivemind", "numpy", "soundfile", "rich", "typer")


def loaded(*modules: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after importing these."""
    script = "import sys; " + "; ".join(f"import {module}" for module in modules) + "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {*HEAVY} & {*done.stdout.split()}


@pytest.mark.parametrize("name", p2pasr.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    value = getattr(p2pasr, name)

    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(p2pasr)


def test_the_names_for_type_checkers_are_the_public_ones() -> None:
    tree = ast.parse(Path(p2pasr.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    checked = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }

    assert checked.keys() == {*p2pasr.__all__}
    assert checked == p2pasr._HOMES
    assert sorted(p2pasr.__all__) == p2pasr.__all__


def test_a_star_import_brings_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from p2pasr import *", names)  # noqa: S102

    assert {*p2pasr.__all__} <= names.keys()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'p2pasr' has no attribute 'train'"):
        p2pasr.train  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("p2pasr") == set()
    assert loaded("p2pasr.errors", "p2pasr.protocol.encoding") == set()


@pytest.mark.parametrize("modules", [("p2pasr.peer",), ("p2pasr.cli",), ("p2pasr.runs", "p2pasr.speech.prepare")])
def test_a_command_loads_torch_only_when_it_trains(modules: tuple[str, ...]) -> None:
    assert not loaded(*modules) & {"torch", "transformers", "peft"}


def test_the_version_is_the_packages() -> None:
    assert p2pasr.__version__ == importlib.metadata.version("p2pasr")


# --- errors -------------------------------------------------------------------------------------

TREE = {
    "P2pasrError": Exception,
    "LocalError": errors.P2pasrError,
    "NonFiniteStep": errors.LocalError,
    "RemoteError": errors.P2pasrError,
    "Ignore": errors.RemoteError,
    "Reject": errors.RemoteError,
    "TransportError": errors.P2pasrError,
    "LinkDown": errors.TransportError,
    "RoundFailed": errors.TransportError,
}


@pytest.mark.parametrize("name", TREE)
def test_an_error_hangs_on_its_branch(name: str) -> None:
    assert getattr(errors, name).__bases__ == (TREE[name],)


def test_the_tree_holds_no_other_error() -> None:
    found = {name for name, value in vars(errors).items() if isinstance(value, type)}

    assert found == {*TREE}


def test_whose_fault_it_was_is_told_by_one_branch_only() -> None:
    branches = (errors.LocalError, errors.RemoteError, errors.TransportError)

    for name in TREE.keys() - {"P2pasrError"}:
        assert sum(issubclass(getattr(errors, name), branch) for branch in branches) == 1
