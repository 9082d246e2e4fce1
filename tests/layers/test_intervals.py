"""Layouts of intervals against the comparison that defines them."""

from __future__ import annotations

import pytest
import torch

from foveate.layers.intervals import interval_layout


@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 5), (64, 64), (65, 130), (131, 75), (7, 200)])
def test_equals_the_comparison(n, m):
    g = torch.Generator().manual_seed(n)
    enter = torch.randint(0, n + 1, (2, 2, m), generator=g)
    leave = torch.randint(0, n + 1, (2, 2, m), generator=g)
    enter[0], leave[0] = 0, n  # all
    leave[1, 0] = enter[1, 0]  # nothing
    enter[1, 1, ::3], leave[1, 1, ::3] = 0, n
    row = torch.arange(n)[:, None]
    want = (row >= enter[:, :, None]) & (row < leave[:, :, None])  # (B, Hkv, n, m)
    layout = interval_layout(enter, leave, n, 6)
    assert torch.equal(layout.to_dense(), want.repeat_interleave(3, 1))
    assert (layout.tile_id[: layout.row_ptr[3]] == 0).all()  # full tiles are known as such
