"""The manifest: what a person writes, what a run is named by, and what a stranger may send."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.errors import LocalError, Reject
from p2pasr.protocol.encoding import blob_digest, pack, unpack
from p2pasr.protocol.manifest import (
    MAX_MANIFEST_BYTES,
    RunManifest,
    parse_manifest,
    read_config,
    read_manifest,
    validated,
)

from .builders import digest_of, make_manifest, manifest_content

CONFIG = """
name: a run
task:
  kind: toy
  config: {learning_rate: 1e-3, layers: [1, 2]}
rounds:
  rounds: 3
  max_seconds: 60
averaging:
  codec: int8
  outer: {kind: nesterov, learning_rate: 7e-1}
"""


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a manifest that is no map and no list."""
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, tuple | list):
        for index in range(len(value)):
            yield from leaves(value[index], (*path, index))
    else:
        yield path


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    out = copy.copy(content) if isinstance(content, dict) else list(content)
    out[path[0]] = replaced(content[path[0]], path[1:], value)
    return out


def lookup(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def test_a_config_is_read_with_its_defaults(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, CONFIG))
    assert config.rounds.rounds == 3
    assert config.rounds.max_seconds == 60.0
    assert type(config.rounds.max_seconds) is float
    assert config.averaging.outer.learning_rate == 0.7
    assert config.data.redundancy == 1
    assert config.seed == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("-1e3", -1e3),
        ("+2.5e+2", 250.0),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("3e5", 3e5),
        ("0.1", 0.1),
    ],
)
def test_scientific_notation_is_a_number(tmp_path: Path, text: str, number: float) -> None:
    config = read_config(written(tmp_path, CONFIG.replace("learning_rate: 1e-3", f"learning_rate: {text}")))
    assert config.task.config["learning_rate"] == number
    assert type(config.task.config["learning_rate"]) is float


