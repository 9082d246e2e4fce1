"""Landmark attention against what the authors' released code computes.

The numbers were made by running landmark_grouped_softmax and LlamaAttention of
github.com/epfml/landmark-attention (llama/llama_mem.py, commit d963e50) on the CPU in float64, on the inputs below,
with the masks that its LlamaModel prepares; rotary positions are float32 there. Its Triton kernel did not run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.compress import LandmarkCache, landmark_grouped_softmax
from foveate.core.rotary import Rotary

RELEASED = json.loads(Path(__file__).with_name("landmark_released.json").read_text())


@pytest.mark.parametrize("case", RELEASED["softmax"], ids=lambda c: f"{c['tokens']}-{c['block']}")
def test_grouped_softmax_and_its_gradient(case):
    n = case["tokens"]
    rng = np.random.default_rng(case["seed"])
    z = torch.from_numpy(3 * rng.standard_normal((1, 1, n, n))).requires_grad_()
    towards = torch.from_numpy(rng.standard_normal((1, 1, n, n)))
    got = landmark_grouped_softmax(z, torch.arange(1, n + 1) % case["block"] == 0)
    gradient = torch.autograd.grad((got * towards).sum(), z)[0]
    for ours, name in ((got, "weights"), (gradient, "gradient")):
        want = torch.tensor(case[name], dtype=torch.float64)
        torch.testing.assert_close(ours[0, 0], want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("run", RELEASED["cache"], ids=lambda r: r["aggregate"])
def test_cache_with_stingy_positions(run):
    """Several blocks at once, one block, a few tokens, one token: by the released cache and by ours."""
    heads, dim, steps = run["heads"], run["dim"], run["steps"]
    rng = np.random.default_rng(run["seed"])
    weights = [rng.standard_normal((heads * dim, heads * dim)) * 0.4 for _ in range(3)]
    x = torch.from_numpy(rng.standard_normal((1, sum(steps), heads * dim)))
    q, k, v = ((x @ torch.from_numpy(w).mT).unflatten(2, (heads, dim)).transpose(1, 2) for w in weights)
    cache, outs, at = LandmarkCache(run["block"] - 1, rope=Rotary(), positions="stingy"), [], 0
    for n in steps:
        piece = (t[:, :, at : at + n] for t in (q, k, v))
        outs.append(cache.step(*piece, top_k=run["top_k"], aggregate=run["aggregate"]))
        at += n
    got = torch.cat(outs, 2).transpose(1, 2).flatten(2)[0]
    torch.testing.assert_close(got, torch.tensor(run["out"], dtype=torch.float64), atol=1e-5, rtol=1e-5)
