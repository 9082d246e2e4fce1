"""Neighbourhood attention on the engines: ragged grids, dilation as attention on sub-grids, tokens that all see."""

from __future__ import annotations

import math

import pytest
import torch

import foveate as fv
from foveate.patterns import Neighborhood, tile_major


def inputs(n: int, extra: int = 0):
    g = torch.Generator().manual_seed(n)
    return (torch.randn(2, 3, size, 16, generator=g) for size in (n, n + extra, n + extra))


def defined(q, k, v, mask):
    """Softmax attention over a bool mask, in float64."""
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    return torch.softmax(logits.masked_fill(~mask, -math.inf), -1) @ v.double()


GRIDS = [  # no axis is a multiple of its dilation or of the tile
    ((131,), (7,), 1, 5, False),
    ((11, 13), (3, 4), 1, (3, 2), False),
    ((13, 17), (6, 5), (4, 2), (2, 3), (True, False)),
    ((5, 7, 9), (3, 2, 4), (2, 1, 3), (1, 3, 2), (True, False, False)),
]


@pytest.mark.parametrize(("shape", "window", "stride", "dilation", "causal"), GRIDS)
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("engine", ["native", "flex", "reference"])
def test_engines_equal_the_masked_softmax(shape, window, stride, dilation, causal, tiled, engine):
    n = math.prod(shape)
    order = tile_major(shape, 4) if tiled else "row_major"
    pattern = Neighborhood(shape, window, stride, dilation, causal, order)
    q, k, v = inputs(n)
    want = defined(q, k, v, pattern.layout(n).to_dense())
    got = fv.attention(q, k, v, pattern, engine=engine)
    assert (got.double() - want).abs().max() < 1e-5


def test_dilation_is_attention_inside_each_residue_class():
    shape, window, dilation = (12, 15), (3, 4), (2, 3)
    q, k, v = (x.unflatten(2, shape) for x in inputs(math.prod(shape)))
    dilated = Neighborhood(shape, window, dilation=dilation)
    whole = fv.attention(*(x.flatten(2, 3) for x in (q, k, v)), dilated).unflatten(2, shape)
    small = Neighborhood((6, 5), window)
    for row in range(2):
        for column in range(3):
            part = [x[:, :, row::2, column::3].flatten(2, 3) for x in (q, k, v)]
            want = fv.attention(*part, small).unflatten(2, (6, 5))
            torch.testing.assert_close(whole[:, :, row::2, column::3], want, atol=1e-6, rtol=0)


def test_tokens_that_every_query_sees_join_by_merging():
    n, extra = 11 * 13, 5
    pattern = Neighborhood((11, 13), (5, 4))
    q, k, v = inputs(n, extra)
    near = fv.attention(q, k[:, :, :n], v[:, :, :n], pattern, return_lse=True)
    text = fv.attention(q, k[:, :, n:], v[:, :, n:], return_lse=True)
    mask = torch.cat([pattern.layout(n).to_dense()[0, 0], torch.ones(n, extra, dtype=torch.bool)], 1)
    assert (fv.merge([near, text])[0].double() - defined(q, k, v, mask)).abs().max() < 1e-5
