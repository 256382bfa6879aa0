"""Finding the state that holds and fetching it, before any of it is believed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from p2pasr.errors import Reject, TransportError
from p2pasr.peers.blobs import BlobStore
from p2pasr.peers.journal import Journal
from p2pasr.peers.link import Link
from p2pasr.peers.streams import SLOWEST_BYTES_PER_SECOND
from p2pasr.protocol.agreement import Agreement, agree, result_of
from p2pasr.protocol.manifest import MAX_MANIFEST_BYTES, RunManifest, parse_manifest
from p2pasr.protocol.messages import MAX_ANCESTORS, Attestation
from p2pasr.protocol.state import State, max_state_bytes, parse_state
from p2pasr.protocol.tensors import Tensors

MANIFEST_SECONDS = 120.0
POLL_SECONDS = 1.0
MIN_STATE_SECONDS = 120.0


def fetch_manifest(
    link: Link, store: BlobStore, run: bytes, seconds: float, on_wait: Callable[[str], None]
) -> RunManifest:
    """Get a run's manifest by its id, from this disk or from any peer.

    Args:
        seconds: how long to keep asking; a run's first peer may start a little later than others.
        on_wait: told, in one sentence, each time that nobody gave it.

    Raises:
        TransportError: nobody gives it.
        Reject: the id names something that is no manifest.
    """
    deadline = time.monotonic() + seconds
    while store.find(run) is None:
        try:
            link.call("fetch", MANIFEST_SECONDS, digest=run, kind="manifest", max_bytes=MAX_MANIFEST_BYTES, peers=())
        except (TransportError, Reject) as error:  # one liar among the providers must not end a start
            if time.monotonic() > deadline:
                raise
            on_wait(f"{error}; asking again")
            time.sleep(POLL_SECONDS)
    return parse_manifest(store.get(run))


def fetch_state(
    link: Link, store: BlobStore, manifest: RunManifest, like: Tensors, state: bytes, peers: Collection[str]
) -> State:
    """Get a state by its digest and check everything that can be checked about it.

    Args:
        like: the initial parameters, for names and shapes.
        peers: who is said to hold it.

    Raises:
        TransportError: nobody gives it.
        Reject: its bytes are no state of this run.
    """
    limit = max_state_bytes(manifest)
    timeout = max(MIN_STATE_SECONDS, limit / SLOWEST_BYTES_PER_SECOND)
    link.call("fetch", timeout, digest=state, kind="state", max_bytes=limit, peers=sorted(peers))
    try:
        return parse_state(store.get(state), manifest, like)
    except Reject:
        store.discard(state)
        raise


def newest_state(
    own: State, attestations: Collection[Attestation], electorate: Collection[str], journal: Journal
) -> Agreement | None:
    """Whether another state than ours holds, and if so which.

    Args:
        own: the state this peer holds.
        attestations: the current ones, this peer's among them if it has published one since it started.
        electorate: who has a say in what comes of the round that starts from `own`.
        journal: knows which states this peer held before.

    Returns:
        What holds instead of `own`, or None if `own` (or an ancestor that it grew from) does.
    """
    result = result_of(own.round, own.digest, attestations, electorate)
    if result is not None:  # its peers may be several rounds further, and this one gone from their disks
        return agree(a for a in attestations if a.at(own.round + 1) == result.state)
    held = journal.held()
    # Those who stayed so far behind us that nobody speaks for their state any more tell nothing about what holds now.
    recent = [a for a in attestations if a.round + MAX_ANCESTORS >= own.round or held.get(a.round) != a.state]
    agreement = agree(recent)
    if agreement.state is None or agreement.state == own.digest:
        return None
    if agreement.round is not None and held.get(agreement.round) == agreement.state:
        return None  # the others are where we have been
    return agreement


def adopt(
    link: Link,
    store: BlobStore,
    manifest: RunManifest,
    like: Tensors,
    agreement: Agreement,
    attestations: Collection[Attestation],
) -> State:
    """Fetch the state that holds and compare it with what its supporters attest.

    Raises:
        TransportError: it cannot be fetched.
        Reject: it is not what was attested.
    """
    if agreement.state is None:
        raise TransportError(agreement.reason)
    state = fetch_state(link, store, manifest, like, agreement.state, agreement.supporters)
    attested = {a.work for a in attestations if a.state == agreement.state}
    if state.round != agreement.round or (attested and state.work not in attested):
        raise Reject(f"state {agreement.state.hex()[:8]} is not what its supporters attest")
    return state
