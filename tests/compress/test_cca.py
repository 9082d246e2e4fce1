"""CCA against a loop over tokens, and what must hold of its groups, its window and its cache."""

from __future__ import annotations

import math

import pytest
import torch

import foveate as fv
from foveate.compress import CCAAttention, CCACache, cca_attention, pool_core
from foveate.compress.cca import CoreTokens, CoreWindow
from foveate.core.rotary import Rotary


def tensors(n, batch=1, heads=4, kv_heads=2, dim=8, dv=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dv))
    return tuple(torch.randn(batch, h, n, d, generator=g, dtype=torch.float64).to(dtype) for h, d in shapes)


def turned(x, position, base=10_000.0):
    """One vector by its position, channel pair by channel pair."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        t = position * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(t) - x[i + half] * math.sin(t)
        out[i + half] = x[i] * math.sin(t) + x[i + half] * math.cos(t)
    return out


def oracle(q, k, v, g, s, *, rope=False, pool_rope="pre", positions=None, pool="evaluator"):
    """One batch row, token by token, positions from 1: q (H, N, D), k (Hkv, N, D), v (Hkv, N, Dv)."""
    heads, n, dim = q.shape
    per = heads // len(k)
    where = list(range(n)) if positions is None else positions
    spin = (lambda x, p: turned(x, where[p - 1])) if rope else (lambda x, p: x)
    out = torch.zeros(heads, n, v.shape[2], dtype=q.dtype)
    for kv in range(len(k)):
        mine = range(kv * per, (kv + 1) * per)
        cores = []
        for m in range(1, n // g + 1):
            tokens = range((m - 1) * g + 1, m * g + 1)
            weights = torch.zeros(g, dtype=q.dtype)
            for h in mine:
                query = spin(q[h, m * g - 1], m * g)
                logits = torch.stack([query @ spin(k[kv, j - 1], j) for j in tokens]) / math.sqrt(dim)
                weights += torch.softmax(logits, 0) / per
            if pool == "mean":
                weights = torch.full_like(weights, 1 / g)
            if pool_rope == "pre":
                key = spin(sum(w * k[kv, j - 1] for w, j in zip(weights, tokens, strict=True)), m * g)
            else:
                key = sum(w * spin(k[kv, j - 1], j) for w, j in zip(weights, tokens, strict=True))
            cores.append((key, sum(w * v[kv, j - 1] for w, j in zip(weights, tokens, strict=True))))
        for h in mine:
            for t in range(1, n + 1):
                seen = max(0, math.floor((t - s) / g))
                read = cores[:seen] + [
                    (spin(k[kv, j - 1], j), v[kv, j - 1]) for j in range(seen * g + 1, t + 1)
                ]
                logits = torch.stack([spin(q[h, t - 1], t) @ key for key, _ in read]) / math.sqrt(dim)
                out[h, t - 1] = torch.softmax(logits, 0) @ torch.stack([value for _, value in read])
    return out


# ------------------------------------------------------------------------------------------ the definition
@pytest.mark.parametrize(
    ("n", "g", "s"), [(1, 3, 2), (13, 3, 2), (31, 4, 7), (29, 2, 1), (23, 5, 3), (11, 20, 2)]
)
@pytest.mark.parametrize(
    "options", [{}, {"rope": True}, {"rope": True, "pool_rope": "post"}, {"pool": "mean"}]
)
def test_equals_a_loop_over_tokens(n, g, s, options):
    q, k, v = tensors(n, seed=n)
    rope = Rotary() if options.get("rope") else None
    rest = {name: x for name, x in options.items() if name != "rope"}
    got = cca_attention(q, k, v, group=g, local=s, rope=rope, **rest)
    torch.testing.assert_close(got[0], oracle(q[0], k[0], v[0], g, s, **options), atol=1e-12, rtol=0)


def test_given_positions_and_batch_rows():
    q, k, v = tensors(17, batch=2)
    ids = torch.stack([torch.arange(17) * 3, torch.arange(17) - 5])
    got = cca_attention(q, k, v, group=4, local=5, rope=Rotary(), position_ids=ids)
    for b in range(2):
        want = oracle(q[b], k[b], v[b], 4, 5, rope=True, positions=ids[b].tolist())
        torch.testing.assert_close(got[b], want, atol=1e-12, rtol=0)


def test_non_contiguous_inputs_bfloat16_and_extreme_logits():
    q, k, v = tensors(37)
    want = cca_attention(q, k, v, group=4, local=5)
    turned_round = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(cca_attention(*turned_round, group=4, local=5), want, atol=1e-13, rtol=0)
    low = cca_attention(*(x.bfloat16() for x in (q, k, v)), group=4, local=5)
    assert low.dtype == torch.bfloat16
    assert (low.double() - want).abs().max() < 0.05
    assert cca_attention(q * 1e3, k * 1e3, v, group=4, local=5).isfinite().all()


# ------------------------------------------------------------------------------------------ invariants
@pytest.mark.parametrize(("group", "local"), [(5, 61), (5, 100), (1, 1), (1, 7), (61, 1), (64, 3)])
@pytest.mark.parametrize("rope", [None, Rotary()])
def test_limits_are_causal_attention(group, local, rope):
    """A window over all, groups of one, and groups longer than what lies behind the window."""
    q, k, v = tensors(61)
    place = torch.arange(61)
    turn = (lambda x: x) if rope is None else (lambda x: rope(x, place))
    want = fv.attention(turn(q), turn(k), v, is_causal=True)
    got = cca_attention(q, k, v, group=group, local=local, rope=rope)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("g", "s"), [(1, 1), (3, 2), (2, 7), (16, 5), (7, 64), (5, 1), (100, 3)])
def test_cores_and_window_are_all_of_the_past_without_overlap(g, s):
    n = 149
    core = CoreTokens(g, s).layout(n, max(1, n // g)).to_dense()[0, 0]
    window = CoreWindow(g, s).layout(n).to_dense()[0, 0]
    for t in range(1, n + 1):
        seen = int(core[t - 1].sum())
        assert core[t - 1, :seen].all()
        assert seen == max(0, math.floor((t - s) / g))
        tokens = list(range(1, seen * g + 1)) + (window[t - 1].nonzero()[:, 0] + 1).tolist()
        assert tokens == list(range(1, t + 1))
        if t >= s:
            assert int(window[t - 1].sum()) == s + (t - s) % g
            assert int(window[t - 1].sum()) <= s + g - 1


@pytest.mark.parametrize(
    ("g", "s", "shift"), [(3, 5, 0), (3, 5, 12), (16, 70, 32), (7, 2, 21), (100, 5, 210)]
)
def test_layouts_are_the_sets(g, s, shift):
    """Tile by tile they are what `contains` says, also when the first tokens are gone."""
    ours, core = CoreWindow(g, s, shift), CoreTokens(g, s, shift)
    window, far = ours.layout(200, 211).to_dense()[0, 0], core.layout(200, 90).to_dense()[0, 0]
    for q in range(200):
        t = q + 11 + shift + 1  # position, from 1, of a query bottom-right aligned with keys from `shift` on
        low = max(0, math.floor((t - s) / g)) * g - shift
        assert window[q].nonzero()[:, 0].tolist() == list(range(max(0, low), q + 12))
        seen = max(0, math.floor((q + shift + 1 - s) / g))
        assert far[q].nonzero()[:, 0].tolist() == list(range(min(90, seen)))


def test_equal_keys_and_values_of_a_group_are_its_core():
    q, k, v = tensors(20)
    k, v = (x[:, :, ::5].repeat_interleave(5, 2) for x in (k, v))
    k_core, v_core, weights = pool_core(q[:, :, 4::5], k, v, 5)
    torch.testing.assert_close(k_core, k[:, :, ::5])
    torch.testing.assert_close(v_core, v[:, :, ::5])
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 4, dtype=torch.float64))


def test_later_tokens_change_nothing():
    """Not even those of the token's own group."""
    q, k, v = tensors(43)
    want = cca_attention(q, k, v, group=7, local=4, rope=Rotary())
    for t in range(1, 43):
        other = [torch.cat([x[:, :, :t], torch.randn_like(x[:, :, t:])], 2) for x in (q, k, v)]
        got = cca_attention(*other, group=7, local=4, rope=Rotary())
        torch.testing.assert_close(got[:, :, :t], want[:, :, :t], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("n", "g", "s"), [(61, 4, 6), (47, 7, 3), (40, 5, 64), (33, 3, 1)])
