"""DHSA's boundary predictor against one made of torch's own modules, window by window; targets against a full map."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.layers import BoundaryPredictor, boundary_loss, boundary_targets
from foveate.selectors import DHSA, dhsa_attention

module = import_module("foveate.layers.boundary")


def oracle_logit(predictor: BoundaryPredictor, x: torch.Tensor, t: int) -> torch.Tensor:
    """Logit after key t of keys x (N, C)."""
    n, c = x.shape
    w = predictor.window
    if t < w - 1 or t + w >= n:
        return x.new_tensor(-100.0)
    window = x[t - w + 1 : t + w + 1]
    heads = nn.MultiheadAttention(c, predictor.heads, batch_first=True).to(x)
    heads.load_state_dict(
        {
            "in_proj_weight": predictor.project.weight,
            "in_proj_bias": predictor.project.bias,
            "out_proj.weight": predictor.out.weight,
            "out_proj.bias": predictor.out.bias,
        }
    )
    u = predictor.norm(heads(window[None], window[None], window[None], need_weights=False)[0][0])
    left, right = u[:w].mean(0), u[w:].mean(0)
    alike = left @ right / (left.norm() * right.norm())
    features = torch.cat([left, right, (left - right).abs(), left * right, alike[None]])
    return predictor.score(features)[0]


def noisy(channels: int, **settings) -> BoundaryPredictor:
    torch.manual_seed(0)
    predictor = BoundaryPredictor(channels, **settings).double()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    return predictor


@pytest.mark.parametrize(("n", "window"), [(23, 4), (8, 4), (7, 4), (1, 2), (11, 1)])
def test_logits_are_those_of_single_windows(n, window, monkeypatch):
    predictor = noisy(12, window=window, heads=3, hidden=7)
    x = torch.randn(2, n, 12, dtype=torch.float64)
    want = torch.stack([torch.stack([oracle_logit(predictor, row, t) for t in range(n)]) for row in x])
    torch.testing.assert_close(predictor(x.transpose(1, 2)), want, atol=1e-10, rtol=0)
    monkeypatch.setattr(module, "CHUNK", 1)
    torch.testing.assert_close(predictor(x.transpose(1, 2)), want, atol=1e-10, rtol=0)


def test_every_parameter_and_the_keys_get_a_gradient():
    predictor = noisy(8, heads=2, hidden=6)
    x = torch.randn(1, 8, 30, dtype=torch.float64, requires_grad=True)
    ratio = torch.rand(1, 30, dtype=torch.float64) * 4 + 1
    boundary_loss(predictor(x), ratio).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# --------------------------------------------------------------------------------------------- targets
def oracle_ratio(q, k, w, future=None):
    """q (H, N, D), k (Hkv, N, D): the whole map, then the sums one by one."""
    heads, n, dim = q.shape
    k = k.repeat_interleave(heads // len(k), 0)
    logits = q @ k.mT * dim**-0.5
    a = torch.softmax(logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf), -1).mean(0)
    ratio = torch.zeros(n, dtype=torch.float64)
    for t in range(2 * w - 1, n - 2 * w):
        rows = a[t + w : n if future is None else t + w + future]
        past, later = rows[:, t - w + 1 : t + 1].sum(), rows[:, t + 1 : t + w + 1].sum()
        ratio[t] = (max(past, later) + 1e-6) / (min(past, later) + 1e-6)
    return ratio


@pytest.mark.parametrize(
    ("n", "window", "future"), [(61, 4, None), (61, 4, 9), (40, 2, 1), (37, 3, 100), (15, 4, None)]
)
def test_targets_are_those_of_the_full_map(n, window, future, monkeypatch):
    g = torch.Generator().manual_seed(n)
    q = torch.randn(2, 4, n, 8, generator=g, dtype=torch.float64) * 2
    k = torch.randn(2, 2, n, 8, generator=g, dtype=torch.float64)
    want = torch.stack([oracle_ratio(q[b], k[b], window, future) for b in range(2)])
    assert (want > 0).any() == (n > 15)
    for chunk in (1 << 24, 2 * 4 * n * 7, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        found = boundary_targets(q, k, window=window, future=future)
        torch.testing.assert_close(found, want, atol=1e-7, rtol=1e-9)


def test_targets_never_hold_the_map(monkeypatch):
    seen = []
    real = torch.softmax
    monkeypatch.setattr(module, "CHUNK", 4 * 500 * 20)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: seen.append(x.numel()) or real(x, dim))
    boundary_targets(torch.randn(1, 4, 500, 4), torch.randn(1, 2, 500, 4))
    assert len(seen) == 25
    assert max(seen) <= 4 * 500 * 20


def segments(lengths, dim=8, seed=1):
    """Keys that are constant within segments, and queries that like some directions more than others."""
    g = torch.Generator().manual_seed(seed)
    looks = F.normalize(torch.randn(len(lengths), dim, generator=g), dim=-1)
    k = torch.cat([look.expand(n, dim) for look, n in zip(looks, lengths, strict=True)])
    liked = torch.zeros(dim)
    for i, look in enumerate(looks):
        liked += (8.0 if i % 2 else -8.0) * look
    q = liked.expand(len(k), dim) + 0.1 * torch.randn(len(k), dim, generator=g)
    return q[None, None], k[None, None]


def test_planted_segments_peak_at_their_borders():
    lengths = (30, 17, 41, 12, 25)
    q, k = segments(lengths)
    ratio = boundary_targets(q, k)[0]
    borders = [sum(lengths[: i + 1]) - 1 for i in range(4)]  # the last key before each
    peaks = [t for t in range(8, len(ratio) - 8) if ratio[t] == ratio[t - 4 : t + 5].max() and ratio[t] > 2]
    assert peaks == borders
    label = torch.sigmoid(2 * (ratio.clamp_min(1).log() - math.log(2)))
    assert (label[borders] > 0.5).all()
    inside = [t for t in range(8, len(ratio) - 8) if all(abs(t - b) >= 4 for b in borders)]
    assert (label[inside] < 0.5).all()


def two_looks(lengths, g):
    """Keys of two looks in turns, of which queries like the second; other keys scatter around them."""
    which = torch.repeat_interleave(torch.arange(len(lengths)) % 2, torch.tensor(lengths))
    k = F.one_hot(which, 8).float() * 2 + 0.1 * torch.randn(len(which), 8, generator=g)
    q = torch.zeros(len(which), 8)
    q[:, 1] = 3
    return q[None, None], k[None, None]


def test_a_trained_predictor_finds_planted_borders_and_cuts_there():
    torch.manual_seed(0)
    predictor, g = BoundaryPredictor(8, heads=2, hidden=32), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=3e-3)
    for _ in range(50):
        q, k = two_looks(torch.randint(12, 40, (6,), generator=g).tolist(), g)
        loss = boundary_loss(predictor(k[:, 0].mT), boundary_targets(q, k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    q, k = two_looks([33, 20, 47, 15, 29, 40], g)
    cfg = DHSA(block=16, budget=64, local=16, sink=4, predictor=predictor, theta=0.0, instruction=0)
    assert cfg.boundaries(k)[0].tolist() == [0, 33, 53, 100, 115, 144, 184]
    assert dhsa_attention(q, k, k, cfg).shape == q.shape


# ------------------------------------------------------------------------------------------------ loss
@pytest.mark.parametrize("hard", [False, True])
def test_the_loss_is_the_formulas(hard):
    g = torch.Generator().manual_seed(3)
    logits, ratio = torch.randn(2, 25, generator=g).double(), torch.rand(2, 25, generator=g).double() * 5
    want = []
    for z, r in zip(logits[:, 7:17].flatten().tolist(), ratio[:, 7:17].flatten().tolist(), strict=True):
        y = 1 / (1 + math.exp(-2 * (math.log(max(r, 1)) - math.log(2))))
        y = float(y >= 0.5) if hard else y
        p = 1 / (1 + math.exp(-z))
        weight = (1 - (p * y + (1 - p) * (1 - y))) ** 2
        want.append(weight * (-1.3 * y * math.log(p) - (1 - y) * math.log(1 - p)))
    assert float(boundary_loss(logits, ratio, hard=hard)) == pytest.approx(sum(want) / len(want), rel=1e-9)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="heads must divide channels = 12, got 8"):
        BoundaryPredictor(12)
    with pytest.raises(ValueError, match="keys must be a tensor \\(batch, 16, length\\), got \\(1, 9, 16\\)"):
        BoundaryPredictor(16)(torch.zeros(1, 9, 16))
    q = torch.zeros(1, 3, 9, 4)
    with pytest.raises(ValueError, match="must fit"):
        boundary_targets(q, torch.zeros(1, 3, 8, 4))
    with pytest.raises(ValueError, match="multiple of those of k, got 3 and 2"):
        boundary_targets(q, torch.zeros(1, 2, 9, 4))
    with pytest.raises(ValueError, match="future must be an int >= 1, got 0"):
        boundary_targets(q, q, future=0)
    with pytest.raises(ValueError, match="must be \\(B, N\\) both"):
        boundary_loss(torch.zeros(1, 9), torch.zeros(1, 8))
    with pytest.raises(ValueError, match="no position is 8 from both ends of 15"):
        boundary_loss(torch.zeros(1, 15), torch.zeros(1, 15))
