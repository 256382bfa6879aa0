"""`python -m p2pasr.bootstrap`: keep an entry point up."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from p2pasr.bootstrap.node import serve
from p2pasr.errors import P2pasrError
from p2pasr.peers.config import NodeConfig
from p2pasr.report import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m p2pasr.bootstrap",
        description="Keep an entry point up: newcomers of any run join the network through it. It trains nothing.",
    )
    add = parser.add_argument
    default = Path.home() / ".p2pasr" / "bootstrap.key"
    add("--identity-path", type=Path, default=default, metavar="FILE", help=f"the key (default: {default})")
    add("--host-maddrs", nargs="+", default=["/ip4/0.0.0.0/tcp/31337"], metavar="MADDR", help="addresses to listen on")
    add("--announce-maddrs", nargs="+", default=[], metavar="MADDR", help="addresses to tell others")
    add("--initial-peers", nargs="+", default=[], metavar="MADDR", help="other bootstrap nodes of the same network")
    add("--log-format", choices=["text", "json"], default="text")
    parsed = parser.parse_args(arguments)
    report = Report(parsed.log_format)
    config = NodeConfig(
        identity_path=str(parsed.identity_path),
        socket_dir="",
        host_maddrs=tuple(parsed.host_maddrs),
        announce_maddrs=tuple(parsed.announce_maddrs),
        initial_peers=tuple(parsed.initial_peers),
    )
    try:
        uvloop.run(serve(config, report))
    except (P2pasrError, OSError) as error:
        report.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
