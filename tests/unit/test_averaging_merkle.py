"""Merkle commitments: everything under a root can be shown, nothing else can."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pasr.averaging.merkle import Tree, part_digests
from p2pasr.errors import Reject
from p2pasr.protocol.encoding import blob_digest, digest

from .builders import digest_of, make_identity

PEER = make_identity(1).peer
TREE = Tree("delta", digest_of("run"), 7, PEER)

counts = st.integers(1, 40)


def contents_of(count: int) -> list[bytes]:
    return [digest_of(f"part {number}") for number in range(count)]


def node(left: bytes, right: bytes) -> bytes:
    return digest("node", b"\x01" + left + right)


def test_a_root_over_one_item_is_its_leaf() -> None:
    (content,) = contents_of(1)
    assert TREE.root([content]) == TREE.leaf(0, content)
    TREE.check(TREE.root([content]), 0, 1, content, ())


def test_a_level_of_odd_length_passes_its_last_node_up() -> None:
    contents = contents_of(5)
    leaves = [TREE.leaf(index, content) for index, content in enumerate(contents)]
    left = node(node(leaves[0], leaves[1]), node(leaves[2], leaves[3]))
    assert TREE.root(contents) == node(left, leaves[4])


@given(counts)
def test_every_item_can_be_shown_to_lie_under_the_root(count: int) -> None:
    contents = contents_of(count)
    root = TREE.root(contents)
    for index, content in enumerate(contents):
        proof = TREE.prove(contents, index)
        assert len(proof) <= (count - 1).bit_length()
        TREE.check(root, index, count, content, proof)


@given(st.integers(2, 24), st.data())
def test_another_item_place_or_root_is_refused(count: int, data: st.DataObject) -> None:
    contents = contents_of(count)
    index = data.draw(st.integers(0, count - 1))
    root, proof = TREE.root(contents), TREE.prove(contents, index)
    with pytest.raises(Reject, match="does not lie under its root"):
        TREE.check(root, index, count, digest_of("another part"), proof)
    with pytest.raises(Reject, match="does not lie under its root"):
        TREE.check(digest_of("another root"), index, count, contents[index], proof)
    other = data.draw(st.integers(0, count - 1).filter(lambda other: other != index))
    with pytest.raises(Reject):
        TREE.check(root, other, count, contents[index], proof)
    with pytest.raises(Reject):
        TREE.check(root, other, count, contents[index], TREE.prove(contents, other))


@given(st.integers(2, 24), st.data())
def test_every_change_of_a_proof_is_refused(count: int, data: st.DataObject) -> None:
    contents = contents_of(count)
    index = data.draw(st.integers(0, count - 1))
    root, proof = TREE.root(contents), TREE.prove(contents, index)
    step = data.draw(st.integers(0, len(proof) - 1))
    flipped = proof[step][:-1] + bytes([proof[step][-1] ^ 1])
    before, after = proof[:step], proof[step + 1 :]
    for changed in (
        (*before, *after),
        (*before, digest_of("another"), *after),
        (*before, flipped, *after),
        (*proof, proof[step]),
        (*proof, b""),
        (),
    ):
        with pytest.raises(Reject):
            TREE.check(root, index, count, contents[index], changed)


@given(st.integers(1, 24), st.data())
def test_another_item_anywhere_gives_another_root(count: int, data: st.DataObject) -> None:
    contents = contents_of(count)
    index = data.draw(st.integers(0, count - 1))
    changed = [*contents[:index], digest_of("another part"), *contents[index + 1 :]]
    assert TREE.root(changed) != TREE.root(contents)


def test_roots_over_more_fewer_or_reordered_items_differ() -> None:
    contents = contents_of(9)
    roots = {TREE.root(contents[:count]) for count in range(1, 10)}
    roots |= {TREE.root(contents[::-1]), TREE.root([*contents, contents[-1]]), TREE.root(contents[1:])}
    assert len(roots) == 12


@pytest.mark.parametrize(
    "change",
    [{"kind": "trace"}, {"run": digest_of("another run")}, {"round": 8}, {"peer": make_identity(2).peer}],
)
def test_a_root_is_bound_to_what_it_is_a_root_of(change: dict[str, object]) -> None:
    contents = contents_of(4)
    other = dataclasses.replace(TREE, **change)
    assert other.root(contents) != TREE.root(contents)
    with pytest.raises(Reject, match="does not lie under its root"):
        other.check(TREE.root(contents), 1, 4, contents[1], TREE.prove(contents, 1))


def test_equal_items_at_different_places_have_different_leaves() -> None:
    content = digest_of("part")
    assert TREE.leaf(0, content) != TREE.leaf(1, content)
    with pytest.raises(Reject):
        TREE.check(TREE.root([content, content]), 0, 2, content, TREE.prove([content, content], 1))


def test_a_node_does_not_pass_for_an_item() -> None:
    contents = contents_of(4)
    root = TREE.root(contents)
    leaves = [TREE.leaf(index, content) for index, content in enumerate(contents)]
    left, right = node(leaves[0], leaves[1]), node(leaves[2], leaves[3])
    assert root == node(left, right)
    for index, content, sibling in ((0, left, right), (1, right, left)):
        with pytest.raises(Reject):
            TREE.check(root, index, 2, content, (sibling,))
    for content in (leaves[0] + leaves[1], b"\x01" + leaves[0] + leaves[1], root):
        with pytest.raises(Reject):
            TREE.check(root, 0, 1, content, ())


@pytest.mark.parametrize(("index", "count"), [(-1, 4), (4, 4), (0, 0), (10**9, 4)])
def test_an_item_that_cannot_exist_is_refused(index: int, count: int) -> None:
    contents = contents_of(4)
    with pytest.raises(Reject, match=f"item {index} is not one of {count}"):
        TREE.check(TREE.root(contents), index, count, contents[0], TREE.prove(contents, 0))


def test_a_tree_without_items_has_no_root() -> None:
    with pytest.raises(ValueError, match="at least one leaf"):
        TREE.root([])


def test_parts_are_named_by_their_bytes() -> None:
    data = b"abcdef"
    view = memoryview(data)
    assert part_digests([view[:3], view[3:]]) == [blob_digest(b"abc"), blob_digest(b"def")]
