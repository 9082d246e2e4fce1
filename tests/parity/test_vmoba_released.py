"""VMoBA against the query-block pairs that the authors' released code selects.

The choices were made by running the selection of github.com/KwaiVGI/VMoBA (src/vmoba.py, commit 4da72ff) on the CPU, in
float32, on the inputs below: its gates, its selection functions and its own-block mask, with the tokens put into its
order of blocks and back. Its attention (CUDA only) did not run.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.selectors import VMoBA, vmoba_cycle

HEADS, DIM = 3, 8
CASES = json.loads(Path(__file__).with_name("vmoba_released.json").read_text())["cases"]
SCOPES = {"head_global": "head", "query_head": "query", "block": "block", "overall": "all"}


def inputs(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, HEADS, tokens, DIM))
    k = rng.standard_normal((1, HEADS, tokens, DIM)) + rng.standard_normal((1, HEADS, 1, DIM))
    return torch.from_numpy(q).float(), torch.from_numpy(k).float()


def chooser(case) -> VMoBA:
    shape, chunk = case["shape"], case["chunk"]
    if isinstance(chunk, list):
        block = (shape[0], *chunk) if len(chunk) == 2 else tuple(chunk)
    else:
        first = vmoba_cycle(shape, frames=chunk, tile=(1, 1), cube=(1, 1, 1))[0]
        shape, block = first.shape, first.block
    return VMoBA(
        shape, block, tau=case["tau"], mode=case["mode"], scope=SCOPES[case["scope"]], topk=case["topk"]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['mode']}-{c['scope']}-{c['chunk']}-{c['tau']}")
def test_chooses_the_pairs_of_the_released_code(case):
    tokens, blocks = prod(case["shape"]), case["blocks"]
    bits = np.unpackbits(
        np.frombuffer(bytes.fromhex(case["choice"]), np.uint8), count=HEADS * tokens * blocks
    )
    want = torch.from_numpy(bits.reshape(1, HEADS, tokens, blocks).astype(bool))
    got = chooser(case).select(*inputs(case["seed"], tokens))
    assert torch.equal(got, want)
    assert not want.all()
