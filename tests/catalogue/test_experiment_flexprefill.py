"""The parts of FlexPrefill's experiment that decide what is compared with what."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate.catalogue.experiments.flexprefill import drawn, fixed


def test_the_fixed_budget_does_not_depend_on_the_content():
    """Only columns and distances, and as many of them whatever mass gamma asks for."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 640, 16, generator=g) * 9, torch.randn(1, 2, 640, 16, generator=g)
    layout, info = fixed(3).select(q, k)
    assert not info["query_aware"].any()
    assert layout.to_dense()[0].unflatten(2, (10, 64)).any(-1).sum(-1).max() <= 6
    assert all(replace(fixed(3), gamma=gamma).layout(q, k) == layout for gamma in (0.0, 0.1, 0.999))
    assert layout != fixed(4).layout(q, k)


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
