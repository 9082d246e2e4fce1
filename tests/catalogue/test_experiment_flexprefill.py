"""The parts of FlexPrefill's experiment that decide what is compared with what."""

from __future__ import annotations

import torch

from foveate.catalogue.experiments.flexprefill import drawn, fixed


def test_the_fixed_budget_is_the_same_for_every_head_and_input():
    shares = []
    for queries in (640, 1):  # spread attention; and all queries on one key, which needs a single column
        g = torch.Generator().manual_seed(queries)
        q, k = torch.randn(1, 4, queries, 16, generator=g) * 90, torch.randn(1, 2, 640, 16, generator=g)
        q = q.expand(1, 4, 640, 16)
        layout, info = fixed(3).select(q, k)
        assert not info["query_aware"].any()
        blocks = layout.to_dense()[0].unflatten(2, (10, 64)).unflatten(1, (10, 64)).any(-1).any(2)
        for head in blocks:  # 3 columns and 3 distances reach the last row of blocks
            columns = {j for j in range(10) if head[j:, j].all()}
            distances = {d for d in range(10) if head.diagonal(-d).all()}
            assert len(columns) >= 3
            assert len(distances) >= 3
            assert int(head[9].sum()) <= 6
        shares.append(info["density"])
    assert (torch.stack(shares) < 0.4).all()


def test_dense_is_drawn_as_a_level_across_the_range_of_the_others():
    found = {
        "dense": [{"share": 1.0, "hits": [1, 1]}],
        "FlexPrefill": [{"share": 0.1, "hits": [1, 0]}, {"share": 0.4, "hits": [1, 1]}],
    }
    dense, ours = drawn(found)["series"]
    assert dense["x"] == [0.1, 0.4]
    assert dense["y"] == [1.0, 1.0]
    assert dense["reference"]
    assert ours["x"] == [0.1, 0.4]
    assert ours["y"] == [0.5, 1.0]
    assert all(low <= y <= high for low, y, high in zip(ours["low"], ours["y"], ours["high"], strict=True))
