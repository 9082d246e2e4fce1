"""FlexPrefill against the block maps that the authors' released code selects.

The maps were made by running `get_active_blocks` of github.com/bytedance/FlexPrefill (commit a24b27b) on the CPU, its
pooling kernel in Triton's interpreter, in float32, on the inputs below. Lengths are multiples of the block: with others
the released code shifts the block distances, a difference that `FlexPrefill` states.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.selectors import FlexPrefill

BLOCK, HEADS, KV_HEADS, DIM = 128, 8, 4, 16
CASES = json.loads(Path(__file__).with_name("flexprefill_released.json").read_text())["cases"]


def inputs(seed: int, tokens: int, sharp: float, shared: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Random q (1, 8, n, 16) and k (1, 4, n, 16); `shared` adds directions that whole blocks have in common."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, HEADS, tokens, DIM)) * sharp
    k = rng.standard_normal((1, KV_HEADS, tokens, DIM))
    if shared:
        base = rng.standard_normal((1, KV_HEADS, tokens // BLOCK, DIM)).repeat(BLOCK, 2) * shared
        q, k = 0.3 * q + base.repeat(HEADS // KV_HEADS, 1), 0.3 * k + base
    return torch.from_numpy(q), torch.from_numpy(k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_selects_the_blocks_of_the_released_code(case, dtype):
    nb = case["tokens"] // BLOCK
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(case["blocks"]), np.uint8), count=HEADS * nb * nb)
    want = torch.from_numpy(bits.reshape(HEADS, nb, nb).astype(bool))
    q, k = inputs(case["seed"], case["tokens"], case["sharp"], case["shared"])
    settings = {name: case[name] for name in ("gamma", "tau", "min_budget", "max_budget")}
    layout, info = FlexPrefill(BLOCK, **settings).select(q.to(dtype), k.to(dtype))
    got = layout.to_dense()[0].unflatten(2, (nb, BLOCK)).unflatten(1, (nb, BLOCK)).any(-1).any(2)
    assert torch.equal(got, want)
    if case["tau"] == 0.0 or case["tau"] == 1.0:
        assert (info["query_aware"] == (case["tau"] == 1.0)).all()
    else:  # both kinds of head are compared
        assert 0 < int(info["query_aware"].sum()) < HEADS
