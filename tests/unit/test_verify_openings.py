"""Opening what a claim committed to: to whom, when, and in an order in which nobody can copy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from p2pasr.averaging.codec import Layout
from p2pasr.averaging.partfile import PartFile
from p2pasr.errors import P2pasrError, Reject, TransportError
from p2pasr.peers.host import Handler, Host
from p2pasr.peers.streams import Stream
from p2pasr.protocol.encoding import blob_digest
from p2pasr.protocol.messages import Commitment, commit_to, seal
from p2pasr.verify import openings
from p2pasr.verify.openings import Openings

from .builders import LocalNetwork, digest_of, make_identity, make_manifest, make_state, train_claim

MANIFEST = make_manifest()
STATE = make_state(MANIFEST)
AUTHOR, AUDITOR, STRANGER = (make_identity(number) for number in (1, 2, 3))
WORK = train_claim(AUTHOR, MANIFEST, STATE, segments=4)
LAYOUT = Layout.of(MANIFEST.parameters, MANIFEST.averaging)
DRAWN = {AUDITOR.peer: [2]}


class World:
    """The author of a claim, its auditor, and somebody else."""

    def __init__(self, author: Host, auditor: Host, stranger: Host) -> None:
        self.author, self.auditor, self.stranger = author, auditor, stranger

    async def offer(
        self, drawn: dict[str, list[int]] | None, record: bytes | None = None, link: str | None = None
    ) -> None:
        """What the author's training process says after the round."""
        delta = self.author.store.put("delta", WORK.delta)
        checkpoints = [self.author.store.put("checkpoint", data) for data in WORK.checkpoints]
        packed = WORK.claim.pack()
        offer = {"claim": packed, "checkpoints": checkpoints, "delta": delta, "record": record}
        await self.author.calls["offer"]({"offers": [{**offer, "drawn": drawn, "link": link}]})


