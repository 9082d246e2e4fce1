"""Agent attention: two chained softmaxes written out, the rank and sums of their product, pooled agents, biases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from foveate.compress import AgentBias, agent_attention, pool_agents


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(n=37, m=41, a=5, heads=4, kv_heads=2, dim=8, dv=6, batch=2):
    return (
        normal(batch, heads, n, dim, seed=1),
        normal(batch, kv_heads, m, dim, seed=2),
        normal(batch, kv_heads, m, dv, seed=3),
        normal(batch, heads, a, dim, seed=4),
    )


def chained(q, k, v, agents, agg, bcast, scale, scale2):
    """(weights queries x keys, output), every softmax with its whole matrix."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    read = torch.softmax(scale * agents @ k.mT + agg, -1)
    told = torch.softmax(scale2 * q @ agents.mT + bcast, -1)
    return told @ read, told @ (read @ v)


# ------------------------------------------------------------------------------------------------- the operator
@pytest.mark.parametrize(("n", "m", "a"), [(37, 41, 5), (1, 7, 3), (29, 2, 11), (13, 13, 1)])
def test_two_chained_softmaxes(n, m, a):
    q, k, v, agents = inputs(n, m, a)
    agg, bcast = normal(4, a, m, seed=5), normal(2, 1, n, a, seed=6)
    _, want = chained(q, k, v, agents, agg, bcast, 0.3, 0.7)
    got = agent_attention(q, k, v, agents, bias_agg=agg, bias_bcast=bcast, scale=0.3, scale_bcast=0.7)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    _, plain = chained(q, k, v, agents, 0, 0, 8**-0.5, 8**-0.5)
    torch.testing.assert_close(agent_attention(q, k, v, agents), plain, atol=1e-12, rtol=0)
    _, second = chained(
        q, k, v, agents, 0, 0, 0.2, 0.2
    )  # the second scale is the first where it is not given
    torch.testing.assert_close(agent_attention(q, k, v, agents, scale=0.2), second, atol=1e-12, rtol=0)


def test_the_matrix_has_rows_of_sum_one_and_rank_at_most_n():
    q, k, _, agents = inputs(37, 41, 5)
    whole = agent_attention(q, k, torch.eye(41, dtype=torch.float64).expand(2, 2, 41, 41), agents)
    want, _ = chained(q, k, k, agents, 0, 0, 8**-0.5, 8**-0.5)
    torch.testing.assert_close(whole, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole[..., 0]), atol=1e-12, rtol=0)
    assert (torch.linalg.matrix_rank(whole, rtol=1e-10) == 5).all()


def test_all_keys_as_agents_is_not_softmax_attention():
    q, k, v, _ = inputs(23, 23, kv_heads=4)
    full = F.scaled_dot_product_attention(q, k, v)
    assert (agent_attention(q, k, v, k) - full).abs().max() > 0.05


def test_equal_keys_give_the_mean_of_the_values():
    q, k, v, agents = inputs()
    same = k[:, :, :1].expand_as(k)
    want = v.mean(2, keepdim=True).repeat_interleave(2, 1).expand(2, 4, 37, 6)
    torch.testing.assert_close(agent_attention(q, same, v, agents), want, atol=1e-12, rtol=0)


def test_the_order_of_the_keys_does_not_matter_without_biases():
    q, k, v, agents = inputs()
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    want = agent_attention(q, k, v, agents)
    torch.testing.assert_close(
        agent_attention(q, k[:, :, order], v[:, :, order], agents), want, atol=1e-12, rtol=0
    )
    agg = normal(5, 41, seed=9)
    moved = agent_attention(q, k[:, :, order], v[:, :, order], agents, bias_agg=agg)
    assert (moved - agent_attention(q, k, v, agents, bias_agg=agg)).abs().max() > 0.01


def test_gradients_reach_everything():
    q, k, v, agents = inputs(5, 7, 3, batch=1)
    agg, bcast = normal(4, 3, 7, seed=5), normal(4, 5, 3, seed=6)
    leaves = [t.requires_grad_() for t in (q, k, v, agents, agg, bcast)]
    torch.autograd.gradcheck(
        lambda q, k, v, a, g, b: agent_attention(q, k, v, a, bias_agg=g, bias_bcast=b), leaves, fast_mode=True
    )


