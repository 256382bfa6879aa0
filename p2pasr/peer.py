"""A training peer: `python -m p2pasr.peer --run RUN [--initial-peers MADDR …]`, or `Peer` in a program."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

from p2pasr import __version__
from p2pasr.agreeing import hold
from p2pasr.dialects import run_of
from p2pasr.errors import LinkDown, LocalError, P2pasrError, RemoteError, TransportError
from p2pasr.having import provide
from p2pasr.member import Member
from p2pasr.peers.blobs import GIBIBYTE, BlobStore, file_digest
from p2pasr.peers.config import LinkConfig, NodeConfig, is_peer_maddr
from p2pasr.peers.identity import load_or_create
from p2pasr.peers.identity import lock as lock_identity
from p2pasr.peers.journal import Journal
from p2pasr.peers.link import Link
from p2pasr.peers.records import Records
from p2pasr.peers.sync import fetch_manifest
from p2pasr.private import PrivateShards, check_use, open_private, within
from p2pasr.protocol.manifest import RunManifest
from p2pasr.protocol.state import State, parse_state
from p2pasr.report import Report
from p2pasr.round import check_not_banned, check_the_end, run_round
from p2pasr.runs import build_task, default_home, initial_state, read_run, run_folder
from p2pasr.speech.prepare import read_index
from p2pasr.speech.pretrained import quiet_libraries
from p2pasr.tasks import Task
from p2pasr.tickets import make_ticket
from p2pasr.waits import seconds_of

LINK_SECONDS: Final = 120.0
"""How long a peer waits for its network process to come back before it says so again."""

LINGER_SECONDS: Final = 30.0
"""How long a peer that has finished stays to give its state to those who have not."""

MAX_THREADS: Final = 1024
"""More than any home has cores; what every thread costs could end the machine."""

RETRY_SECONDS: Final = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """What a person decides about a peer.

    Attributes:
        initial_peers: multiaddrs to join through; none makes this the first peer.
        invite: the file of an invite to a run that asks for one.
        state_dir: where the key and the runs lie; `~/.p2pasr` if None.
        identity_path: the key; `identity.key` in the state folder if None.
        host_maddrs: multiaddrs to listen on.
        announce_maddrs: multiaddrs to tell others, for forwarded ports.
        client_mode: accept no connections (behind a router that cannot be changed).
        upload_limit_mbit: cap on uploads, Mbit/s.
        seed_data: a folder of prepared shards to give to others and train on.
        private_shards: a folder of prepared shards to train on and give to nobody, in runs with private ones.
        device: "cpu", "cuda", "cuda:1", or "auto".
        threads: CPU threads for training; torch's choice if None.
        longest_clip: seconds of the longest clip to train on; shards with longer ones are left to others. By the memory
            that the device has if None.
        model: a local folder of the base model, where it cannot be loaded by its name.
        disk_gib: budget of the blob store, GiB.
        max_rounds: rounds to take part in before leaving; None for the whole run.
        join_seconds: how long to keep trying to reach the initial peers.
    """

    initial_peers: tuple[str, ...] = ()
    invite: Path | None = None
    state_dir: Path | None = None
    identity_path: Path | None = None
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    client_mode: bool = False
    upload_limit_mbit: float | None = None
    seed_data: Path | None = None
    private_shards: Path | None = None
    device: str = "auto"
    threads: int | None = None
    longest_clip: float | None = None
    model: str | None = None
    disk_gib: float = 50.0
    max_rounds: int | None = None
    join_seconds: float = 60.0


class Peer:
    """One member of one run. Use it as a context manager; leaving it ends the network process.

    Args:
        run: a manifest file, a run id (64 hex digits), or a manifest.
        options: see :class:`PeerOptions`.
        report: where events go; text on standard output if None.
        task: a task of your own; built from the manifest if None.
    """

    def __init__(
        self,
        run: str | Path | RunManifest,
        options: PeerOptions | None = None,
        report: Report | None = None,
        *,
        task: Task | None = None,
    ) -> None:
        self.options = options or PeerOptions()
        self.report = report or Report()
        self._run = run
        self._task = task
        self._cleanup = contextlib.ExitStack()
        self.member: Member

    def __enter__(self) -> Peer:
        with self._cleanup:
            self._start()
            self._cleanup = self._cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.report.close()
        self._cleanup.close()

    def _start(self) -> None:
        options, report = self.options, self.report
        manifest, run = self._read_run()
        home = options.state_dir or default_home()
        identity_path = options.identity_path or home / "identity.key"
        identity = load_or_create(identity_path)
        self._cleanup.callback(os.close, lock_identity(identity_path))
        folder = run_folder(home, run)
        journal = Journal(folder)
        self._cleanup.callback(journal.close)
        store = BlobStore(folder / "blobs", int(options.disk_gib * GIBIBYTE))
        store.tidy()
        if manifest is not None:
            store.put("manifest", manifest.canonical())
        lend = self._lend(store, manifest)
        private = None if options.private_shards is None else open_private(options.private_shards, store)
        if manifest is not None:
            check_use(private, manifest)
        config = LinkConfig(
            node=NodeConfig(
                identity_path=str(identity_path),
                socket_dir="",
                host_maddrs=options.host_maddrs,
                announce_maddrs=options.announce_maddrs,
                initial_peers=options.initial_peers,
                known_peers=journal.known_peers() if options.initial_peers else (),
                client_mode=options.client_mode,
                join_seconds=options.join_seconds,
            ),
            run=run,
            store_root=str(store.root),
            budget_bytes=store.budget_bytes,
            upload_bytes_per_second=None if options.upload_limit_mbit is None else options.upload_limit_mbit * 1e6 / 8,
            lend=lend,
        )
        link = Link(config, self._on_link_event, folder)
        self._cleanup.callback(link.stop)
        link.start()
        if manifest is not None:  # loads torch while the network process joins
            self._task = self._task or build_task(manifest, _device(options), options.model)
        link.joined()
        if manifest is None:
            report.wait(f"fetching the manifest of run {run.hex()[:16]} from peers")
            manifest = fetch_manifest(link, store, run, options.join_seconds, report.wait)
            check_use(private, manifest)
        task = self._task or build_task(manifest, _device(options), options.model)
        tier = self._tier(manifest, task, private)
        private = None if private is None else within(private, tier)
        state = initial_state(manifest, task)
        like = state.params
        head = _newest_intact(journal, store, report)
        if head is not None:
            state = parse_state(store.get(head), manifest, like)
        self.member = Member(
            manifest=manifest,
            identity=identity,
            task=task,
            link=link,
            store=store,
            journal=journal,
            records=Records(link, identity, run, report.warn),
            report=report,
            like=like,
            state=state,
            client_mode=options.client_mode,
            model=options.model,
            private=private,
            tier=tier,
        )
        if head is None:
            hold(self.member, state)
        provide(self.member)
        report.emit(
            "ready",
            f"{manifest.name}: run {run.hex()} at round {state.round} of {manifest.rounds.rounds}, this peer is "
            f"{identity.peer}",
            run=run,
            peer=identity.peer,
            maddrs=link.maddrs,
            round=state.round,
            rounds=manifest.rounds.rounds,
        )
        for maddr in link.maddrs[:1]:
            report.emit(
                "invite",
                f"others join with: python -m p2pasr.peer --run {run.hex()} --initial-peers {maddr}",
                maddr=maddr,
            )

    @property
    def manifest(self) -> RunManifest:
        """The run's manifest, also where it came from peers."""
        return self.member.manifest

    @property
    def task(self) -> Task:
        """What this peer trains."""
        return self.member.task

    @property
    def state(self) -> State:
        """The state that this peer holds: after :meth:`rounds` yields, that of the round just committed."""
        return self.member.state

    def rounds(self) -> Iterator[int]:
        """Take part in rounds, yielding the number of each that was committed, until the run or our share ends.

        Before it ends by itself it checks the last round and stays a little for those who are behind or check its work.

        Raises:
            LocalError: something here must be mended by a person.
        """
        member, limit = self.member, self.options.max_rounds
        member.ticket = make_ticket(member.manifest, member.peer, member.journal, self.options.invite, self.report)
        done = failures = 0
        while not self._over() and (limit is None or done < limit):
            number = member.state.round
            try:
                committed = run_round(member)
                failures = 0
            except LinkDown as error:
                self.report.wait(str(error))
                with contextlib.suppress(TransportError):
                    member.link.wait_up(LINK_SECONDS)
                continue
            except (TransportError, RemoteError) as error:
                delay = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
                failures += 1
                self.report.warn(f"{error}; trying again in {delay:.0f} s")
                time.sleep(delay)
                continue
            if committed:
                done += 1
                yield number
        check_not_banned(member)  # the last state may be the one that says so
        check_the_end(member)
        self._linger()

    def run(self) -> None:
        """Take part until the run or our share of it ends."""
        for _ in self.rounds():
            pass
        self.report.emit(
            "done",
            f"left the run at round {self.member.state.round} of {self.member.manifest.rounds.rounds}",
            round=self.member.state.round,
            state=self.member.state.digest,
        )

    def _over(self) -> bool:
        return self.member.state.round >= self.member.manifest.rounds.rounds

    def _linger(self) -> None:
        """Wait until everybody who is here attests our state or a later one, and has checked the run's last round."""
        member, number = self.member, self.member.state.round
        began = time.monotonic()
        with contextlib.suppress(P2pasrError):
            if self._over():
                member.say("waiting")  # in a round that does not come: this peer has checked what it had to
            while True:
                seen = member.records.attestations(member.view, member.cohort)
                attested = {peer: signed.message.round for peer, signed in seen.items()}
                roster = member.records.roster(member.cohort)
                behind = [peer for peer in roster if attested.get(peer, 0) < number]
                checking = [peer for peer in roster if self._over() and roster[peer].round < number]
                waited = time.monotonic() - began
                if behind and waited < LINGER_SECONDS:
                    self.report.wait(f"staying for {len(behind)} peers that do not hold round {number} yet")
                elif checking and not member.fresh and waited < seconds_of(member.manifest.rounds):
                    self.report.wait(f"staying for {len(checking)} peers that may check what this one claimed")
                else:
                    break
                time.sleep(1.0)
            member.say("leaving")

    def _read_run(self) -> tuple[RunManifest | None, bytes]:
        if isinstance(self._run, RunManifest):
            return self._run, self._run.run_id
        manifest, run = read_run(str(self._run))
        if manifest is None and not self.options.initial_peers:
            raise LocalError(
                "the first peer of a run needs its manifest file; with a run id alone, name peers with --initial-peers"
            )
        return manifest, run

    def _lend(self, store: BlobStore, manifest: RunManifest | None) -> tuple[tuple[str, bytes], ...]:
        folder = self.options.seed_data
        if folder is None:
            return ()
        wanted = None if manifest is None else {shard.digest for shard in manifest.shards}
        files = []
        for shard in read_index(folder).shards:
            if wanted is None or shard.digest in wanted:
                path = (folder / shard.file).resolve()
                store.lend(path, bytes.fromhex(shard.digest))
                files.append((str(path), bytes.fromhex(shard.digest)))
        if not files:
            raise LocalError(f"none of the shards in {folder} belong to this run")
        return tuple(files)

    def _tier(self, manifest: RunManifest, task: Task, private: PrivateShards | None) -> int:
        """Which shards this peer trains; says why where that is not all of them."""
        from p2pasr.tiers import choose  # loads torch

        if private is None:
            lengths = [shard.longest for shard in manifest.shards]
        else:
            lengths = [private.longest.get(shard) for shard in private.paths]
        chosen = choose(lengths, self.options.longest_clip, task, manifest.rounds.samples_per_step)
        if chosen.reason:
            self.report.emit("tier", chosen.reason, tier=chosen.tier)
        return chosen.tier

    def _on_link_event(self, event: dict[str, Any]) -> None:
        """Tell what the network process tells; called from the handle's thread."""
        kind, reason = event["event"], event.get("reason", "")
        if kind == "waiting":
            self.report.wait(reason)
        elif kind in ("down", "refused", "warning"):
            self.report.warn(reason)
        elif kind == "fetch":
            self.report.progress(f"fetching a {event['kind']}", event["done"], event["size"])
        elif kind == "averaging":
            self.report.progress("averaging", event["done"], event["size"])
        elif kind == "group":
            self.member.grouped = True
            self.report.emit("group", f"averaging in a group of {len(event['peers'])}", peers=event["peers"])


