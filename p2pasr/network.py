"""The network process of a peer: `python -m p2pasr.network FD`, started by the training process.

FD is an open socket on which the training process sends its configuration and then its calls. The
process ends when that socket closes.
"""

from __future__ import annotations

import signal
import socket
import sys

import uvloop

from p2pasr.averaging.allreduce import AllReduce
from p2pasr.averaging.mix import MixExchange
from p2pasr.peers.channel import read_frame
from p2pasr.peers.config import LinkConfig, NodeConfig
from p2pasr.peers.exchange import BlobExchange
from p2pasr.peers.host import run_host
from p2pasr.verify.openings import Openings


def main() -> None:
    """Read the configuration and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process decides when to end
    channel = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(channel)
    if first is None:
        return
    values = first["config"]
    config = LinkConfig(**{**values, "node": NodeConfig(**values["node"])})
    uvloop.run(run_host(config, channel, [BlobExchange(), AllReduce(), MixExchange(), Openings()]))


if __name__ == "__main__":
    main()