@pytest.mark.parametrize("text", ["'1e-3'", "1e", "e3", "1e-3x", "v1e3"])
def test_what_only_resembles_scientific_notation_stays_text(tmp_path: Path, text: str) -> None:
    config = read_config(written(tmp_path, CONFIG.replace("learning_rate: 1e-3", f"learning_rate: {text}")))
    assert config.task.config["learning_rate"] == text.strip("'")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: a run", "nam: a run", "name is missing"),
        ("name: a run", "name: a run\nnmae: x", "nmae is not a known key"),
        ("name: a run", 'name: "a\\e[31m run"', r"name: 'a\\x1b\[31m run' is not one line of printable text"),
        ("name: a run", "name: |\n  a\n  run", r"name: 'a\\nrun\\n' is not one line of printable text"),
        ("kind: toy", "kind: toy\n  konfig: 1", r"task\.konfig is not a known key"),
        ("config: {learning_rate: 1e-3, layers: [1, 2]}", "config: 1", r"task\.config: .*map of keys .*\(found 1\)"),
        ("  rounds: 3", "  rounds: 3\n  segmens: 2", r"rounds\.segmens is not a known key"),
        ("  rounds: 3", "  rounds: three", r"rounds\.rounds: .*integer"),
        ("  rounds: 3", "  rounds: 3.0", r"rounds\.rounds: .*integer"),
        ("  rounds: 3", "  rounds: true", r"rounds\.rounds: .*integer"),
        ("  rounds: 3", "  rounds: 0", r"rounds\.rounds: .*\(found 0\)"),
        ("max_seconds: 60", "max_seconds: 0", r"rounds\.max_seconds"),
        ("max_seconds: 60", "max_seconds: .inf", r"rounds\.max_seconds"),
        ("max_seconds: 60", "max_seconds: .nan", r"rounds\.max_seconds"),
        ("max_seconds: 60", "max_seconds: '60'", r"rounds\.max_seconds: .*number"),
        ("codec: int8", "codec: int2", r"averaging\.codec"),
        ("codec: int8", "block: 100", "must be a multiple of block"),
        ("codec: int8", "weight_cap: 0.5", r"averaging\.weight_cap"),
        ("codec: int8", "max_group: 65", r"averaging\.max_group"),
        ("kind: nesterov", "kind: adagrad", r"averaging\.outer\.kind"),
        ("learning_rate: 7e-1", "momentum: 1.0", r"averaging\.outer\.momentum"),
        ("kind: toy", "kind: Toy", r"task\.kind"),
        ("kind: toy", "kind: ../toy", r"task\.kind"),
    ],
)
def test_a_mistake_in_a_config_is_named_with_its_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CONFIG
    path = written(tmp_path, CONFIG.replace(old, new))
    with pytest.raises(LocalError, match=message) as caught:
        read_config(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_weight_cap_is_a_number_that_can_be_written_down(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"averaging\.weight_cap: input should be a finite number \(found inf\)"):
        read_config(written(tmp_path, CONFIG.replace("codec: int8", "weight_cap: .inf")))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (".nan", "nan"),
        ("-.inf", "-inf"),
        ("2024-01-01", "datetime.date(2024, 1, 1)"),
        ("2024-01-01 12:00:00", "datetime.datetime(2024, 1, 1, 12, 0)"),
        ("18446744073709551616", "18446744073709551616"),
        ("-9223372036854775809", "-9223372036854775809"),
        ("!!binary aGk=", "b'hi'"),
        ("!!set {a, b}", "{'"),
        ('"\\ud800"', "'\\ud800'"),
    ],
)
@pytest.mark.parametrize("place", ["{}", "[1, {}]", "{{deep: {}}}"])
def test_a_task_config_that_no_manifest_can_hold_is_refused_where_it_is_read(
    tmp_path: Path, value: str, found: str, place: str
) -> None:
    key = {"{}": "learning_rate", "[1, {}]": "learning_rate.1", "{{deep: {}}}": "learning_rate.deep"}[place]
    path = written(tmp_path, CONFIG.replace("learning_rate: 1e-3", f"learning_rate: {place.format(value)}"))
    with pytest.raises(LocalError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: task.config: {key} is {found}")
    assert "which a manifest cannot hold; use text, true, false, null or a finite number" in str(caught.value)


@pytest.mark.parametrize(("key", "name"), [("1", "1"), ("on", "True"), ("2024-01-01", "2024-01-01"), ("null", "None")])
def test_a_key_of_a_task_config_that_is_no_text_is_named(tmp_path: Path, key: str, name: str) -> None:
    for old, new, place in (("{learning_rate", f"{{{key}: 1, learning_rate", name), ("1e-3", f"{{{key}: 1}}", None)):
        named = place or f"learning_rate.{name}"
        with pytest.raises(LocalError, match=f"the key '{named}' is no text; put it in quotes"):
            read_config(written(tmp_path, CONFIG.replace(old, new)))


def test_a_task_config_nests_as_deep_as_a_manifest_can_hold(tmp_path: Path) -> None:
    def nested(levels: int) -> Path:
        return written(tmp_path, CONFIG.replace("1e-3", "[" * levels + "1" + "]" * levels))

    config = read_config(nested(13))
    assert parse_manifest(make_manifest(task=config.task.model_dump()).canonical()).task == config.task
    with pytest.raises(LocalError, match=r"task\.config: learning_rate\.0.* is more than 14 levels deep; nest less"):
        read_config(nested(14))
    with pytest.raises(LocalError, match="14 levels deep"):
        read_config(written(tmp_path, CONFIG.replace("1e-3", "&itself [*itself]")))


@pytest.mark.parametrize("least", [5, 64, 1024])
def test_a_round_may_not_wait_for_more_peers_than_a_group_holds(tmp_path: Path, least: int) -> None:
    def config(most: int) -> Path:
        text = CONFIG.replace("rounds: 3", f"rounds: 3\n  min_peers: {least}")
        return written(tmp_path, text.replace("codec: int8", f"max_group: {most}"))

    with pytest.raises(LocalError) as caught:
        read_config(config(4))
    assert str(caught.value) == (
        f"{tmp_path / 'run.yaml'}: rounds.min_peers ({least}) is more than averaging.max_group (4), so that no group "
        f"could ever average; lower the one or raise the other"
    )
    if least <= 64:
        assert read_config(config(least)).rounds.min_peers == least


@pytest.mark.parametrize("text", ["", "[]", "7", "text", "null"])
def test_a_config_that_is_no_map_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(LocalError, match=r"run\.yaml: input should be a map of keys to values \(found "):
        read_config(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "\tx: 1",
        "a: !!python/object:os.system {}",
        "a: 2024-02-30",
        "a: !!int x",
        "a: \0",
        "[" * 5000,
    ],
)
def test_a_config_that_is_not_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(LocalError, match="is not YAML") as caught:
        read_config(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_manifest_is_not_taken_for_a_config(tmp_path: Path) -> None:
    make_manifest().write(tmp_path / "run.json")
    with pytest.raises(LocalError, match=r"run\.json is a run's manifest already, not a configuration; peers take it"):
        read_config(tmp_path / "run.json")


def test_a_config_in_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"run\.yaml is not YAML \('utf-8' codec can't decode"):
        read_config(written(tmp_path, "name: 廣東話".encode("big5")))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for read in (read_config, read_manifest):
        with pytest.raises(LocalError, match="cannot be read"):
            read(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 50_000, "null", b"\xff\xfe", '{"name": "\\ud800"}'])
