"""Shards against the block maps that the authors' released code builds.

The maps were made by running `get_sparse_attn_mask` of github.com/linxihui/dkernel (commit 0d4e90e). There block K is
in the shard of layout l when (K + l * step + offset) mod stride = 0 with offset 0 by default: one less than the rule
of Phi-3-small, which is the default of `Shards`; `offsets` expresses both. The step counts query heads, also when
layouts are one per key/value head.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.patterns import Shards

CASES = json.loads(Path(__file__).with_name("shards_released.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['heads']}h-L{c['local_blocks']}V{c['stride']}")
def test_is_the_mask_of_the_released_code(case):
    heads, stride, n, block = case["heads"], case["stride"], case["tokens"], case["block"]
    layouts = 1 if case["homogeneous"] else case["kv_heads"] or heads
    step = max(1, stride // heads)
    pattern = Shards(
        block,
        case["local_blocks"],
        stride,
        offsets=tuple(layout * step + case["offset"] - 1 for layout in range(layouts)),
        group=1 if case["homogeneous"] else heads // layouts,
        require_coverage=False,
    )
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(case["blocks"]), np.uint8), count=np.prod(case["shape"]))
    blocks = torch.from_numpy(bits.reshape(case["shape"]).astype(bool))
    want = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :n]
    want &= torch.ones(n, n, dtype=torch.bool).tril()
    assert torch.equal(pattern.layout(n).to_dense()[0], want)
    if case["offset"] == 1 and case["kv_heads"] is None and not case["homogeneous"]:
        default = Shards(block, case["local_blocks"], stride, layouts=heads, require_coverage=False)
        assert torch.equal(default.layout(n).to_dense()[0], want)
