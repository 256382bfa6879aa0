"""`python -m p2pasr.peer`: what is wrong is said in one sentence, before any network process starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from p2pasr import peer
from p2pasr.errors import LocalError
from p2pasr.peer import Peer, PeerOptions, check_peer_maddr
from p2pasr.peers.identity import load_or_create, lock
from p2pasr.peers.journal import Journal
from p2pasr.protocol.manifest import RunManifest
from p2pasr.runs import run_folder
from p2pasr.speech.prepare import Settings, prepare

from .conftest import MODEL, recordings

GOOD_MADDR = "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooWGRUZcMpN5tbMz9QJPXmpkRVTtXFyHxHKVVdVqTbKKVgV"

Failure = Callable[..., str]


@pytest.fixture
def run_file(tmp_path: Path, manifest: RunManifest) -> Path:
    """A manifest file."""
    manifest.write(tmp_path / "quick.run.json")
    return tmp_path / "quick.run.json"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Failure]:
    """Run a peer that cannot start and return its sentence."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> str:
        words = [str(argument) for argument in arguments]
        if "--state-dir" not in words:
            words += ["--state-dir", str(tmp_path / "home")]
        code = peer.main(words)
        err = capsys.readouterr().err
        assert code == 1
        assert "Traceback" not in err
        assert err.startswith("p2pasr: ")
        assert err.count("\n") == 1
        return err.removeprefix("p2pasr: ").strip()

    yield run
    signal.signal(signal.SIGTERM, before)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "maddr",
    [
        GOOD_MADDR,
        GOOD_MADDR.replace("tcp/31337", "udp/31337/quic"),
        GOOD_MADDR.replace("/ip4/203.0.113.5", "/dns4/home.example.org"),
        GOOD_MADDR.replace("/ip4/203.0.113.5", "/ip6/2001:db8::1"),
        f"{GOOD_MADDR}/p2p-circuit/p2p/12D3KooWGRUZcMpN5tbMz9QJPXmpkRVTtXFyHxHKVVdVqTbKKVgV",
        "/ip4/10.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    ],
)
def test_a_peers_address_is_accepted(maddr: str) -> None:
    check_peer_maddr(maddr)


BAD_MADDRS = [
    "",
    "203.0.113.5:31337",
    "/ip4/203.0.113.5/tcp/31337",
    "/ip4/203.0.113.5/tcp/31337/p2p/",
    "/ip4/203.0.113.5/tcp/31337/p2p/12D3KooW",
    GOOD_MADDR[1:],
    GOOD_MADDR.replace("12D3", "12D0"),
    GOOD_MADDR + " ",
    GOOD_MADDR.replace("/tcp", " /tcp"),
]


@pytest.mark.parametrize("maddr", BAD_MADDRS)
def test_what_is_no_peers_address_is_refused_with_an_example(fails: Failure, run_file: Path, maddr: str) -> None:
    sentence = fails("--run", run_file, "--initial-peers", GOOD_MADDR, maddr)

    assert sentence.startswith(f"{maddr!r} is not a peer's address; it looks like /ip4/203.0.113.5/tcp/31337/p2p/12D3")


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("--threads", "0", "0"),
        ("--threads", "-2", "-2"),
        ("--longest-clip", "0", "0"),
        ("--max-rounds", "0", "0"),
        ("--disk-gib", "0", "0"),
        ("--disk-gib", "nan", "nan"),
        ("--disk-gib", "inf", "inf"),
        ("--upload-limit-mbit", "-5", "-5"),
        ("--join-seconds", "-0.5", "-0.5"),
    ],
)
def test_a_number_that_must_be_above_zero_is_refused(
    fails: Failure, run_file: Path, option: str, value: str, found: str
) -> None:
    assert fails("--run", run_file, option, value) == f"{option} must be a finite number above 0 (found {found})"


def test_more_threads_than_any_machine_has_cores_are_refused(fails: Failure, run_file: Path) -> None:
    assert "--threads 100000 is more than 1024" in fails("--run", run_file, "--threads", "100000")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--run",),
        ("--run", "a", "--threads", "two"),
        ("--run", "a", "--log-format", "xml"),
        ("--run", "a", "--fly"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_code_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        peer.main(arguments)

    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m p2pasr.peer")


def test_nothing_is_written_before_the_arguments_are_right(fails: Failure, run_file: Path, tmp_path: Path) -> None:
    fails("--run", run_file, "--threads", "0")
    fails("--run", "nowhere.json")

    assert not (tmp_path / "home").exists()


# --- the run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere.run.json", "abc", "ab" * 31, "zz" * 32])
def test_a_run_that_is_neither_file_nor_id_is_refused(fails: Failure, name: str) -> None:
    assert fails("--run", name) == f"{name!r} is neither a manifest file nor a run id (64 hex digits)"


def test_a_run_id_alone_needs_peers_to_get_the_manifest_from(fails: Failure, manifest: RunManifest) -> None:
    assert fails("--run", manifest.run_id.hex()) == (
        "the first peer of a run needs its manifest file; with a run id alone, name peers with --initial-peers"
    )


def changed(run_file: Path, **changes: object) -> Path:
    content = {**json.loads(run_file.read_text(encoding="utf-8")), **changes}
    run_file.write_text(json.dumps(content), encoding="utf-8")
    return run_file


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colour": "red"}, "colour is not a known key; remove it or check its spelling"),
        ({"seed": "0"}, "seed: input should be a valid integer (found '0')"),
        ({"rounds": {"rounds": 0}}, "rounds.rounds: input should be greater than or equal to 1 (found 0)"),
        ({"rounds": {"rounds": 2, "pause": 1}}, "rounds.pause is not a known key; remove it or check its spelling"),
        ({"format": "p2pasr-run/0"}, "format: input should be 'p2pasr-run/1' (found 'p2pasr-run/0')"),
        ({"initial": "00"}, "initial: "),
        ({"shards": []}, "shards: tuple should have at least 1 item after validation, not 0 (found [])"),
        ({"parameters": 1.5}, "parameters: input should be a valid integer"),
        ({"name": 7}, "name: input should be a valid string (found 7)"),
    ],
)
def test_a_manifest_with_something_wrong_is_refused_naming_the_key(
    fails: Failure, run_file: Path, changes: dict[str, object], sentence: str
) -> None:
    assert fails("--run", changed(run_file, **changes)).startswith(f"{run_file}: {sentence}")


