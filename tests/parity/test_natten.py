"""`Neighborhood` against the mask of NATTEN, the papers' own code; skipped where natten is not installed."""

from __future__ import annotations

import math
import random

import pytest
import torch

from foveate.patterns import Neighborhood

flex = pytest.importorskip("natten.backends.flex")


def settings(count: int) -> list[tuple]:
    """Random (shape, window, stride, dilation, causal) on 1 to 3 axes: even windows, axes that nothing divides."""
    rng = random.Random(0)
    drawn = []
    for i in range(count):
        axes = 1 + i % 3
        shape = tuple(rng.randint(2, (40, 13, 7)[axes - 1]) for _ in range(axes))
        window = tuple(rng.randint(2, n) for n in shape)  # NATTEN has no window of 1
        stride = tuple(rng.randint(1, k) for k in window)
        dilation = tuple(rng.randint(1, n // k) for n, k in zip(shape, window, strict=True))
        causal = tuple(rng.random() < 0.4 for _ in shape)
        drawn.append((shape, window, stride, dilation, causal))
    return drawn


def official(shape, window, stride, dilation, causal) -> torch.Tensor:
    """NATTEN's mask, bool (cells, cells)."""
    n = math.prod(shape)
    made = flex.get_na_flex_mask("cpu", len(shape), shape, window, stride, dilation, causal)
    zero, at = torch.zeros((), dtype=torch.int64), torch.arange(n)
    return made.mask_mod(zero, zero, at[:, None], at[None, :])


def test_masks_are_equal():
    seen = set()
    for setting in settings(240):
        shape, window, stride, dilation, causal = setting
        ours = Neighborhood(shape, window, stride, dilation, causal).layout(math.prod(shape)).to_dense()[0, 0]
        assert torch.equal(ours, official(*setting)), setting
        seen |= {
            ("even", any(k % 2 == 0 for k in window)),
            ("causal", any(causal)),
            ("stride", max(stride) > 1),
        }
        seen |= {("dilated", max(dilation) > 1), ("all", ours.all().item())}
        seen |= {("ragged", any(n % d for n, d in zip(shape, dilation, strict=True)))}
    assert len(seen) == 12  # every kind of setting was drawn, and its opposite
