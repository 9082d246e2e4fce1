"""Mixer cards against what their mixers do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from foveate.bench.mixers import CARDS, MixerCard, mixer_card, mixer_table, receptive_field, small_instance
from foveate.layers import GatedMLP, LocalLinearAttention, SelfAttention
from foveate.patterns import Causal, Neighborhood, PowerOfTwo, SlidingWindow

N, DIM, HEADS = 23, 16, 2
PATTERNS = [
    Causal(),
    SlidingWindow(before=2, after=3),
    Causal() & SlidingWindow(4),
    PowerOfTwo(2),
    Neighborhood((N,), (5,), dilation=(2,), causal=False),
]


def numbers(state):
    """All numbers that a state holds."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, (tuple, list)):
        return sum(map(numbers, state))
    return sum(map(numbers, vars(state).values())) if hasattr(state, "__dict__") else 0


@pytest.mark.parametrize(
    "card", [*CARDS.values(), *(mixer_card(p, N) for p in PATTERNS)], ids=lambda c: c.name
)
def test_the_field_on_the_card_is_measured(card):
    measured = receptive_field(small_instance(card, DIM, HEADS), N, DIM)
    assert card.agrees(measured)
    assert card.causal == (not bool(measured.triu(1).any()))
    wrong = measured.clone()
    wrong[3, 20] ^= True  # a later token more, or one less
    assert not card.agrees(wrong) or card.one_layer_receptive_field == "content"


@pytest.mark.parametrize("card", [c for c in CARDS.values() if c.decode_state], ids=lambda c: c.name)
def test_the_state_grows_as_the_card_says(card):
    mixer = small_instance(card, DIM, HEADS)
    x = torch.randn(1, 96, DIM, dtype=torch.float64)
    sizes = []
    for n in (48, 96):
        _, state = mixer(x[:, :n], state=mixer.initial_state(x))
        sizes.append(numbers(state))
    assert (sizes[1] > sizes[0]) == ("N" in card.decode_state)
    names = {"C": DIM, "D": DIM // HEADS, "N": 96, "W": 5, "K": 5}
    if card.name in (
        "attention",
        "local linear",
        "kernel attention",
        "gated linear",
        "delta rule",
        "short convolution",
    ):
        assert sizes[1] == eval(card.decode_state, names)  # a formula of ours


def test_a_field_is_by_gradients():
    shift = lambda x: torch.cat([x[:, :1] * 0, x[:, :-1]], 1)  # noqa: E731
    assert torch.equal(receptive_field(shift, 5, 3), torch.eye(5).roll(1, 0).tril().bool())


def test_cards_by_layer_name_and_pattern():
    assert mixer_card(SelfAttention(8, 2)) is CARDS["attention"]
    assert mixer_card(SelfAttention(8, 2, window=3)) is CARDS["sliding window"]
    assert mixer_card(LocalLinearAttention(8, 2)).structure == "dense"
    card = mixer_card(Causal() & SlidingWindow(4))
    assert (card.structure, card.causal, card.one_layer_receptive_field) == ("sparse", True, "pattern")
    assert mixer_card(Causal()).structure == "dense"
    with pytest.raises(KeyError, match="no card for 'GatedMLP'; accepted: attention, sliding window"):
        mixer_card(GatedMLP(8, 16))
    with pytest.raises(ValueError, match=r"structure must be one of dense, .*, got 'round'"):
        dataclasses.replace(CARDS["attention"], structure="round")


def test_the_table():
    rows = mixer_table().splitlines()
    assert len(rows) == 2 + len(CARDS)
    assert rows[2] == "| attention | input-dependent | dense | softmax | yes | N^2 | N | 2*N*C | causal |"
    plain = mixer_table(markdown=False).splitlines()
    assert [row.split("\t")[0] for row in plain[1:]] == list(CARDS)
    assert isinstance(CARDS["routing"], MixerCard)