def _newest_intact(journal: Journal, store: BlobStore, report: Report) -> bytes | None:
    """The newest state that was held here and is still whole; None before the first.

    Raises:
        LocalError: states were held and none is left.
    """
    held = journal.held()
    for number in sorted(held, reverse=True):
        path = store.find(held[number])
        if path is not None and file_digest(path) == held[number]:
            if number != max(held):
                journal.hold(number, held[number])
                report.warn(f"the newest states are damaged or gone: going on from round {number}")
            return held[number]
    if held:
        raise LocalError(
            f"the states of this run in {store.root} are damaged or gone; delete {journal.folder} to rejoin"
        )
    return None


def _device(options: PeerOptions) -> str:
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return options.device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m p2pasr.peer",
        description="Join a run and train. Without --initial-peers this is the first peer and trains alone "
        "until others come.",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="a manifest file, or a run id (then the manifest comes from peers)")
    add("--dialect", metavar="CODE", help="which of a swarm's dialects to train, where --run is a file of dialects")
    add("--initial-peers", nargs="+", default=[], metavar="MADDR", help="peers or bootstrap nodes to join through")
    add("--invite", type=Path, metavar="FILE", help="the invite that a member gave you, for runs that ask for one")
    add("--state-dir", type=Path, metavar="DIR", help="where the key and the runs lie (default: ~/.p2pasr)")
    add("--identity-path", type=Path, metavar="FILE", help="the key (default: identity.key in the state folder)")
    add("--host-maddrs", nargs="+", default=["/ip4/0.0.0.0/tcp/0"], metavar="MADDR", help="addresses to listen on")
    add("--announce-maddrs", nargs="+", default=[], metavar="MADDR", help="addresses to tell others (forwarded ports)")
    add("--client-mode", action="store_true", help="accept no connections; for routers that cannot be changed")
    add("--upload-limit-mbit", type=float, metavar="N", help="cap on uploads, Mbit/s")
    add("--seed-data", type=Path, metavar="DIR", help="prepared shards to give to others")
    add("--private-shards", type=Path, metavar="DIR", help="prepared shards to train on that never leave this machine")
    add("--device", default="auto", help="cpu, cuda, cuda:1 … (default: auto)")
    add("--threads", type=int, metavar="N", help="CPU threads for training (default: torch's choice)")
    add("--longest-clip", type=float, metavar="N", help="train on clips of up to N s (default: what memory allows)")
    add("--model", metavar="DIR", help="local folder of the run's base model, if its name cannot be loaded")
    add("--disk-gib", type=float, default=50.0, metavar="N", help="budget for shards, states and checkpoints")
    add("--max-rounds", type=int, metavar="N", help="leave after this many rounds")
    add("--join-seconds", type=float, default=60.0, metavar="N", help="how long to try to reach the initial peers")
    add("--log-format", choices=["text", "json"], default="text")
    add("--version", action="version", version=f"p2pasr {__version__}")
    return parser


