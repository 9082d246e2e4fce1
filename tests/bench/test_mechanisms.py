from __future__ import annotations

import pytest
import torch

from foveate.bench import mechanisms as mechs
from foveate.bench.pictures import coverage
from foveate.core.patterns import Causal
from foveate.core.selectors.base import Selector
from foveate.selectors import TopBlocks

STATIC = ("sliding_sinks", "dilated", "power", "shards", "random")
SHAPE = mechs.Shape(8, 4)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("length", [512, 1000, 2048])
def test_every_static_mechanism_has_the_density_asked(name, length):
    layout = mechs.policy(name, length, 0.25, SHAPE).policy.layout(length)
    assert mechs.density_of(layout) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("name", STATIC)
def test_mechanisms_are_causal_and_every_query_sees_itself(name):
    dense = mechs.policy(name, 300, 0.4, SHAPE).policy.layout(300).to_dense()
    assert not dense.triu(1).any()
    assert dense.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
def test_random_control_has_equal_density_in_whole_blocks_and_row_by_row(density):
    n = 2048
    clever = mechs.policy("sliding_sinks", n, density, SHAPE).policy.layout(n)
    control = mechs.policy("random", n, density, SHAPE).policy.layout(n)
    assert mechs.density_of(control) == pytest.approx(mechs.density_of(clever), rel=0.01)
    mean = control.row_area[0].double().mean(0)
    assert (mean - clever.row_area[0, 0]).abs().max() <= 64 * 64  # within one tile in each row
    causal = Causal().layout(n)
    assert len(control.dictionary) == len(causal.dictionary)  # whole blocks, cut by the diagonal alone


def test_random_control_differs_by_seed_and_head():
    n = 1024
    one, two = (mechs.policy("random", n, 0.25, SHAPE, seed).policy.layout(n) for seed in (0, 1))
    assert one != two
    dense = one.to_dense()[0]
    assert not (dense[0] == dense[1]).all()


def test_a_density_out_of_reach_is_refused_with_the_range():
    with pytest.raises(ValueError, match=r"density 3% cannot be reached; accepted \d+% to"):
        mechs.policy("sliding_sinks", 256, 0.03, SHAPE)
    with pytest.raises(ValueError, match="unknown mechanism 'windw'"):
        mechs.policy("windw", 256, 0.25, SHAPE)


def test_flexprefill_is_a_selector_with_a_knob():
    built = mechs.policy("flexprefill", 512, 0.25, SHAPE)
    assert isinstance(built.policy, Selector)
    assert built.tune is not None
    assert built.tune.make(2.0).parameters == {"gamma": 0.99}


def test_names_titles_and_colours_are_complete():
    for table in (mechs.TITLES, mechs.ABOUT, mechs.SOURCES, mechs.COLOURS):
        assert tuple(table) == mechs.NAMES


def test_coverage_is_the_mean_of_the_mask():
    layout = mechs.policy("shards", 512, 0.25, SHAPE).policy.layout(512)
    grid = coverage(layout)
    exact = layout.to_dense()[0].double().mean(0).view(256, 2, 256, 2).mean((1, 3))
    assert grid.shape == (256, 256)
    assert abs(grid - exact.numpy()).max() < 1e-6
    assert coverage(Causal().layout(64 * 300)).shape == (150, 150)  # several tiles per cell


@pytest.mark.parametrize("name", ["blocks_mean", "blocks_bounds", "blocks_peak", "oracle"])
@pytest.mark.parametrize(("length", "rel"), [(1000, 0.2), (2048, 0.12), (4096, 0.06)])
def test_top_blocks_have_the_density_asked_whatever_the_content(name, length, rel):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 8, length, 16, generator=g), torch.randn(1, 4, length, 16, generator=g)
    built = mechs.policy(name, length, 0.25, SHAPE)
    assert built.tune is None
    got = mechs.density_of(built.policy.layout(q, k))
    assert got == pytest.approx(0.25, rel=rel)
    other = TopBlocks(64, built.parameters["keep"] + 1, built.policy.score)
    assert abs(mechs.density_of(other.layout(q, k)) - 0.25) >= abs(got - 0.25)


@pytest.mark.parametrize("name", ["anchor", "dhsa", "hip", "flexprefill"])
def test_the_knob_of_a_selector_reaches_the_density(name):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 8, 1024, 16, generator=g) * 2, torch.randn(1, 4, 1024, 16, generator=g)
    tune = mechs.policy(name, 1024, 0.25, SHAPE).tune
    low, high = tune.low, tune.high
    got = lambda x: mechs.density_of(tune.make(x).policy.layout(q, k))  # noqa: E731
    assert got(low) < 0.25 < got(high)
    for _ in range(tune.steps):
        middle = (low + high) / 2
        low, high = (low, middle) if got(middle) > 0.25 else (middle, high)
    assert got(low) == pytest.approx(0.25, rel=0.15)


def test_a_builder_from_a_setting_is_tuned_by_its_density():
    built = mechs.tuned(lambda x: (TopBlocks(keep=round(2**x)), {"x": x}), 0, 4)(512, 0.3, SHAPE, 0)
    assert built.parameters == {"x": 2.0}
    assert built.text == "TopBlocks(block=64, keep=4, score='mean', first=1, local=1)"
    assert built.tune.make(3.0).policy == TopBlocks(keep=8)


def test_the_usual_comparison_has_no_oracle_and_names_are_in_the_order_of_the_table():
    assert mechs.USUAL == ("dense", "sliding_sinks", "dilated", "power", "shards", "flexprefill", "random")
    assert set(mechs.USUAL) < set(mechs.NAMES)
    assert "upper bound" in mechs.ABOUT["oracle"]
