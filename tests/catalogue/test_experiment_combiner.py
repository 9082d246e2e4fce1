"""What the experiment of Combiner compares with what."""

from __future__ import annotations

import pytest
import torch

from foveate.catalogue.experiments import combiner
from foveate.patterns import Pattern


@pytest.mark.parametrize("n", [16, 176, 256, 512])
def test_arms_have_equally_many_pairs(n):
    """A row of Combiner: the tokens of the own segment so far, and one summary per earlier segment."""
    size = next(s for s in range(1, n + 1) if s * s >= n)
    logits = torch.arange(n) % size + 1 + torch.arange(n) // size
    arms = combiner.arms(n)
    sparse, window = arms["sparse"], arms["sliding window"]
    assert isinstance(sparse, Pattern)
    assert isinstance(window, Pattern)
    dense = sparse.layout(n).to_dense()[0, 0]
    assert torch.equal(dense.sum(1), logits)
    area = int(logits.sum())
    assert area <= window.layout(n).area < area + n
    reach = window.layout(n).to_dense()[0, 0, -1].flip(0)
    assert not reach[combiner.REACH + 1 :].any()


def test_the_sparse_pattern_is_own_segment_and_last_tokens():
    dense = combiner.sparse(16).layout(16).to_dense()[0, 0]
    for i in range(16):
        for j in range(16):
            assert dense[i, j] == (j <= i and (j // 4 == i // 4 or j % 4 == 3))