def _options(arguments: argparse.Namespace) -> PeerOptions:
    for maddr in arguments.initial_peers:
        check_peer_maddr(maddr)
    for name in ("threads", "longest_clip", "max_rounds", "disk_gib", "upload_limit_mbit", "join_seconds"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise LocalError(f"--{name.replace('_', '-')} must be a finite number above 0 (found {value:g})")
    if (arguments.threads or 0) > MAX_THREADS:
        raise LocalError(f"--threads {arguments.threads} is more than {MAX_THREADS}; give the cores of this machine")
    return PeerOptions(
        initial_peers=tuple(arguments.initial_peers),
        invite=arguments.invite,
        state_dir=arguments.state_dir,
        identity_path=arguments.identity_path,
        host_maddrs=tuple(arguments.host_maddrs),
        announce_maddrs=tuple(arguments.announce_maddrs),
        client_mode=arguments.client_mode,
        upload_limit_mbit=arguments.upload_limit_mbit,
        seed_data=arguments.seed_data,
        private_shards=arguments.private_shards,
        device=arguments.device,
        threads=arguments.threads,
        longest_clip=arguments.longest_clip,
        model=arguments.model,
        disk_gib=arguments.disk_gib,
        max_rounds=arguments.max_rounds,
        join_seconds=arguments.join_seconds,
    )


def check_peer_maddr(maddr: str) -> None:
    """Is this the address of a peer?

    Raises:
        LocalError: no, and what one looks like.
    """
    if not is_peer_maddr(maddr):
        raise LocalError(
            f"{maddr!r} is not a peer's address; it looks like /ip4/203.0.113.5/tcp/31337/p2p/12D3KooW… "
            f"(the line that a bootstrap node or peer prints when it starts)"
        )


def interrupt_on_terminate(report: Report | None = None) -> None:
    """Let SIGTERM end a process as Ctrl-C does.

    Args:
        report: remembers either of them, for work that asks it.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        if report is not None:
            report.interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)


def main(arguments: Sequence[str] | None = None, *, task: Task | None = None) -> int:
    """The command; returns its exit code.

    Args:
        task: a task of your own; built from the manifest if None.
    """
    parsed = _parser().parse_args(arguments)
    report = Report(parsed.log_format)
    interrupt_on_terminate(report)
    quiet_libraries()
    try:
        run = parsed.run if parsed.dialect is None else run_of(Path(parsed.run), parsed.dialect)
        with Peer(run, _options(parsed), report, task=task) as peer:
            peer.run()
    except KeyboardInterrupt:
        report.emit("stopped", "stopped; the next start resumes from the state folder")
        return 130
    except (P2pasrError, OSError) as error:
        report.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