@pytest.mark.parametrize("pool_rope", ["pre", "post"])
@pytest.mark.parametrize("cuts", ["tokens", "uneven"])
def test_the_cache_gives_the_parallel_form_and_stays_small(n, g, s, pool_rope, cuts):
    q, k, v = tensors(n, batch=2)
    options = {"rope": Rotary(), "pool_rope": pool_rope}
    want = cca_attention(q, k, v, group=g, local=s, **options)
    cache, parts, at = CCACache(g, s, **options), [], 0
    sizes = [1] * n if cuts == "tokens" else [11, 1, 2, 1, 9]
    for size in sizes:
        piece = [x[:, :, at : at + size] for x in (q, k, v)]
        parts.append(cache.step(*piece))
        at += size
        assert cache.length == at
        assert cache.pairs <= at // g + s + g - 1
        assert cache.open is None or cache.open.shape[2] == at % g
    torch.testing.assert_close(torch.cat(parts, 2), want[:, :, :at], atol=1e-12, rtol=0)
    assert cache.pairs == n // g + n - g * max(0, (n - s) // g) or cuts == "uneven"
    if n > 2 * s and cuts == "tokens":
        assert cache.nbytes < 8 * 2 * 2 * n * (8 + 6)


def test_memory_is_let_go():
    """What is kept does not hold on to the tensors that it was cut from."""
    q, k, v = tensors(500)
    cache = CCACache(4, 6, rope=Rotary())
    cache.append(q, k, v)
    held = [*cache.core, *cache.window, cache.open]
    assert sum(x.untyped_storage().nbytes() for x in held) == cache.nbytes
    assert cache.nbytes <= 8 * 2 * (8 + 6) * (500 // 4 + 6 + 3) + 8 * 2 * 8 * 3


def test_append_then_step():
    q, k, v = tensors(40)
    want = cca_attention(q, k, v, group=4, local=6)
    cache = CCACache(4, 6)
    cache.append(q[:, :, :33], k[:, :, :33], v[:, :, :33])
    other = cache.copy()
    got = cache.step(q[:, :, 33:], k[:, :, 33:], v[:, :, 33:])
    torch.testing.assert_close(got, want[:, :, 33:], atol=1e-12, rtol=0)
    assert (other.length, cache.length) == (33, 40)
    torch.testing.assert_close(other.step(q[:, :, 33:], k[:, :, 33:], v[:, :, 33:]), got)


# ------------------------------------------------------------------------------------------ training, engine, errors
def test_gradients():
    q, k, v = tensors(11, heads=2, kv_heads=1, dim=4, dv=3)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(
        lambda q, k, v: cca_attention(q, k, v, group=3, local=2, rope=Rotary()), leaves, fast_mode=True
    )


def test_native_engine_forward_and_gradients():
    q, k, v = tensors(300, heads=2, kv_heads=1, dtype=torch.float32)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    low = [x.clone().requires_grad_() for x in (q, k, v)]
    want = cca_attention(*wide, group=8, local=40, rope=Rotary())
    got = cca_attention(*low, group=8, local=40, rope=Rotary(), engine="native")
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (want * weight).sum().backward()
    (got * weight.float()).sum().backward()
    for a, b in zip(low, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-4, rtol=1e-4)


def test_layer_is_attention_of_its_projections():
    torch.manual_seed(0)
    layer = CCAAttention(24, heads=4, kv_heads=2, group=3, local=5).double()
    x = torch.randn(2, 29, 24, dtype=torch.float64)
    q, k, v = (p(x).view(2, 29, h, 6).transpose(1, 2) for p, h in ((layer.q, 4), (layer.k, 2), (layer.v, 2)))
    mixed = cca_attention(q, k, v, group=3, local=5, rope=Rotary())
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).reshape(2, 29, 24)))
    assert sum(p.numel() for p in layer.parameters()) == 24 * (24 + 12 + 12 + 24)


