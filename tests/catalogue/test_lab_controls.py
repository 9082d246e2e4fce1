"""Controls of equal density have the density they say."""

from __future__ import annotations

import pytest

from foveate.catalogue.lab.controls import causal_share, equal_random, equal_window
from foveate.patterns import Causal, Shards, SlidingWindow


@pytest.mark.parametrize(("share", "n"), [(0.1, 131), (0.5, 131), (0.153, 1000), (1.0, 75), (1e-9, 75)])
def test_the_window_is_the_smallest_with_the_share(share, n):
    window = equal_window(share, n).parts[1].window
    assert causal_share(equal_window(share, n), n) >= share
    assert window == 1 or causal_share(Causal() & SlidingWindow(window - 1), n) < share


def test_a_share_is_averaged_over_heads():
    pattern = Shards(8, 1, 2, offsets=(0, 1, 1))
    dense = pattern.layout(131).to_dense()[0]
    assert causal_share(pattern, 131) == pytest.approx(dense.sum().item() / (3 * 131 * 132 / 2))


@pytest.mark.parametrize("block", [1, 8, 64])
def test_random_blocks_have_the_share_on_average(block):
    n, share = 1000, 0.3
    found = [causal_share(equal_random(share, n, block=block, heads=8, seed=s), n) for s in range(8)]
    assert sum(found) / 8 == pytest.approx(share, rel=0.03)
    assert len(set(found)) > 1
    lowest = equal_random(1e-3, n, block=block)  # the diagonal alone
    assert causal_share(lowest, n) == pytest.approx(causal_share(equal_random(1e-9, n, block=block), n))


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_shares_are_checked(share):
    with pytest.raises(ValueError, match="accepted: 0 < share <= 1"):
        equal_window(share, 10)
    with pytest.raises(ValueError, match="accepted: 0 < share <= 1"):
        equal_random(share, 10, block=2)