def test_dropout_drops_in_both_softmaxes():
    q, k, v, agents = inputs(400, 400, 20, batch=1)
    ones = torch.ones_like(v)  # outputs are sums of weights
    torch.manual_seed(0)
    assert abs(float(agent_attention(q, k, ones, agents, dropout_p=0.5).mean()) - 1) < 0.1
    one = agent_attention(q, k, ones, agents[:, :, :1], dropout_p=0.5)[..., 0]
    assert (one == 0).double().mean() == pytest.approx(0.5, abs=0.06)  # the second: the one agent is dropped
    assert float(one.max()) != pytest.approx(2.0, abs=1e-3)  # the first: 2 times a sum that lost weights
    assert [len(row.unique()) for row in one[0]] == [2] * 4


# ------------------------------------------------------------------------------------------------ pooled agents
@pytest.mark.parametrize(
    ("grid", "cells"), [((7, 5), (3, 2)), ((14, 14), (7, 7)), ((3, 2), (5, 4)), ((1, 11), (1, 4))]
)
def test_agents_are_means_of_cells(grid, cells):
    q = normal(2, 3, grid[0] * grid[1], 4)
    got = pool_agents(q, cells, grid).unflatten(2, cells)
    image = q.unflatten(2, grid)
    for y in range(cells[0]):
        for x in range(cells[1]):
            rows = slice(y * grid[0] // cells[0], -(-(y + 1) * grid[0] // cells[0]))
            columns = slice(x * grid[1] // cells[1], -(-(x + 1) * grid[1] // cells[1]))
            want = image[:, :, rows, columns].mean((2, 3))
            torch.testing.assert_close(got[:, :, y, x], want, atol=1e-14, rtol=0)


def test_a_number_of_agents_pools_the_queries_in_their_order():
    q, k, v, _ = inputs(31)
    want = agent_attention(q, k, v, pool_agents(q, (1, 6), (1, 31)))
    torch.testing.assert_close(agent_attention(q, k, v, 6), want, atol=0, rtol=0)
    transposed = q.mT.contiguous().mT
    torch.testing.assert_close(pool_agents(transposed, 6), pool_agents(q, 6), atol=1e-15, rtol=0)


# ------------------------------------------------------------------------------------------------------- biases
def test_biases_are_sums_of_tables():
    torch.manual_seed(0)
    bias = AgentBias(2, (7, 7), agents=3).double()
    agg, bcast = bias()
    for h, m, y, x in ((0, 0, 0, 0), (1, 2, 6, 3), (0, 1, 2, 5)):
        want = bias.an_bias[h, m, y, x] + bias.ah_bias[0, h, m, y, 0] + bias.aw_bias[0, h, m, 0, x]
        torch.testing.assert_close(agg[h, m, 7 * y + x], want, atol=1e-15, rtol=0)
        want = bias.na_bias[h, m, y, x] + bias.ha_bias[0, h, y, 0, m] + bias.wa_bias[0, h, 0, x, m]
        torch.testing.assert_close(bcast[h, 7 * y + x, m], want, atol=1e-15, rtol=0)


def linear(values, size):
    """Linear interpolation of a list at the middles of `size` equal parts, flat beyond the outer middles."""
    out = []
    for i in range(size):
        at = min(max((i + 0.5) * len(values) / size - 0.5, 0.0), len(values) - 1.0)
        low = math.floor(at)
        high = min(low + 1, len(values) - 1)
        out.append(values[low] * (1 - (at - low)) + values[high] * (at - low))
    return torch.stack(out)


@pytest.mark.parametrize("size", [(14, 14), (5, 11), (7, 7)])
def test_the_table_is_resized_bilinearly_and_is_itself_at_its_own_size(size):
    torch.manual_seed(1)
    bias = AgentBias(1, size, agents=2).double()
    for name in ("ah_bias", "aw_bias", "ha_bias", "wa_bias"):
        torch.nn.init.zeros_(getattr(bias, name))
    agg, bcast = bias()
    for m in range(2):
        for table, got in ((bias.an_bias, agg[0, m]), (bias.na_bias, bcast[0, :, m])):
            columns = linear(list(linear(list(table[0, m]), size[0]).mT), size[1]).mT
            torch.testing.assert_close(got.view(size), columns, atol=1e-14, rtol=0)
    if size == (7, 7):
        assert torch.equal(agg[0, 1].view(7, 7), bias.an_bias[0, 1])


def test_other_resolutions_interpolate_rows_and_columns():
    torch.manual_seed(2)
    bias = AgentBias(1, (4, 6), agents=1, reduction=2).double()
    torch.nn.init.zeros_(bias.an_bias)
    torch.nn.init.zeros_(bias.na_bias)
    agg, bcast = bias((7, 12))
    rows, columns = bias.ah_bias.flatten(), bias.aw_bias.flatten()
    want = linear(list(rows), 3)[:, None] + linear(list(columns), 6)
    torch.testing.assert_close(agg.view(3, 6), want, atol=1e-14, rtol=0)
    want = linear(list(bias.ha_bias.flatten()), 7)[:, None] + linear(list(bias.wa_bias.flatten()), 12)
    torch.testing.assert_close(bcast.view(7, 12), want, atol=1e-14, rtol=0)


def test_the_class_token_has_a_column_of_its_own_first():
    torch.manual_seed(3)
    with_token, without = AgentBias(2, (3, 4), 5, class_token=True), AgentBias(2, (3, 4), 5)
    without.load_state_dict({k: v for k, v in with_token.state_dict().items() if k[:2] not in ("ac", "ca")})
    for longer, plain, own, axis in zip(
        with_token(), without(), (with_token.ac_bias[0], with_token.ca_bias[0]), (2, 1), strict=True
    ):
        assert torch.equal(longer, torch.cat([own, plain], axis))


def test_tables_start_small():
    torch.manual_seed(0)
    bias = AgentBias(4, (14, 14), class_token=True)
    for p in bias.parameters():
        assert 0.01 < float(p.detach().std()) < 0.03
        assert float(p.detach().abs().max()) < 0.12


# ------------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    q, k, v, agents = inputs()
    for wrong in (agents[:, :2], agents[..., :4], agents[0]):
        with pytest.raises(ValueError, match=r"agents must be \(B, H, n, D\)"):
            agent_attention(q, k, v, wrong)
    for zero in (0, True):
        with pytest.raises((ValueError, TypeError), match="agents must be an int >= 1, got"):
            agent_attention(q, k, v, zero)
    with pytest.raises(
        ValueError, match=r"bias_agg must be broadcastable to \(2, 4, 5, 41\), got shape \(5, 40\)"
    ):
        agent_attention(q, k, v, agents, bias_agg=normal(5, 40))
    with pytest.raises(ValueError, match=r"bias_bcast must be broadcastable to \(2, 4, 37, 5\)"):
        agent_attention(q, k, v, agents, bias_bcast=normal(5, 37))
    with pytest.raises(ValueError, match=r"with a grid and an int without; got agents=4, grid=\(37, 1\)"):
        pool_agents(q, 4, (37, 1))
    with pytest.raises(
        ValueError, match=r"q must be \(B, H, h \* w, D\), got \(2, 4, 37, 8\) for grid \(6, 6\)"
    ):
        pool_agents(q, (2, 2), (6, 6))
    for wrong in ((7,), (0, 7), (7, 2.0), 7):
        with pytest.raises(ValueError, match="AgentBias: resolution must be"):
            AgentBias(2, wrong)
    with pytest.raises(ValueError, match=r"resolution must be .* ints >= 4, got"):
        AgentBias(2, (8, 3), reduction=4)
    with pytest.raises(ValueError, match="AgentBias: table must be an int >= 1, got 0"):
        AgentBias(2, (8, 8), table=0)