def test_errors_name_what_came():
    q, k, v = tensors(10)
    with pytest.raises(ValueError, match="group must be an int >= 1, got 0"):
        cca_attention(q, k, v, group=0)
    with pytest.raises(ValueError, match="local must be an int >= 1, got 0"):
        cca_attention(q, k, v, local=0)
    with pytest.raises(ValueError, match="pool_rope must be one of pre, post, got 'mid'"):
        cca_attention(q, k, v, pool_rope="mid")
    with pytest.raises(ValueError, match="pool must be one of evaluator, mean, got 'max'"):
        cca_attention(q, k, v, pool="max")
    with pytest.raises(TypeError, match="rope must be a function"):
        cca_attention(q, k, v, rope=3)
    with pytest.raises(ValueError, match="of the same tokens"):
        cca_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="4 query heads must be a multiple of the 3 key heads"):
        cca_attention(q, *(x[:, :1].expand(1, 3, 10, -1) for x in (k, v)))
    with pytest.raises(ValueError, match="position_ids must have shape"):
        cca_attention(q, k, v, position_ids=torch.arange(9))
    with pytest.raises(ValueError, match="q must be a tensor"):
        cca_attention(q[0], k, v)
    with pytest.raises(ValueError, match="5 keys and values per evaluator"):
        pool_core(q[:, :, :3], k, v, 5)
    cache = CCACache(2, 2)
    cache.append(q, k, v)
    with pytest.raises(ValueError, match="the cache holds keys"):
        cache.step(q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        CCAAttention(10, heads=3)
    with pytest.raises(ValueError, match="even last axis"):
        Rotary()(torch.zeros(3, 5), torch.arange(3))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_keeps_lengths_and_shows_distances(interleaved):
    rope = Rotary(100.0, interleaved=interleaved)
    x, y = tensors(2, heads=1, kv_heads=1)[0][0, 0]
    at = lambda u, p: rope(u[None], torch.tensor([p]))[0]  # noqa: E731
    assert at(x, 9).norm().item() == pytest.approx(x.norm().item())
    assert (at(x, 9) @ at(y, 4)).item() == pytest.approx((at(x, 105) @ at(y, 100)).item())
    if not interleaved:
        torch.testing.assert_close(at(x, 9), turned(x, 9, 100.0))
    else:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        torch.testing.assert_close(at(x, 9)[order], turned(x[order], 9, 100.0))