def within(folder: Path, story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with LocalNetwork(folder, STATE.run) as network:
            hosts = [network.host(number) for number in (1, 2, 3)]
            for host in hosts:
                host.store.put("manifest", MANIFEST.canonical())
                await Openings().start(host)
            await story(World(*hosts))

    asyncio.run(main())


async def opened(host: Host, index: int, commitment: bytes | None = None) -> bytes:
    """The digest of the checkpoint that the author opens to this peer."""
    args = {"claim": WORK.claim.pack(), "checkpoint": index, "commitment": commitment}
    answer = await host.calls["open"](args)
    return bytes(answer["digest"])


def commitment(segment: int = 2, **changes: Any) -> bytes:
    """The auditor's word for its own result."""
    who = changes.pop("who", AUDITOR)
    fields = {
        "run": STATE.run,
        "peer": who.peer,
        "claim": WORK.claim.digest,
        "segment": segment,
        "result": commit_to(digest_of("result"), bytes(32)),
    }
    return seal(who, Commitment(**{**fields, **changes})).pack()


async def refused(doing: Awaitable[Any], error: type[P2pasrError], match: str) -> None:
    with pytest.raises(error, match=match):
        await doing


def digest_at(index: int) -> bytes:
    return blob_digest(WORK.checkpoints[index])


def test_an_auditor_sees_the_start_before_it_commits_and_the_end_and_the_last_after(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer(DRAWN)
        assert await opened(world.auditor, 1) == digest_at(1)
        assert await opened(world.auditor, 2, commitment()) == digest_at(2)
        assert await opened(world.auditor, 3, commitment()) == digest_at(3)

    within(tmp_path, story)


@pytest.mark.parametrize("index", [2, 3])
def test_no_result_is_seen_before_one_has_committed_to_ones_own(tmp_path: Path, index: int) -> None:
    async def story(world: World) -> None:
        await world.offer(DRAWN)
        await refused(opened(world.auditor, index), TransportError, "before it commits to its own")

    within(tmp_path, story)


@pytest.mark.parametrize(
    "changes",
    [{"segment": 3}, {"segment": 0}, {"claim": digest_of("another claim")}, {"who": STRANGER}],
    ids=["not drawn", "another segment", "another claim", "somebody else's"],
)
def test_a_commitment_to_something_else_opens_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    async def story(world: World) -> None:
        await world.offer(DRAWN)
        await refused(opened(world.auditor, 2, commitment(**changes)), TransportError, "commits to something else")

    within(tmp_path, story)


def test_a_commitment_to_one_drawn_segment_does_not_open_another(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer({AUDITOR.peer: [0, 2]})
        assert await opened(world.auditor, 0, commitment(0)) == digest_at(0)
        await refused(opened(world.auditor, 2, commitment(0)), TransportError, "of another segment than")

    within(tmp_path, story)


def test_where_two_drawn_segments_touch_the_first_ones_end_is_no_start(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer({AUDITOR.peer: [1, 2]})
        await refused(opened(world.auditor, 1), TransportError, "before it commits")
        assert await opened(world.auditor, 1, commitment(1)) == digest_at(1)

    within(tmp_path, story)


def test_a_forged_commitment_opens_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer(DRAWN)
        forged = bytearray(commitment())
        forged[-1] ^= 1
        await refused(opened(world.auditor, 2, bytes(forged)), TransportError, "does not verify")
        await refused(opened(world.auditor, 2, b"junk"), TransportError, "refuses")

    within(tmp_path, story)


def test_a_claim_that_is_asked_for_a_moment_too_early_is_waited_for(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        early = asyncio.create_task(opened(world.auditor, 1))
        await asyncio.sleep(0.05)
        await world.offer(DRAWN)
        assert await early == digest_at(1)

    within(tmp_path, story)


@pytest.mark.parametrize("index", range(4))
def test_others_wait_until_the_next_round_is_over(tmp_path: Path, index: int) -> None:
    async def story(world: World) -> None:
        await world.offer(DRAWN)
        for sealed in (None, commitment(), commitment(who=STRANGER)):
            await refused(opened(world.stranger, index, sealed), TransportError, "when the next round is over")
        await world.offer(None)
        assert await opened(world.stranger, index) == digest_at(index)

    within(tmp_path, story)


def test_who_compares_the_last_checkpoint_with_the_delta_sees_it_at_once_and_no_other(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer({}, link=STRANGER.peer)
        assert await opened(world.stranger, 3) == digest_at(3)
        for index in range(3):
            await refused(opened(world.stranger, index), TransportError, "when the next round is over")
        await refused(opened(world.auditor, 3), TransportError, "when the next round is over")

    within(tmp_path, story)


def test_what_was_not_drawn_stays_closed_to_an_auditor_too(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer(DRAWN)
        await refused(opened(world.auditor, 0, commitment()), TransportError, "when the next round is over")

    within(tmp_path, story)


@pytest.mark.parametrize("index", [-1, 4, 1 << 40])
def test_checkpoints_that_there_are_not_are_not_opened(tmp_path: Path, index: int) -> None:
    async def story(world: World) -> None:
        await world.offer(None)
        await refused(opened(world.stranger, index), TransportError, "checkpoint")

    within(tmp_path, story)


def test_claims_that_are_offered_no_more_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openings, "OFFER_SECONDS", 0.1)

    async def story(world: World) -> None:
        await world.offer(None)
        await world.author.calls["offer"]({"offers": []})
        await refused(opened(world.auditor, 0), TransportError, "not open here")

    within(tmp_path, story)


@pytest.mark.parametrize("index", range(3))
def test_parts_of_a_delta_are_given_to_anybody_at_any_time(tmp_path: Path, index: int) -> None:
    async def story(world: World) -> None:
        for drawn in (DRAWN, None):
            await world.offer(drawn)
            answer = await world.stranger.calls["part"]({"claim": WORK.claim.pack(), "index": index})
            assert answer["data"] == LAYOUT.cut(WORK.delta)[index]

    within(tmp_path, story)


def test_of_a_delta_whose_parts_are_asked_for_one_by_one_all_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_read: list[int] = []

    class Counted(PartFile):
        def read(self, index: int) -> bytes:
            data = super().read(index)
            bytes_read.append(len(data))
            return data

    monkeypatch.setattr(openings, "PartFile", Counted)

    async def story(world: World) -> None:
        await world.offer(None)
        for index in (*range(LAYOUT.parts), 0):
            await world.stranger.calls["part"]({"claim": WORK.claim.pack(), "index": index})
        assert sum(bytes_read) == 2 * LAYOUT.total_bytes + LAYOUT.part_bytes(0)

    within(tmp_path, story)


def test_a_damaged_delta_is_given_again_once_it_is_whole(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer(None)
        path = world.author.store.find(blob_digest(WORK.delta))
        assert path is not None
        part = {"claim": WORK.claim.pack(), "index": 0}
        path.write_bytes(bytes(len(WORK.delta)))
        await refused(world.stranger.calls["part"](part), Reject, "does not lie under its root")
        path.write_bytes(WORK.delta)
        assert (await world.stranger.calls["part"](part))["data"] == LAYOUT.cut(WORK.delta)[0]

    within(tmp_path, story)


async def deltas(host: Host, *holders: Host, seconds: float = 10.0) -> list[bytes | None]:
    """What a peer gets of the author's whole delta when it asks for it."""
    peers = [holder.peer for holder in holders]
    answer = await host.calls["deltas"]({"claims": [WORK.claim.pack()], "holders": peers, "seconds": seconds})
    return list(answer["deltas"])


def test_a_whole_delta_is_given_to_anybody_and_by_whoever_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openings, "OFFER_SECONDS", 0.1)

    async def story(world: World) -> None:
        await world.offer(DRAWN)
        (first,) = await deltas(world.auditor)
        assert first is not None
        assert world.auditor.store.get(first) == WORK.delta
        await world.author.calls["offer"]({"offers": []})
        assert await deltas(world.stranger) == [None]
        assert await deltas(world.stranger, world.auditor) == [first]
        assert world.stranger.store.get(first) == WORK.delta

    within(tmp_path, story)


def test_a_delta_that_is_fetched_opens_nothing_else_of_its_claim(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer(DRAWN)
        await deltas(world.auditor)
        stream = {"peer": world.auditor.peer, "round": STATE.round}
        await refused(world.stranger.calls["record"](stream), TransportError, "no record of round 0")
        async with world.stranger.open(world.auditor.peer, "open") as asking:
            await asking.send({"claim": WORK.claim.digest, "checkpoint": 0, "commitment": None})
            await refused(asking.receive(), TransportError, "asks for checkpoint 0 of 0")

    within(tmp_path, story)


def test_who_gives_another_delta_than_it_committed_to_gives_none(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer(None)
        delta = world.author.store.find(blob_digest(WORK.delta))
        assert delta is not None
        delta.write_bytes(WORK.delta[:-1] + bytes([WORK.delta[-1] ^ 1]))
        assert await deltas(world.auditor) == [None]
        assert world.auditor.store.holds("delta") == []

    within(tmp_path, story)


def test_a_delta_that_does_not_come_in_time_is_not_waited_for(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        assert await deltas(world.stranger, seconds=0.05) == [None]

    within(tmp_path, story)


def test_a_delta_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.offer(None)
        world.author.store.retain("delta", ())
        part = {"claim": WORK.claim.pack(), "index": 0}
        await refused(world.stranger.calls["part"](part), TransportError, "kept no longer")

    within(tmp_path, story)


def test_the_record_of_a_round_is_named_to_anybody(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        asked = {"peer": AUTHOR.peer, "round": STATE.round}
        await world.offer(DRAWN)
        await refused(world.stranger.calls["record"](asked), TransportError, "no record of round 0")
        await world.offer(DRAWN, digest_of("record"))
        assert await world.stranger.calls["record"](asked) == {"digest": digest_of("record")}
        other = world.stranger.calls["record"]({**asked, "round": 1})
        await refused(other, TransportError, "no record of round 1")

    within(tmp_path, story)


# --- authors that lie -----------------------------------------------------------------------------


def answering(*answers: Any) -> Handler:
    """Sends these messages, and bytes as frames, whatever it is asked."""

    async def handler(stream: Stream) -> None:
        await stream.receive()
        for answer in answers:
            await (stream.send_frame(answer) if isinstance(answer, bytes) else stream.send(answer))

    return handler


def told(folder: Path, call: str, args: dict[str, Any], *answers: Any) -> None:
    """What comes of a call to an author that answers so."""

    async def main() -> None:
        async with LocalNetwork(folder, STATE.run) as network:
            author, auditor = network.host(1), network.host(2)
            auditor.store.put("manifest", MANIFEST.canonical())
            await author.serve("open", answering(*answers))
            await Openings().start(auditor)
            await auditor.calls[call](args)

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer",
    [
        {"digest": digest_at(1), "proof": WORK.way(0)},
        {"digest": digest_at(0), "proof": WORK.way(1)},
        {"digest": digest_of("something else"), "proof": WORK.way(0)},
        {"digest": digest_at(0), "proof": ()},
        {"digest": digest_at(0), "proof": (*WORK.way(0), bytes(32))},
        {"digest": digest_at(0), "proof": (bytes(32),) * 65},
        {"digest": digest_at(0), "proof": (b"short",)},
        {"digest": digest_at(0), "proof": (1,)},
        {"digest": "text", "proof": WORK.way(0)},
        {"digest": digest_at(0)},
        {},
    ],
)
def test_a_checkpoint_that_does_not_lie_under_the_claims_root_is_refused(tmp_path: Path, answer: Any) -> None:
    args = {"claim": WORK.claim.pack(), "checkpoint": 0, "commitment": None}
    told(tmp_path, "open", args, {"digest": digest_at(0), "proof": WORK.way(0)})
    with pytest.raises(Reject):
        told(tmp_path, "open", args, answer)


@pytest.mark.parametrize("data", [bytes(4 * 256), b"short", bytes(4 * 256 + 1)])
def test_a_part_that_does_not_lie_under_the_claims_root_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Reject):
        told(tmp_path, "part", {"claim": WORK.claim.pack(), "index": 0}, {"proof": (bytes(32), bytes(32))}, data)
