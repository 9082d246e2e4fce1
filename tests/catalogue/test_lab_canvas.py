"""Scenes of digits, and the classifier around layers on maps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveate.catalogue.lab import canvas
from foveate.vision import WindowAttention


def test_same_different_needs_both_corners():
    x, y = canvas.same_different(0, 64, classes=3)
    assert 16 < int(y.sum()) < 48
    assert not x[:, 8:16].any()
    assert x[:, :8, :8].flatten(1).any(1).all()
    assert x[:, 16:, 16:].flatten(1).any(1).all()
    again, _ = canvas.same_different(0, 64, classes=3)
    assert torch.equal(x, again)
    other, _ = canvas.same_different(0, 64, classes=3, corners=("bottom left", "top right"))
    assert other[:, :8, 16:].any()
    assert not other[:, :8, :8].any()
    with pytest.raises(ValueError, match="at least 16"):
        canvas.same_different(0, 1, side=12)


def test_digits_held_out_are_not_those_to_train_on():
    parts = [{tuple(d.flatten().tolist()) for d in canvas._by_class(test)[3]} for test in (False, True)]
    assert len(parts[0]) > 100
    assert len(parts[1]) > 20
    assert not parts[0] & parts[1]


def test_pasted_digits_stand_in_their_boxes_and_several_in_their_quarters():
    x, _, boxes = canvas.pasted(1, 8, side=20, sizes=(8, 11))
    for image, (top, left, height, width) in zip(x, boxes.tolist(), strict=True):
        inside = image[top : top + height, left : left + width]
        assert int(inside.count_nonzero()) == int(image.count_nonzero()) > 0
    x, classes, counts = canvas.several(2, 16, side=20, most=3)
    for image, kinds, count in zip(x, classes, counts, strict=True):
        filled = [bool(image[r : r + 10, c : c + 10].any()) for r in (0, 10) for c in (0, 10)]
        assert filled == (kinds >= 0).tolist()
        assert sum(filled) == count <= 3
    with pytest.raises(ValueError, match="most must be"):
        canvas.several(0, 1, most=5)


def test_a_corner_reads_what_its_layers_reach():
    torch.manual_seed(0)
    near = canvas.MapClassifier(lambda _: WindowAttention(8, 2, 4), side=8, dim=8, readout="corner")
    seen = canvas.reached(near, 8)
    assert seen[:4, :4].all()
    assert not seen[4:].any()
    assert not seen[:, 4:].any()
    everything = canvas.MapClassifier(lambda _: nn.Linear(8, 8), side=8, dim=8, patch=2)
    x, y = torch.rand(5, 8, 8), torch.tensor([0, 1, 0, 1, 0])
    assert everything(x).shape == (5, 2)
    assert canvas.accuracy(everything, x, y, batch=2) == float((everything(x).argmax(1) == y).double().mean())
    with pytest.raises(ValueError, match="patch must divide"):
        canvas.MapClassifier(lambda _: nn.Identity(), side=9, patch=2)
    with pytest.raises(ValueError, match="readout"):
        canvas.MapClassifier(lambda _: nn.Identity(), side=8, readout="max")
