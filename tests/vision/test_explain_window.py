"""Receptive fields: patterns and modules agree, layers compose, pictures show the query's cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.vision import WindowAttention, explain_window


def test_a_window_layer_reaches_what_its_pattern_allows():
    torch.manual_seed(0)
    grid = (6, 10)
    by_pattern = explain_window([fv.patterns.Windows(grid, (3, 4))], grid)
    by_module = explain_window([WindowAttention(8, 2, (3, 4))], grid, dim=8)
    assert torch.equal(by_pattern.direct, by_module.direct)
    assert by_pattern.field((4, 9)).sum() == 3 * 2


def test_layers_compose_as_their_sets_do():
    grid = (5, 7)
    layers = [
        fv.patterns.Windows(grid, (2, 3)),
        fv.patterns.Neighborhood(grid, 3),
        fv.patterns.Axial(grid, axis=1),
    ]
    reach = explain_window(layers, grid)
    sets = [layer.layout(35).to_dense()[0, 0] for layer in layers]
    for query in range(35):
        now = {query}
        for depth in range(3):
            now = {query}
            for layer in reversed(range(depth + 1)):  # from the query back to the input
                now = now | {j for i in now for j in range(35) if sets[layer][i, j]}
            want = torch.zeros(35, dtype=torch.bool)
            want[list(now)] = True
            assert torch.equal(reach.reached[depth, query], want)
    assert reach.share()[0] < reach.share()[1] < reach.share()[2]
    assert "Neighborhood" in repr(reach)


def test_modules_are_asked_one_after_another_in_order():
    torch.manual_seed(0)

    class Down(nn.Module):
        """Each cell reads the one above it, without a shortcut."""

        def forward(self, x):
            return torch.roll(x, 1, 1)

    reach = explain_window([Down(), fv.patterns.Axial((4, 3), axis=1), Down()], (4, 3), dim=2)
    assert reach.seen((2, 1), 0).nonzero().tolist() == [[1, 1]]
    assert reach.field((2, 1), 1).nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]
    assert reach.field((2, 1)).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


def test_the_picture_has_one_map_per_layer_and_marks_the_query():
    pytest.importorskip("matplotlib")
    grid = (4, 4)
    reach = explain_window(
        [fv.patterns.Windows(grid, 2), fv.patterns.Windows(grid, 2, shift=1)], grid, names=["plain", "moved"]
    )
    figure = reach.plot((1, 1))
    assert [axes.get_title() for axes in figure.axes] == [
        "1: plain\n4 of 16 cells",
        "2: moved\n16 of 16 cells",
    ]
    image = torch.as_tensor(figure.axes[0].images[0].get_array())
    assert not torch.equal(image[1, 1], image[0, 0])
    assert torch.equal(image[0, 0], image[0, 1])
    assert torch.equal(image[3, 3], image[2, 3])


def test_errors_name_the_argument():
    pattern = fv.patterns.Windows(4, 2)
    for arguments, options, says in (
        (([], 4), {}, "at least one layer"),
        (([pattern], 2), {"names": ["a", "b"]}, "one name per layer"),
        (([nn.Identity()], 2), {}, "dim, the channels"),
        (([nn.Linear(3, 2)], 2), {"dim": 3}, "accepted: the same shape"),
        (([pattern.layout(4)], 3), {}, "must join 9"),
    ):
        with pytest.raises(ValueError, match=says):
            explain_window(*arguments, **options)
    with pytest.raises(TypeError, match="got str"):
        explain_window(["swin"], 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="query must lie"):
        explain_window([fv.patterns.Windows((2, 2), 2)], 2).field((2, 0))
