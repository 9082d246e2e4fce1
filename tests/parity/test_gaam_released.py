"""Gaussian adaptive attention against results of the authors' released code.

The results were made by running `MultiHeadGaussianAdaptiveAttention` and `GaussianBlock` of
github.com/gioannides/Gaussian-Adaptive-Attention (commit 145d1bc) on the CPU in float64, with the inputs, offsets and
widths below. Those are mild: where the densities of a piece together fall below 1e-8, the released code does not divide
by their sum, and its weights vanish.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.layers import GaussianAdaptiveAttention, GaussianAdaptiveBlock

HELD = json.loads(Path(__file__).with_name("gaam_released.json").read_text())


def close(got, want):
    want = torch.from_numpy(np.frombuffer(base64.b64decode(want), "<f4").copy()).view(got.shape)
    torch.testing.assert_close(got.detach().float(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "case", HELD["cases"], ids=lambda case: f"{case['axis']}-{case['heads']}-{case['padding_value']}"
)
def test_gives_what_the_released_code_gives(case):
    heads, gaussians, padding = case["heads"], case["gaussians"], case["padding_value"]
    rng = np.random.default_rng(case["seed"])
    x = rng.standard_normal(case["shape"])
    offsets, widths = 0.2 * rng.standard_normal((heads, gaussians)), rng.standard_normal((heads, gaussians))
    if padding is not None:
        x[rng.random(case["shape"]) < 0.3] = padding
    layer = GaussianAdaptiveAttention(case["axis"], heads, gaussians, padding_value=padding).double()
    with torch.no_grad():
        layer.offsets.copy_(torch.from_numpy(offsets))
        layer.widths.copy_(torch.from_numpy(np.sign(widths) * (np.abs(widths) + 0.8)))
    close(layer(torch.from_numpy(x)), case["out"])
    close(layer.weights(torch.from_numpy(x)), case["weights"])


def test_the_block_gives_what_the_released_one_gives():
    rng = np.random.default_rng(HELD["block"]["seed"])
    x, numbers = rng.standard_normal((2, 6, 8)), torch.from_numpy(rng.standard_normal((2, 2, 2, 3)))
    numbers = torch.stack([0.2 * numbers[0], numbers[1].abs() + 0.8])
    block = GaussianAdaptiveBlock([-1, 1], [2, 2], [3, 3]).double()
    with torch.no_grad():
        for number, layer in enumerate(block.layers):
            layer.offsets.copy_(numbers[0, number])
            layer.widths.copy_(numbers[1, number])
    close(block(torch.from_numpy(x)), HELD["block"]["out"])
