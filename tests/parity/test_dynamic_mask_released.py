"""Dynamic mask attention against the authors' model code as it is in transformers (the exp form)."""

from __future__ import annotations

import pytest
import torch

from foveate.layers import dma_attention, dma_bias

doge = pytest.importorskip("transformers.models.doge.modeling_doge")


@pytest.mark.parametrize("w", [5, 16, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_equals_the_released_layer(heads, kv_heads, w):
    config = doge.DogeConfig(
        hidden_size=32,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        keep_window_size=w,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = doge.DogeAttention(config, 0).double().eval()
    torch.nn.init.normal_(theirs.A)
    torch.nn.init.normal_(theirs.dt_proj.weight)
    x, n = torch.randn(2, 37, 32, dtype=torch.float64), 37
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    # its own masked_fill takes 0 for visible
    mask = torch.zeros(2, 1, n, n, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    none = torch.ones(1, n, 8, dtype=torch.float64), torch.zeros(1, n, 8, dtype=torch.float64)
    want = theirs(x, none, mask)[0]

    q, k, v = (p(x).unflatten(2, (-1, 8)) for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj))
    q, k, v = theirs.q_norm(q).transpose(1, 2), theirs.k_norm(k).transpose(1, 2), v.transpose(1, 2)
    bias = dma_bias(v, theirs.dt_proj, theirs.A, "exp")
    out = theirs.o_proj(dma_attention(q, k, v, bias, w).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, want, atol=1e-6, rtol=0)  # its softmax is float32