def test_a_manifest_file_that_is_none_is_refused(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(LocalError):
        read_manifest(written(tmp_path, text))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.text(max_size=8)
        # 1e15 and 1e-7 are where JSON and Python change how they write a float.
        | st.floats(-1e20, 1e20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )
)
def test_a_manifest_keeps_its_name_through_its_canonical_bytes_and_through_json(config: Any) -> None:
    manifest = make_manifest(task={"kind": "toy", "config": {"any": config}})
    assert parse_manifest(manifest.canonical()).run_id == manifest.run_id
    through_json = json.loads(json.dumps(manifest.model_dump(), ensure_ascii=False))
    assert RunManifest.model_validate(through_json).run_id == manifest.run_id


def test_a_manifest_file_keeps_the_name_of_the_run(tmp_path: Path) -> None:
    manifest = make_manifest(name="廣東話 🎙")
    manifest.write(tmp_path / "run.json")
    assert read_manifest(tmp_path / "run.json") == manifest
    assert read_manifest(tmp_path / "run.json").run_id == manifest.run_id


def test_the_run_is_named_by_its_canonical_bytes() -> None:
    manifest = make_manifest()
    assert manifest.run_id == blob_digest(manifest.canonical())
    assert parse_manifest(manifest.canonical()) == manifest


def test_every_value_of_a_manifest_enters_its_name() -> None:
    manifest = make_manifest(rounds={"shards_per_peer": 3}, averaging={"part_values": 512})
    content = manifest.model_dump()
    others = {"nesterov": "fedavg", "fedavg": "nesterov", "float32": "int8", "average": "first", "mean": "median"}
    names = {manifest.run_id}
    varied = 0
    for path in leaves(content):
        value = lookup(content, path)
        if path in (("format",), ("data", "policy"), ("admission", "kind")):
            continue  # the only value that they may have, or may have alone
        if path[-1] in ("digest", "initial"):
            other: Any = digest_of(f"{path}").hex()
        elif isinstance(value, str):
            other = others.get(value, value + "x")
        elif path[-1] in (
            "momentum",
            "beta2",
            "epsilon",
            "trim",
            "hostile",
            "rate",
            "links",
            "reductions",
            "close",
            "far",
            "newcomer_share",
        ):
            other = 0.75 * value
        elif path[-1] == "max_group":
            other = value - 1
        elif path[-1] in ("block", "part_values"):
            other = value * 2
        elif path[-1] == "restart_rounds":
            other = 8
        else:
            other = (value or 0) + 1
        changed = RunManifest.model_validate(replaced(content, path, other))
        names.add(changed.run_id)
        varied += 1
    assert varied > 40
    assert len(names) == 1 + varied


def test_shards_that_are_listed_twice_are_refused() -> None:
    shards = manifest_content()["shards"]
    with pytest.raises(ValueError, match="shards are listed twice; leave recordings that repeat others out"):
        make_manifest(shards=(*shards, shards[0]))


