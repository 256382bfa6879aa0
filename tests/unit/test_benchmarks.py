"""How the benchmarks count."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.attacks import (
    Scene,
    audit_seconds,
    play,
    rounds_until,
    rounds_until_suspended,
    withhold,
    within_interval,
)
from benchmarks.chaos import Commit, divergent, rounds_to_be_back
from benchmarks.links import lengths_of_steps
from benchmarks.window import MODEL, lengthened, spaced
from p2pasr.tasks.whisper import load_whisper, shorten

LINEAGES = st.dictionaries(st.integers(0, 9), st.binary(min_size=1, max_size=1))


@given(lineage=LINEAGES, missed=st.lists(st.sets(st.integers(0, 9)), max_size=4))
def test_peers_that_missed_rounds_of_one_lineage_do_not_differ(
    lineage: Mapping[int, bytes], missed: list[set[int]]
) -> None:
    peers = [{number: state for number, state in lineage.items() if number not in absent} for absent in missed]
    assert divergent([lineage, *peers]) == 0


@given(one=LINEAGES, other=LINEAGES)
def test_two_lineages_differ_in_the_rounds_of_both_that_ended_in_other_states(
    one: Mapping[int, bytes], other: Mapping[int, bytes]
) -> None:
    assert divergent([one, other, one]) == len({n for n in one.keys() & other.keys() if one[n] != other[n]})


@pytest.mark.parametrize(
    ("since", "rounds"),
    [(0.0, 1), (1.5, 1), (2.05, 0), (2.5, 3), (4.5, 1), (5.5, 1)],
    ids=[
        "from the start",
        "into the next",
        "others were faster",
        "two missed",
        "into the last it was in",
        "never back",
    ],
)
def test_rounds_to_be_back_are_those_committed_since_and_the_first_with_the_peer(since: float, rounds: int) -> None:
    told = [("anne", 0, 1.0), ("ben", 0, 1.1), ("anne", 1, 2.0), ("ben", 1, 2.1), ("anne", 2, 3.0), ("anne", 3, 4.0)]
    told += [("anne", 4, 5.0), ("ben", 4, 5.1), ("anne", 5, 6.0)]
    assert rounds_to_be_back("ben", since, [Commit(*each) for each in told]) == rounds


def test_a_step_lasts_until_the_next_and_the_first_round_is_left_out() -> None:
    told = [("step", "train", 0.0), ("round", "", 5.0)]
    for start in (5.0, 15.0):
        told += [("step", "train", start + 1), ("segment", "", start + 4), ("step", "average", start + 5)]
        told += [("group", "", start + 7), ("step", "audit", start + 9), ("round", "", start + 10)]
    told += [("step", "train", 26.0)]
    events = [{"event": kind, "step": step, "time": time} for kind, step, time in told]
    lengths = lengths_of_steps(events)
    assert lengths == {"round": 1.0, "train": 8.0, "average": 4.0, "group": 4.0, "audit": 2.0}


@given(probability=st.floats(0.01, 0.99), share=st.floats(0.01, 0.99), cheats=st.integers(1, 8))
def test_by_the_predicted_round_so_many_runs_are_rid_of_all_cheats_and_not_a_round_earlier(
    probability: float, share: float, cheats: int
) -> None:
    found_by = rounds_until(share, probability, cheats) - 1
    rid = [(1 - (1 - probability) ** rounds) ** cheats for rounds in (found_by - 1, found_by)]
    assert rid[0] < share + 1e-9
    assert rid[1] > share - 1e-9


@pytest.mark.parametrize(("found", "agrees"), [(40, True), (60, True), (35, False), (65, False)])
def test_a_share_agrees_with_a_probability_within_two_standard_deviations(found: int, agrees: bool) -> None:
    assert within_interval(found, 100, 0.5) is agrees


@pytest.mark.parametrize("seed", range(3))
def test_all_simulated_cheats_are_banned_and_nobody_else(seed: int) -> None:
    tally = play(Scene(peers=6, cheats=2, cheated=4, rate=1.0), seed)
    assert tally.honest_banned == 0
    assert 2 <= tally.rounds <= 20
    assert tally.found <= tally.claims


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_a_simulated_peer_that_opens_nothing_is_suspended_about_when_it_should_be(rate: float) -> None:
    tallies = [withhold(rate, seed) for seed in range(20)]
    soon = sum(tally.rounds <= rounds_until_suspended(0.5, rate) for tally in tallies)
    assert soon >= 5
    assert all(4 <= tally.rounds <= rounds_until_suspended(0.9999, rate) for tally in tallies)
    assert sum(tally.honest_banned for tally in tallies) == 0


@given(share=st.floats(0.01, 0.99), rate=st.floats(0.05, 1.0))
def test_whoever_is_audited_more_often_is_suspended_no_later(share: float, rate: float) -> None:
    assert 4 <= rounds_until_suspended(share, rate) <= rounds_until_suspended(share, rate / 1.1)
    assert rounds_until_suspended(share / 2, rate) <= rounds_until_suspended(share, rate)


def test_an_audit_lasts_from_its_step_to_what_it_found() -> None:
    told = [("step", "training segment 1 of …x again", 1.0), ("audit", "segment", 4.0), ("audit", "part", 5.0)]
    told += [("step", "training", 6.0), ("step", "training segment 2 of …y again", 7.0), ("audit", "segment", 9.0)]
    events = [{"event": kind, "message": text, "what": text, "time": time} for kind, text, time in told]
    assert audit_seconds(events) == 5.0


@given(lengths=st.lists(st.integers(0, 20), max_size=5), free=st.integers(0, 30), seed=st.integers(0, 99))
def test_spaced_pieces_keep_their_order_and_only_silence_is_added(lengths: list[int], free: int, seed: int) -> None:
    ends = np.cumsum([0, *lengths])
    pieces = [np.arange(start, end, dtype=np.float32) + 1 for start, end in itertools.pairwise(ends)]
    out = spaced(pieces, sum(lengths) + free, random.Random(seed))
    assert len(out) == sum(lengths) + free
    assert out[out != 0].tolist() == list(range(1, sum(lengths) + 1))
    for start, end in itertools.pairwise(ends):
        assert np.all(np.diff(np.flatnonzero((out > start) & (out <= end))) == 1)


def test_a_model_lengthened_to_30_s_computes_what_it_did_in_its_own_window() -> None:
    features = torch.rand(1, 80, 300, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[340, 5, 7]])
    own, longer = load_whisper(MODEL).eval(), lengthened(load_whisper(MODEL)).eval()
    assert longer.model.encoder.embed_positions.weight.shape == (1500, 128)
    shorten(longer, 300)
    with torch.inference_mode():
        a, b = (model(input_features=features, decoder_input_ids=tokens).logits for model in (own, longer))
    torch.testing.assert_close(a, b, rtol=0, atol=0.02)
