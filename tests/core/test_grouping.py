"""Interleaved query heads: attention and a selector over them, against a loop over heads."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.core.grouping import from_interleaved, to_interleaved
from foveate.core.layout import BlockLayout
from foveate.selectors import FlexPrefill


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (6, 3), (4, 1), (4, 4)])
@pytest.mark.parametrize(
    "who", [None, FlexPrefill(64, gamma=0.6, min_budget=64)], ids=["dense", "FlexPrefill"]
)
def test_head_h_reads_key_head_h_modulo_kv_heads(heads, kv_heads, who):
    g = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, heads, 300, 8, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, 300, 8, generator=g, dtype=torch.float64)
    out = to_interleaved(fv.attention(from_interleaved(q, kv_heads), k, v, who, is_causal=True), kv_heads)
    for h in range(heads):
        own = slice(h % kv_heads, h % kv_heads + 1)
        alone = fv.attention(q[:, h : h + 1], k[:, own], v[:, own], who, is_causal=True)
        torch.testing.assert_close(out[:, h : h + 1], alone, atol=1e-12, rtol=0)


def test_the_order_matters_and_comes_back():
    x = torch.arange(12).view(1, 12, 1)
    assert from_interleaved(x, 3)[0, :, 0].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert torch.equal(to_interleaved(from_interleaved(x, 3), 3), x)
    with pytest.raises(ValueError, match="kv_heads 5; accepted"):
        from_interleaved(x, 5)
    layout = FlexPrefill(64, gamma=0.5, min_budget=64).layout(
        torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8)
    )
    blocks = to_interleaved(layout.expand(1, 4).to_dense(), 2)  # a layout's heads, for looking at
    assert isinstance(layout, BlockLayout)
    assert torch.equal(blocks[:, 1], layout.to_dense()[:, 2])
