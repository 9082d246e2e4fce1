"""HyperAttention against results of the authors' released code.

The results were made by running `HyperAttention.forward` of github.com/insuhan/hyper-attn (commit 68b91e9) on
the CPU in float64 on the inputs below, with the projections below in place of its own and the samples below
in place of `torch.randint`. One line was added to it: its plain-torch attention ignores the mask that keeps
samples out of the own block (its Triton kernel applies it), so that it counts such keys twice; here the mask
is added to the logits. Lengths are multiples of the block and of the number of pieces: with others the
released code pads with zero keys that it does not mask, a difference that `HyperAttention` states.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.composite import causal_by_halves
from foveate.composite.hyperattention import hash_codes, sorted_attention

CASES = json.loads(Path(__file__).with_name("hyperattention_released.json").read_text())["cases"]


def inputs(case):
    """q, k, v, projections, and a function that draws the samples of the next call: (heads, keys) -> (heads, m)."""
    rng = np.random.default_rng(case["seed"])
    heads, n, m, dim = (case[name] for name in ("heads", "queries", "keys", "dim"))
    q = rng.standard_normal((2, heads, n, dim)) * 1.5
    k, v = (rng.standard_normal((2, heads, m, dim)) for _ in range(2))
    projections = rng.standard_normal((dim, case["n_proj"]))
    draw = lambda total, keys: torch.from_numpy(rng.integers(keys, size=(total, case["samples"])))  # noqa: E731
    return *(torch.from_numpy(x) for x in (q, k, v, projections)), draw


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_gives_what_the_released_code_gives(case):
    q, k, v, projections, draw = inputs(case)

    def estimate(q, k, v):
        keys, total = k.shape[2], q.shape[1]
        positions = draw(total, keys).view(
            case["heads"], -1, case["samples"]
        )  # the release counts pieces fastest
        positions = positions.transpose(0, 1).reshape(1, total, -1)
        orders = [torch.sort(hash_codes(x, projections, "release"), stable=True).indices for x in (q, k)]
        return sorted_attention(q, k, v, *orders, case["block"], positions, math.log(keys / case["samples"]))

    if case["causal"]:
        out, lse = causal_by_halves(q, k, v, estimate, leaf=case["min_seq_len"])
    else:
        out, lse = estimate(q, k, v)
    for name, got in (("out", out), ("lse", lse)):
        want = np.frombuffer(base64.b64decode(case[name]), "<f4").copy()
        shown = got[:, :, ::17].float()
        torch.testing.assert_close(shown, torch.from_numpy(want).view(shown.shape), atol=1e-6, rtol=1e-6)
