"""What can be set in `task.config`: the models that read it, as JSON Schema and as rows for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from p2pasr.errors import LocalError
from p2pasr.tasks import KINDS

REQUIRED = "must be given"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a task's section.

    Attributes:
        name: with the names of the sections that it lies in, as in `spec_augment.time_masks`.
        values: what it may be.
        default: what it is where it is left out, as JSON; :data:`REQUIRED` if it cannot be left out.
        meaning: in a sentence.
    """

    name: str
    values: str
    default: str
    meaning: str


def schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of a task's section.

    Raises:
        LocalError: there is no such kind.
    """
    if kind not in KINDS:
        raise LocalError(f"there is no task {kind!r}; there are {', '.join(KINDS)}")
    made: dict[str, Any] = import_module(KINDS[kind]).CONFIG.model_json_schema()
    return made


def settings(kind: str) -> dict[str, tuple[Setting, ...]]:
    """Every key of a task's section; those of its shapes apart, where it has some.

    Returns:
        Shape, such as "whisper", or the kind's own name → its keys.

    Raises:
        LocalError: there is no such kind.
    """
    whole = schema(kind)
    definitions = whole.get("$defs", {})
    shapes = [_resolved(each, definitions) for each in whole.get("oneOf", [whole])]
    return {_shape(each, kind): tuple(_rows(each, definitions, "")) for each in shapes}


def _shape(section: Mapping[str, Any], kind: str) -> str:
    architecture = section["properties"].get("architecture")
    return kind if architecture is None else _values(architecture, {})


def _resolved(section: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a schema refers to, with its own description and default."""
    if "$ref" not in section:
        return section
    return {**definitions[section["$ref"].rpartition("/")[2]], **section}


def _rows(section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[Setting]:
    required = section.get("required", ())
    for name, field in section["properties"].items():
        default = REQUIRED if name in required else _written(field.get("default", {}))
        yield Setting(
            prefix + name, _values(field, definitions), default, " ".join(field.get("description", "").split())
        )
        for choice in (field, *field.get("anyOf", ())):
            inner = _resolved(choice, definitions)
            if "properties" in inner:
                yield from _rows(inner, definitions, f"{prefix}{name}.")


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _values(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a value may be, in a few words."""
    field = _resolved(field, definitions)
    if "anyOf" in field:
        return " or ".join(_values(choice, definitions) for choice in field["anyOf"])
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    kind: str = field.get("type", "")
    if kind == "array":
        items = field.get("items", {})
        return f"list of {_values(items, definitions)}" if items else "list"
    if kind == "object":
        return "section" if "properties" in field else "map"
    return _NAMES.get(kind, kind) + _range(field)


def _range(field: Mapping[str, Any]) -> str:
    """The bounds of a number, as in "0 < … ≤ 1"."""
    low = next((f"{field[key]:g} {sign} " for key, sign in _LOWER.items() if key in field), "")
    high = next((f" {sign} {field[key]:g}" for key, sign in _UPPER.items() if key in field), "")
    return f" {low}…{high}" if low or high else ""


_NAMES = {"integer": "whole number", "string": "text", "boolean": "true or false", "null": "null"}
_LOWER = {"minimum": "≤", "exclusiveMinimum": "<"}
_UPPER = {"maximum": "≤", "exclusiveMaximum": "<"}
