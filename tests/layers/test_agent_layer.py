"""The agent attention layer written out token by token, its class token, its reduced maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.compress import pool_agents
from foveate.layers import AgentAttention2d


def made(*arguments, seed=0, **options):
    torch.manual_seed(seed)
    layer = AgentAttention2d(*arguments, **options).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolved(image, layer):
    """The depthwise convolution by shifts: image (B, h, w, C)."""
    weight, out = layer.dwc.weight, torch.zeros_like(image) + layer.dwc.bias
    padded, (h, w) = F.pad(image, (0, 0, 1, 1, 1, 1)), image.shape[1:3]
    for dy in range(3):
        for dx in range(3):
            out = out + padded[:, dy : dy + h, dx : dx + w] * weight[:, 0, dy, dx]
    return out


def written_out(layer, x, grid, lead):
    split = lambda t: t.unflatten(2, (layer.heads, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = (split(p(x)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    agents = pool_agents(q[:, :, lead:], (layer.side, layer.side), grid)
    agg, bcast = layer.position(grid)
    scale = q.shape[3] ** -0.5
    read = torch.softmax(scale * agents @ k.mT + agg, -1) @ v
    out = (torch.softmax(scale * q @ agents.mT + bcast, -1) @ read).transpose(1, 2).flatten(2)
    near = convolved(layer.v_proj(x)[:, lead:].unflatten(1, grid), layer).flatten(1, 2)
    return layer.o_proj(torch.cat([out[:, :lead], out[:, lead:] + near], 1))


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize(("grid", "agents"), [((7, 7), 49), ((5, 11), 9), ((13, 3), 4)])
def test_the_layer_is_its_formula(grid, agents, lead):
    layer = made(24, 4, grid, agents=agents, class_token=bool(lead), bias=True)
    x = normal(2, grid[0] * grid[1] + lead, 24)
    torch.testing.assert_close(layer(x), written_out(layer, x, grid, lead), atol=1e-11, rtol=1e-11)


def test_another_resolution():
    layer = made(24, 4, (6, 6), agents=4)
    x = normal(1, 8 * 5, 24)
    torch.testing.assert_close(
        layer(x, resolution=(8, 5)), written_out(layer, x, (8, 5), 0), atol=1e-11, rtol=1e-11
    )
    assert torch.equal(layer(x[:, :36], resolution=(6, 6)), layer(x[:, :36]))


def test_the_convolution_adds_nothing_to_the_class_token():
    layer, x = made(16, 2, (5, 5), agents=4, class_token=True), normal(2, 26, 16)
    out = layer(x)
    torch.nn.init.normal_(layer.dwc.weight)
    changed = layer(x)
    assert torch.equal(out[:, 0], changed[:, 0])
    assert (out[:, 1:] != changed[:, 1:]).any(-1).all()


def test_the_class_token_is_not_pooled():
    layer, x = made(16, 2, (5, 5), agents=4, class_token=True), normal(1, 26, 16)
    for p in (layer.k_proj, layer.v_proj):
        torch.nn.init.zeros_(p.weight[:, 0])
    other = x.clone()
    other[:, 0, 0] += 10.0  # moves the class token's query alone
    torch.testing.assert_close(layer(other)[:, 1:], layer(x)[:, 1:], atol=1e-12, rtol=0)
    assert (layer(other)[:, 0] - layer(x)[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(("grid", "reduction"), [((8, 8), 2), ((8, 12), 4), ((7, 9), 2)])
def test_keys_and_values_come_from_the_smaller_map(grid, reduction):
    layer, x = made(16, 2, grid, agents=9, reduction=reduction), normal(2, grid[0] * grid[1], 16)
    image, smaller = x.unflatten(1, grid), []
    h, w = grid[0] // reduction, grid[1] // reduction
    for y in range(h):
        for c in range(w):
            cell = image[:, y * reduction : (y + 1) * reduction, c * reduction : (c + 1) * reduction]
            smaller.append(torch.einsum("byxi,oiyx->bo", cell, layer.smaller.weight) + layer.smaller.bias)
    read = layer.norm(torch.stack(smaller, 1))
    split = lambda t: t.unflatten(2, (2, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = split(layer.q_proj(x)), split(layer.k_proj(read)), split(layer.v_proj(read))
    agents, (agg, bcast) = pool_agents(q, (3, 3), grid), layer.position()
    assert agg.shape == (2, 9, h * w)
    out = torch.softmax(8**-0.5 * agents @ k.mT + agg, -1) @ v
    out = (torch.softmax(8**-0.5 * q @ agents.mT + bcast, -1) @ out).transpose(1, 2).flatten(2)
    values = F.interpolate(layer.v_proj(read).mT.unflatten(2, (h, w)), grid, mode="bilinear")
    want = layer.o_proj(out + convolved(values.permute(0, 2, 3, 1), layer).flatten(1, 2))
    torch.testing.assert_close(layer(x), want, atol=1e-11, rtol=1e-11)


def test_bare_it_does_not_know_places_within_a_cell():
    layer, x = made(16, 2, (6, 6), agents=4, depthwise=False, position=False), normal(2, 36, 16)
    places = torch.arange(36).view(6, 6)
    places[:3, :3] = places[:3, :3].flatten()[torch.tensor([4, 2, 8, 0, 7, 1, 3, 6, 5])].view(3, 3)
    order = places.flatten()
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-12, rtol=0)
    other = made(16, 2, (6, 6), agents=9, depthwise=False, position=False)
    assert (other(x[:, order]) - other(x)[:, order]).abs().max() > 1e-3
    assert other.dwc is None
    assert other.position is None


def test_dropout_in_train_mode_only():
    layer, x = made(16, 2, (6, 6), agents=4, dropout=0.5), normal(1, 36, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_errors_name_the_argument():
    for arguments, says in (
        ({"heads": 3}, "dim must be a multiple of heads, got 16 and 3"),
        ({"agents": 8}, "agents must be a square number, got 8"),
        ({"reduction": 0}, "reduction must be an int >= 1, got 0"),
        ({"reduction": 2, "class_token": True}, "class_token needs reduction=1, got 2"),
        ({"resolution": (7, 0)}, "resolution must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=says):
            AgentAttention2d(16, **{"heads": 2, "resolution": (7, 7), **arguments})
    layer = AgentAttention2d(16, 2, (7, 7), class_token=True)
    with pytest.raises(
        ValueError, match=r"x must be \(B, 50, C\) for resolution \(7, 7\), got \(1, 49, 16\)"
    ):
        layer(torch.zeros(1, 49, 16))


def test_the_entry_counts_what_the_layer_adds_to_plain_attention():
    c, heads, n, (h, w) = 24, 4, 9, (8, 6)
    added = heads * n * (98 + 2 * (h + w)) + 10 * c
    layer = AgentAttention2d(c, heads, (h, w), agents=n)
    bare = AgentAttention2d(c, heads, (h, w), agents=n, depthwise=False, position=False)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(bare) == 4 * c * c + c
    assert count(layer) - count(bare) == added
