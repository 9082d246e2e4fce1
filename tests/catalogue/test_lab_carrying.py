"""The pass-key laboratory: what it trains on, what it asks, and how arms are compared."""

from __future__ import annotations

import pytest
import torch

from foveate.catalogue.lab import Lab
from foveate.catalogue.lab.carrying import Carrying
from foveate.catalogue.lab.tasks import IGNORE, generator, reminders
from foveate.patterns import Causal, SlidingWindow


def test_reminders_ask_only_after_the_one_symbol():
    ids, targets = reminders(64, 31, 16, generator(3))
    for row, wanted in zip(ids, targets, strict=True):
        mark = (row == 1).nonzero().item()
        symbol = row[mark + 1].item()
        asked = (row == 2).nonzero().flatten()
        assert 3 <= symbol < 7
        assert asked.min() > mark + 1
        assert asked.max() == 30
        assert (wanted[asked] == symbol).all()
        assert (wanted == IGNORE).sum() == 31 - len(asked)
        rest = torch.cat([row[:mark], row[mark + 2 :]])
        assert ((rest == 2) | (rest >= 7)).all()  # no other symbol to be taken for it
    with pytest.raises(ValueError, match="accepted: at least 3 tokens"):
        reminders(1, 2, 16, generator(0))


def test_ranges_of_distance():
    task = Carrying(16, 1, 1, edges=(1, 4, 8, 14))
    assert task.middles == [2.0, 5.5, 10.5]
    assert task.far([0.1, 0.2, 0.6], beyond=3) == pytest.approx(0.4)
    assert task.far([0.1, 0.2, 0.6], beyond=4) == pytest.approx(0.6)


def test_a_model_cannot_carry_beyond_its_window():
    """One layer, eight keys: near keys are learned, far ones stay at chance; dense learns both."""
    task = Carrying(24, 1, 2, edges=(1, 8, 23), steps=100, lr=1e-2)
    near, far = task.found(Lab("made_up"), "window", Causal() & SlidingWindow(8), 0)
    assert near > 0.8
    assert far < 0.5
    assert min(task.found(Lab("made_up"), "dense", Causal(), 0)) > 0.8
