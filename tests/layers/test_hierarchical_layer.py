"""The layer: it is the function between its projections."""

from __future__ import annotations

import pytest
import torch

from foveate.compress import Hierarchy, hierarchical_attention
from foveate.layers import HierarchicalSelfAttention


def test_the_layer_is_the_function_between_projections():
    torch.manual_seed(0)
    layer = HierarchicalSelfAttention(24, 4, kv_heads=2, bias=True, branching=3, energy="sqdist").double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    for tree in (None, Hierarchy.from_modalities([4, 7])):
        q = torch.stack(layer.q(x).chunk(4, -1), 1)
        k, v = (torch.stack(t.chunk(2, -1), 1) for t in layer.kv(x).chunk(2, -1))
        shape = tree or Hierarchy.from_windows(11, 3)
        heads = hierarchical_attention(q, k, v, shape, energy="sqdist")
        torch.testing.assert_close(layer(x, tree), layer.out(torch.cat(list(heads.unbind(1)), -1)))


def test_positions_of_siblings_count():
    layer, tree = HierarchicalSelfAttention(16, 2), Hierarchy.from_windows(9, 3)
    x = torch.randn(1, 9, 16)
    assert not torch.allclose(layer(x, tree), layer(x, tree, torch.randn(tree.nodes, 4)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dim": 10, "heads": 4}, "heads must divide dim"),
        ({"dim": 8, "heads": 4, "kv_heads": 3}, "kv_heads heads"),
        ({"dim": 8, "heads": 2, "branching": 1}, "branching must be an int >= 2, got 1"),
    ],
)
def test_numbers_that_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        HierarchicalSelfAttention(**arguments)


def test_inputs_that_are_refused():
    with pytest.raises(ValueError, match=r"x must be \(batch, tokens, 8\), got \(3, 8\)"):
        HierarchicalSelfAttention(8, 2)(torch.zeros(3, 8))