def test_a_delta_of_too_many_parts_is_refused_with_the_size_that_parts_may_have() -> None:
    content = manifest_content(parameters=8192 * 256 + 1)
    with pytest.raises(LocalError) as caught:
        validated(RunManifest, content, "the run")
    assert str(caught.value) == (
        "the run: averaging.part_values (256) cuts 2097153 trained values into more than 8192 parts; "
        "set it to 257 or more"
    )
    assert make_manifest(parameters=8192 * 256).parameters == 8192 * 256


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "p2pasr-run/2"),
        (("initial",), "0" * 63),
        (("initial",), "A" * 64),
        (("initial",), "0" * 64 + "\n"),
        (("parameters",), 0),
        (("parameters",), (1 << 33) + 1),
        (("parameters",), 600.0),
        (("parameters",), True),
        (("shards",), ()),
        (("shards",), None),
        (("shards", 0, "digest"), "0" * 65),
        (("shards", 0, "digest"), bytes(32)),
        (("shards", 0, "bytes"), 0),
        (("shards", 0, "seconds"), 0.0),
        (("shards", 0, "seconds"), -1.0),
        (("shards", 0, "seconds"), 1e10),
        (("shards", 0, "dialect"), "x" * 65),
        (("shards", 0, "longest"), 0.0),
        (("shards", 0, "longest"), -1.0),
        (("shards", 0, "longest"), 1e10),
        (("shards", 0, "longest"), "5"),
        (("name",), ""),
        (("name",), "x" * 129),
        (("seed",), -1),
        (("seed",), 1 << 63),
        (("rounds", "rounds"), 10**9),
        (("task", "kind"), "a" * 65),
        (("averaging", "outer"), None),
        (("data", "policy"), "secret"),
        (("data", "redundancy"), 0),
    ],
)
def test_a_manifest_from_a_peer_with_one_bad_value_is_refused(path: tuple[Any, ...], value: Any) -> None:
    blob = pack(replaced(make_manifest().model_dump(), path, value))
    with pytest.raises(Reject, match="the manifest"):
        parse_manifest(blob)


def test_a_manifest_from_a_peer_lacks_nothing_and_has_nothing_more() -> None:
    content = make_manifest().model_dump()
    for key in content:
        with pytest.raises(Reject):
            parse_manifest(pack({other: value for other, value in content.items() if other != key}))
    with pytest.raises(Reject, match="note is not a known key"):
        parse_manifest(pack({**content, "note": "x"}))
    with pytest.raises(Reject, match=r"shards\.0\.note is not a known key"):
        parse_manifest(pack(replaced(content, ("shards", 0), {**content["shards"][0], "note": "x"})))


def test_a_manifest_from_a_peer_writes_out_what_has_a_default() -> None:
    content = make_manifest().model_dump()
    del content["retention"]
    with pytest.raises(Reject, match="canonical form"):
        parse_manifest(pack(content))


def test_a_manifest_from_a_peer_writes_floats_as_floats() -> None:
    content = replaced(make_manifest().model_dump(), ("rounds", "max_seconds"), 600)
    with pytest.raises(Reject, match="canonical form"):
        parse_manifest(pack(content))


@pytest.mark.parametrize("blob", [b"", b"\xc0", b"\x80", b"\x90", b"\xc1", pack("manifest"), b"\x81\xa1a" * 1000])
def test_bytes_that_are_no_manifest_are_refused(blob: bytes) -> None:
    with pytest.raises(Reject):
        parse_manifest(blob)


@given(st.data())
def test_a_manifest_with_a_flipped_bit_is_another_run_or_none(data: st.DataObject) -> None:
    blob = bytearray(make_manifest().canonical())
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    try:
        manifest = parse_manifest(bytes(blob))
    except Reject:
        return
    assert manifest.run_id == blob_digest(bytes(blob)) != make_manifest().run_id


def test_a_manifest_over_the_limit_is_refused_unseen() -> None:
    with pytest.raises(Reject, match="exceeds the limit"):
        parse_manifest(bytes(MAX_MANIFEST_BYTES + 1))


def test_a_manifest_of_a_hundred_thousand_shards_stays_under_the_limit() -> None:
    shard = make_manifest().model_dump()["shards"][0] | {
        "bytes": 1 << 40,
        "clips": 1 << 32,
        "dialect": "x" * 20,
        "longest": 29.999,
    }
    assert len(pack([shard] * 100_000)) + 10_000 < MAX_MANIFEST_BYTES


def test_a_run_keeps_its_name_when_a_sequence_of_the_task_comes_as_a_tuple_or_a_list() -> None:
    as_list = make_manifest(task={"kind": "toy", "config": {"layers": [1, 2]}})
    as_tuple = make_manifest(task={"kind": "toy", "config": {"layers": (1, 2)}})
    assert as_list.run_id == as_tuple.run_id
    assert unpack(as_list.canonical(), MAX_MANIFEST_BYTES)["task"]["config"]["layers"] == (1, 2)
    assert parse_manifest(as_list.canonical()) == as_list == as_tuple
