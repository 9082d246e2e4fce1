"""Pictures show the layout: element by element when it fits, by area when it does not, never N x N."""

import builtins
import tracemalloc

import numpy as np
import pytest
import torch

from foveate.core import patterns as P
from foveate.core.patterns.plot import contact_sheet, element_shares, plot_layout, tile_shares

pytest.importorskip("matplotlib")
PATTERN = P.Causal() & (P.SlidingWindow(90) | P.Sinks(3), P.Strided(7))


@pytest.mark.parametrize(("n", "m"), [(300, 300), (130, 500), (1, 70), (257, 64)])
def test_one_pixel_per_element_while_it_fits(n, m):
    layout = PATTERN.layout(n, m)
    for head in range(2):
        share, cell = element_shares(layout, head=head, pixels=512)
        assert cell == 1
        assert torch.equal(torch.from_numpy(share) > 0.5, layout.to_dense()[0, head])


@pytest.mark.parametrize("pixels", [150, 75, 40, 20, 10, 6, 3, 1])
def test_larger_planes_are_shrunk_by_area(pixels):
    n, m = 500, 380
    layout = PATTERN.layout(n, m)
    share, cell = element_shares(layout, pixels=pixels)
    assert max(share.shape) <= pixels
    dense = layout.to_dense()[0, 0].numpy()
    for i in range(share.shape[0]):
        for j in range(share.shape[1]):
            piece = dense[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
            assert share[i, j] == pytest.approx(piece.mean(), abs=1e-6)


def test_tiles_are_counted():
    layout = PATTERN.layout(500)
    full, mixed = tile_shares(layout)
    assert full.sum() + mixed.sum() == int((layout.rows < layout.q_tiles).sum())
    full, mixed = tile_shares(layout, pixels=3)
    assert full.shape == (3, 3)
    assert 0 <= full.min() <= full.max() <= 1


def test_long_pictures_stay_small():
    layout = (P.Causal() & (P.SlidingWindow(4096) | P.Sinks(64))).layout(131_072)
    layout.row_area  # noqa: B018 (computed once, outside the measurement)
    tracemalloc.start()
    figure = plot_layout(layout, pixels=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
    assert len(figure.axes) == 2


def test_pattern_and_layout_plot(tmp_path):
    figure = PATTERN.plot(200, head=1, pixels=64)
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert PATTERN.layout(200).plot(title="x").axes
    sheet = contact_sheet({"a": (P.Causal(), 64), "b": (P.Full(), 64), "c": (PATTERN, 64)}, columns=2)
    assert len(sheet.axes) == 3
    with pytest.raises(ValueError, match="head must be an int >= 0 and <= 1, got 2"):
        PATTERN.plot(200, head=2)
    with pytest.raises(TypeError, match="colour"):
        PATTERN.plot(200, colour="red")
    assert np.isfinite(element_shares(PATTERN.layout(200))[0]).all()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"foveate\[viz\]"):
        P.Causal().plot(10)