@pytest.mark.parametrize("content", [b"", b"{", b"not json", "運行".encode("big5")])
def test_a_manifest_that_is_not_json_is_refused(fails: Failure, run_file: Path, content: bytes) -> None:
    run_file.write_bytes(content)

    assert fails("--run", run_file).startswith(f"the manifest {run_file} is not JSON (")


# --- keys and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_refused(fails: Failure, run_file: Path, tmp_path: Path, mode: int) -> None:
    key = tmp_path / "identity.key"
    load_or_create(key)
    key.chmod(mode)

    sentence = fails("--run", run_file, "--identity-path", key)

    assert sentence == f"the identity {key} can be read by others (mode {mode:03o}): run chmod 600 {key}"


@pytest.mark.parametrize("content", [b"", b"\x08\x01\x12\x40" + bytes(64), b"-----BEGIN PRIVATE KEY-----"])
def test_a_file_that_is_no_key_is_refused(fails: Failure, run_file: Path, tmp_path: Path, content: bytes) -> None:
    key = tmp_path / "identity.key"
    load_or_create(key)
    key.write_bytes(content)

    sentence = fails("--run", run_file, "--identity-path", key)

    assert sentence.startswith(f"the identity {key} is damaged (")


@pytest.mark.parametrize("place", ["quick.run.json/identity.key", "quick.run.json/deep/identity.key", "."])
def test_a_key_where_none_can_be_written_is_refused(fails: Failure, run_file: Path, tmp_path: Path, place: str) -> None:
    path = tmp_path / place

    assert str(path) in fails("--run", run_file, "--identity-path", path)


def test_a_key_in_use_by_another_process_is_refused(fails: Failure, run_file: Path, tmp_path: Path) -> None:
    key = tmp_path / "identity.key"
    load_or_create(key)
    descriptor = lock(key)

    try:
        sentence = fails("--run", run_file, "--identity-path", key)
    finally:
        os.close(descriptor)
    assert sentence == (f"the identity {key} is in use by another process; give this one its own with --identity-path")


def test_a_state_folder_in_use_by_another_process_is_refused(
    fails: Failure, run_file: Path, tmp_path: Path, manifest: RunManifest
) -> None:
    folder = run_folder(tmp_path / "home", manifest.run_id)
    journal = Journal(folder)

    sentence = fails("--run", run_file)

    journal.close()
    assert sentence == (
        f"the state folder {folder} is in use by another process; give this one its own with --state-dir"
    )


def test_a_state_folder_that_is_a_file_is_refused(fails: Failure, run_file: Path) -> None:
    assert str(run_file) in fails("--run", run_file, "--state-dir", run_file)


# --- seed data ----------------------------------------------------------------------------------


def test_seed_data_without_shards_is_refused(fails: Failure, run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    assert "holds no shards" in fails("--run", run_file, "--seed-data", tmp_path / "empty")


def test_seed_data_of_another_run_is_refused(fails: Failure, run_file: Path, tmp_path: Path) -> None:
    recordings(tmp_path / "in", [{"audio": "1.wav", "text": "水"}])
    prepare(tmp_path / "in", tmp_path / "other", Settings(MODEL))

    sentence = fails("--run", run_file, "--seed-data", tmp_path / "other")

    assert sentence == f"none of the shards in {tmp_path / 'other'} belong to this run"


def test_a_corrupt_shard_is_not_lent(fails: Failure, run_file: Path, tmp_path: Path, shards: Path) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])

    assert f"{victim} is corrupt" in fails("--run", run_file, "--seed-data", tmp_path)


def test_a_start_that_failed_leaves_nothing_locked(fails: Failure, run_file: Path, tmp_path: Path) -> None:
    first = fails("--run", run_file, "--seed-data", "nowhere")

    assert fails("--run", run_file, "--seed-data", "nowhere") == first
    Journal(tmp_path / "journal").close()
    os.close(lock(tmp_path / "home" / "identity.key"))


# --- reports ------------------------------------------------------------------------------------


def test_for_programs_the_failure_is_an_event_too(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Failure
) -> None:
    code = peer.main(["--run", "nowhere", "--state-dir", str(tmp_path / "home"), "--log-format", "json"])

    captured = capsys.readouterr()
    event = json.loads(captured.out)
    assert code == 1
    assert event["event"] == "error"
    assert captured.err == f"p2pasr: {event['message']}\n"


def test_a_real_process_fails_with_one_sentence_and_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "p2pasr.peer", "--run", "nowhere", "--state-dir", tmp_path / "home"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "p2pasr: 'nowhere' is neither a manifest file nor a run id (64 hex digits)\n"
    assert done.stdout == ""


def test_a_program_gets_the_same_errors(tmp_path: Path, manifest: RunManifest) -> None:
    options = PeerOptions(state_dir=tmp_path / "home")

    with pytest.raises(LocalError, match="name peers with --initial-peers"), Peer(manifest.run_id.hex(), options):
        pass
    with pytest.raises(LocalError, match="holds no shards"), Peer(manifest, replace(options, seed_data=tmp_path)):
        pass
