"""HyperAttention against a pair-by-pair writing of the method in float64, and its invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.composite import HyperAttention, causal_by_halves, halves
from foveate.composite import hyperattention as module
from foveate.composite.halves import partial
from foveate.composite.hyperattention import by_value_norm, gray_rank, hash_codes, sorted_attention


def tensors(batch, heads, kv_heads, n, m, dim=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, dim))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def exact(q, k, v, causal=False):
    return fv.attention(q, k, v, is_causal=causal, return_lse=True)


# ------------------------------------------------------------------------------------------------ the oracle
def oracle_code(x, projections):
    """Place of the bucket in the list gray(0), gray(1), ..., found by walking it."""
    bucket = sum(1 << b for b in range(projections.shape[1]) if float((x * projections[:, b]).sum()) > 0)
    return next(i for i in range(1 << projections.shape[1]) if i ^ (i >> 1) == bucket)


def oracle(q, k, v, projections, block, positions, weight, scale):
    """One head: q (N, D), k, v (M, D), positions (m,); weight(j) of the sampled key with sorted place j."""
    n, m = len(q), len(k)
    q_order = sorted(range(n), key=lambda i: oracle_code(q[i], projections))  # stable
    k_order = sorted(range(m), key=lambda j: oracle_code(k[j], projections))
    out, lse = torch.zeros(n, v.shape[1], dtype=v.dtype), torch.zeros(n, dtype=v.dtype)
    for place, i in enumerate(q_order):
        mine = (place * m // n) // block
        total, mixed = 0.0, torch.zeros(v.shape[1], dtype=v.dtype)
        for at, times in [(a, 1.0) for a in range(m) if a // block == mine] + [
            (a, weight(a)) for a in positions if a // block != mine
        ]:
            e = math.exp(scale * float(q[i] @ k[k_order[at]])) * times
            total, mixed = total + e, mixed + e * v[k_order[at]]
        out[i], lse[i] = mixed / total, math.log(total)
    return out, lse


@pytest.mark.parametrize(
    ("n", "m", "block", "samples", "kv_heads"),
    [(37, 37, 8, 5, 2), (67, 67, 16, 70, 1), (131, 131, 64, 7, 2), (41, 97, 13, 11, 1), (89, 31, 7, 3, 2)],
)
def test_every_head_is_what_the_method_says(monkeypatch, n, m, block, samples, kv_heads):
    """Prime lengths, ragged blocks, grouped heads, other numbers of keys than queries."""
    q, k, v = tensors(2, 2, kv_heads, n, m)
    drawn = []

    def listen(*arguments):
        drawn.append(arguments[6])
        return sorted_attention(*arguments)

    monkeypatch.setattr(module, "sorted_attention", listen)
    hyper = HyperAttention(block=block, samples=samples, n_proj=3, min_seq_len=1, seed=5)
    out, lse = hyper(q, k, v, scale=0.7, return_lse=True)
    projections = torch.randn(8, 3, generator=torch.Generator().manual_seed(5)).double()
    (positions,) = drawn
    assert positions.shape == (1, 2, samples)
    for b in range(2):
        for h in range(2):
            g = h * kv_heads // 2
            want = oracle(
                q[b, h], k[b, g], v[b, g], projections, block, positions[0, h].tolist(), lambda _: m / samples, 0.7
            )  # fmt: skip
            torch.testing.assert_close(out[b, h], want[0], atol=1e-10, rtol=0)
            torch.testing.assert_close(lse[b, h], want[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("block", [0, 64, 100])
def test_float32_and_bfloat16_run_the_same_on_the_native_engine(block):
    q, k, v = tensors(1, 4, 2, 331, 331, 16, dtype=torch.bfloat16)
    hyper = HyperAttention(block=block, samples=64, n_proj=4, min_seq_len=16)
    want = hyper(q.double(), k.double(), v.double())
    torch.testing.assert_close(hyper(q.float(), k.float(), v.float()).double(), want, atol=1e-5, rtol=0)
    low = hyper(q, k, v)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, atol=0.05, rtol=0.05)


# ------------------------------------------------------------------------------------------------------ hash
@pytest.mark.parametrize("r", range(1, 9))
def test_buckets_next_to_each_other_differ_in_one_bit(r):
    bins = torch.arange(2**r)
    rank = gray_rank(bins)
    assert torch.equal(rank.sort().values, bins)  # a bijection
    order = rank.argsort()
    steps = order[1:] ^ order[:-1]
    assert all(int(s).bit_count() == 1 for s in steps)
    released = (bins ^ (bins >> 1)).argsort()  # the release sorts by the encoding
    apart = [int(s).bit_count() for s in released[1:] ^ released[:-1]]
    assert (max(apart) > 1) == (r >= 3)


def test_hash_reads_signs_only_and_knows_both_orders():
    g = torch.Generator().manual_seed(0)
    x, projections = torch.randn(3, 50, 8, generator=g), torch.randn(8, 6, generator=g)
    codes = hash_codes(x, projections)
    for row, code in zip(x.double().flatten(0, 1), codes.flatten().tolist(), strict=True):
        assert code == oracle_code(row, projections.double())
    assert torch.equal(hash_codes(x * 1e-3, projections), codes)
    assert torch.equal(hash_codes(x * 1e3, projections), codes)
    bins = ((x @ projections > 0) * 2 ** torch.arange(6)).sum(-1)
    assert torch.equal(hash_codes(x, projections, "release").long(), bins ^ (bins >> 1))
    assert hash_codes(x, projections[:, :0]).unique().tolist() == [0]


# ---------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("limit", [{"min_seq_len": 131}, {"block": 131, "min_seq_len": 16}])
def test_short_sequences_and_wide_blocks_are_exact(causal, limit):
    q, k, v = tensors(2, 4, 2, 131, 131)
    out, lse = HyperAttention(samples=8, is_causal=causal, **limit)(q, k, v, return_lse=True)
    want = exact(q, k, v, causal)
    torch.testing.assert_close(out, want[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(lse, want[1], atol=1e-10, rtol=0)


def test_samples_that_enumerate_all_keys_make_it_exact():
    q, k, v = tensors(1, 4, 2, 61, 101)
    g = torch.Generator().manual_seed(1)
    q_order = torch.rand(1, 4, 61, generator=g).argsort(-1)
    k_order = torch.rand(1, 2, 101, generator=g).argsort(-1)
    every = torch.rand(1, 4, 101, generator=g).argsort(-1)
    out, lse = sorted_attention(q, k, v, q_order, k_order, 16, every, 0.0)
    torch.testing.assert_close((out, lse), exact(q, k, v), atol=1e-10, rtol=0)
    wrong = sorted_attention(q, k, v, q_order, k_order, 16, every[..., 1:], 0.0)[0]
    assert (wrong - out).abs().max() > 1e-3


def test_row_sums_are_unbiased_and_other_weights_are_not():
    """4,000 draws of 8 of 64 keys as heads of one call; queries alike, so that a row is a mean over draws."""
    draws, n, block, m = 4_000, 64, 16, 8
    q, k, v = tensors(1, 1, 1, n, n, 4, seed=2)
    q = q[:, :, :4].expand(1, draws, 4, 4)
    in_order = torch.arange(4).expand(1, draws, 4), torch.arange(n).expand(1, 1, n)
    positions = torch.randint(n, (1, draws, m), generator=torch.Generator().manual_seed(3))
    _, lse = sorted_attention(q, k, v, *in_order, block, positions, math.log(n / m))
    truth = exact(q[:, :1], k, v)[1].exp()[0, 0]  # (4,)

    def ratio(sums):  # (draws, 4) -> how many standard errors each row's mean is off
        x = sums / truth
        return (x.mean(0) - 1) / (x.std(0) / draws**0.5), x.mean(0)

    off, _ = ratio(lse[0].exp())
    assert off.abs().max() < 4

    e = (q[0, 0] @ k[0, 0].T * 0.5).exp()  # (4, 64)
    own = torch.stack([e[i, i * 16 : i * 16 + 16].sum() for i in range(4)])
    masked = positions[0].unsqueeze(1) // block == torch.arange(4)[:, None]  # (draws, 4, m)
    terms = e[torch.arange(4)[:, None], positions[0].unsqueeze(1)]
    for biased in (
        own + n / m * terms.sum(-1),  # samples in the own block counted as well
        own + n * (terms * ~masked).sum(-1) / (m - masked.sum(-1)).clamp_min(1),  # weight n / (m - masked)
    ):
        off, mean = ratio(biased)
        assert off.abs().min() > 10
        assert mean.min() > 1.05


# ------------------------------------------------------------------------------------------------- causality
CAUSAL = HyperAttention(block=8, samples=6, n_proj=3, min_seq_len=13, is_causal=True)


@pytest.mark.parametrize("n", [1, 2, 3, 13, 26, 27, 131, 500])
@pytest.mark.parametrize("leaf", [1, 3, 13])
def test_halving_with_exact_calls_is_causal_attention(n, leaf):
    q, k, v = tensors(2, 4, 2, n, n)
    found = causal_by_halves(q, k, v, exact, leaf=leaf)
    torch.testing.assert_close(found, exact(q, k, v, True), atol=1e-10, rtol=0)


def test_halving_asks_for_every_pair_of_halves_once():
    q, k, v = tensors(1, 4, 2, 110, 110)
    asked = []

    def estimate(q, k, v):
        asked.append((tuple(q.shape), tuple(k.shape)))
        return exact(q, k, v)

    causal_by_halves(q, k, v, estimate, leaf=13)  # 8 pieces of 13, and 6 tokens behind
    assert asked == [
        ((1, 16, 13, 8), (1, 8, 13, 8)),
        ((1, 8, 26, 8), (1, 4, 26, 8)),
        ((1, 4, 52, 8), (1, 2, 52, 8)),
    ]


@pytest.mark.parametrize("sampling", ["uniform", "value_norm"])
@pytest.mark.parametrize("t", [5, 60, 100, 129])
def test_later_keys_and_values_never_reach_an_earlier_token(sampling, t):
    q, k, v = tensors(1, 4, 2, 131, 131)
    hyper = HyperAttention(**{**vars(CAUSAL), "sampling": sampling})
    base = hyper(q, k, v)
    k2, v2 = (torch.cat([x[:, :, : t + 1], 9 - x[:, :, t + 1 :]], 2) for x in (k, v))
    changed = hyper(q, k2, v2)
    assert torch.equal(changed[:, :, : t + 1], base[:, :, : t + 1])
    assert not torch.equal(changed, base)


def test_later_queries_may_reach_an_earlier_token_of_their_half():
    """The sort of a second half is shared: another last query moves the others to other blocks."""
    q, k, v = tensors(1, 4, 2, 131, 131)
    base = CAUSAL(q, k, v)
    other = CAUSAL(torch.cat([q[:, :, :100], -q[:, :, 100:]], 2), k, v)
    differs = (base != other).any(-1).any(1).any(0)
    assert differs[64:100].any()
    assert not differs[:64].any()  # the first half of 128 is sorted by itself


def test_scaling_all_queries_leaves_the_permutation():
    q, _, _ = tensors(1, 2, 2, 200, 200)
    projections = torch.randn(8, 7, generator=torch.Generator().manual_seed(0))
    orders = [torch.sort(hash_codes(a * q, projections), stable=True).indices for a in (1.0, 1e-4, 37.0)]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


# ------------------------------------------------------------------------------------------------ value norms
def test_keys_are_drawn_by_their_values_norms():
    g = torch.Generator().manual_seed(0)
    v = torch.randn(1, 2, 11, 3, generator=g, dtype=torch.float64)
    v[0, 1, 4] = 0.0
    draws = torch.rand(1, 4, 40_000, generator=g, dtype=torch.float64)
    positions, log_weights = by_value_norm(v, draws)
    assert positions.shape == log_weights.shape == (1, 4, 40_000)
    for head in range(4):
        norms = v[0, head // 2].square().sum(-1)
        p = norms / norms.sum()
        share = torch.bincount(positions[0, head], minlength=11) / 40_000
        assert (share - p).abs().max() < 4 * (0.25 / 40_000) ** 0.5
        torch.testing.assert_close(log_weights[0, head], -(40_000 * p[positions[0, head]]).log())
    assert not (positions[0, 2:] == 4).any()


def test_value_norm_weights_are_used_pair_by_pair():
    q, k, v = tensors(1, 2, 1, 41, 53)
    hyper = HyperAttention(block=8, samples=9, n_proj=2, min_seq_len=0, sampling="value_norm", seed=3)
    out, lse = hyper(q, k, v, return_lse=True)
    g = torch.Generator().manual_seed(3)
    projections = torch.randn(8, 2, generator=g).double()
    draws = torch.rand(1, 2, 9, generator=g, dtype=torch.float64)
    order = sorted(range(53), key=lambda j: oracle_code(k[0, 0, j], projections))
    mass = v[0, 0, order].square().sum(-1)
    p = (mass / mass.sum()).tolist()
    for h in range(2):
        positions = [int(np.searchsorted(np.cumsum(p), float(u))) for u in draws[0, h]]
        want = oracle(q[0, h], k[0, 0], v[0, 0], projections, 8, positions, lambda j: 1 / (9 * p[j]), 8**-0.5)
        torch.testing.assert_close(out[0, h], want[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(lse[0, h], want[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("factor", [0.0, 1e30])
def test_value_norms_of_any_size(factor):
    q, k, v = tensors(1, 2, 1, 60, 60, dtype=torch.float32)
    hyper = HyperAttention(block=8, samples=9, min_seq_len=0, sampling="value_norm")
    out, lse = hyper(q, k, v * factor, return_lse=True)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


# ------------------------------------------------------------------------------------------------- the object
def test_grouped_heads_batches_and_strides():
    q, k, v = tensors(3, 4, 2, 131, 131)
    for hyper in (CAUSAL, HyperAttention(block=16, samples=8, n_proj=3, min_seq_len=1)):
        base = hyper(q, k, v)
        repeated = hyper(q, *(t.repeat_interleave(2, 1) for t in (k, v)))
        torch.testing.assert_close(repeated, base, atol=1e-12, rtol=0)
        for b in range(3):
            alone = hyper(*(t[b : b + 1] for t in (q, k, v)))
            torch.testing.assert_close(alone, base[b : b + 1], atol=1e-12, rtol=0)
        strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        torch.testing.assert_close(hyper(*strided), base, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampling", ["uniform", "value_norm"])
def test_gradients_of_the_native_engine_are_those_of_the_reference(sampling):
    hyper = HyperAttention(**{**vars(CAUSAL), "sampling": sampling})
    grads = []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in tensors(1, 4, 2, 131, 131, dtype=torch.float32)]
        out, lse = hyper(*leaves, return_lse=True)
        grads.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5 * float(want.abs().max()), rtol=0)


def test_the_seed_decides():
    q, k, v = tensors(1, 2, 2, 200, 200)
    make = lambda **other: HyperAttention(**{"block": 16, "samples": 8, "min_seq_len": 1, **other})(q, k, v)  # noqa: E731
    before = torch.get_rng_state()
    assert torch.equal(make(), make())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(make(), make(seed=1))
    assert not torch.equal(make(), make(n_proj=0))
    assert not torch.equal(make(), make(code_order="release"))


def test_parts_can_be_left_out():
    q, k, v = tensors(1, 1, 1, 64, 64)
    local = HyperAttention(block=16, samples=0, n_proj=0, min_seq_len=0)(q, k, v)
    blocks = torch.arange(64)[:, None] // 16 == torch.arange(64) // 16
    torch.testing.assert_close(local, fv.attention(q, k, v, blocks), atol=1e-12, rtol=0)
    _, lse = HyperAttention(block=0, samples=4096, min_seq_len=0)(q, k, v, return_lse=True)
    assert (lse - exact(q, k, v)[1]).abs().max() < 0.2


def test_long_sequences_need_no_square():
    """65,536 x 65,536 logits alone would be 16 GiB."""
    q, k, v = tensors(1, 1, 1, 65_536, 65_536, dtype=torch.float32)
    out = HyperAttention(min_seq_len=2048, is_causal=True)(q, k, v)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:, :, :2048], exact(*(t[:, :, :2048] for t in (q, k, v)), True)[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": -1}, "HyperAttention.block must be an int >= 0, got -1"),
        ({"samples": 2.0}, "HyperAttention.samples must be an int >= 0, got 2.0"),
        ({"n_proj": 25}, "HyperAttention.n_proj must be an int from 0 to 24, got 25"),
        ({"min_seq_len": -1}, "HyperAttention.min_seq_len"),
        ({"seed": True}, "HyperAttention.seed"),
        ({"block": 0, "samples": 0}, "block and samples are both 0"),
        ({"is_causal": 1}, "HyperAttention.is_causal must be a bool, got 1"),
        ({"sampling": "norm"}, "HyperAttention.sampling must be one of uniform, value_norm, got 'norm'"),
        ({"code_order": "gray"}, "HyperAttention.code_order must be one of gray_rank, release, got 'gray'"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        HyperAttention(**settings)


def test_inputs_are_checked():
    q, k, v = tensors(1, 4, 2, 30, 30)
    with pytest.raises(ValueError, match="q must be a tensor"):
        CAUSAL(q[0], k, v)
    with pytest.raises(ValueError, match="none 0; got"):
        CAUSAL(q[:, :, :0], k, v)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        CAUSAL(q[:, :3], k, v)
    with pytest.raises(ValueError, match="k and v must share batch, heads and length"):
        CAUSAL(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match="got 29 queries and 30 keys"):
        CAUSAL(q[:, :, 1:], k, v)
    with pytest.raises(ValueError, match="leaf must be a positive int"):
        causal_by_halves(q, k, v, exact, leaf=0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        HyperAttention(blocks=64)


@pytest.mark.parametrize(
    "hyper",
    [
        HyperAttention(block=16, samples=9, min_seq_len=20),
        HyperAttention(block=0, samples=9, min_seq_len=20),
        HyperAttention(block=16, samples=0, min_seq_len=131),
        HyperAttention(block=200, samples=9, min_seq_len=20),
        CAUSAL,
        HyperAttention(block=0, samples=7, min_seq_len=10, is_causal=True),
        HyperAttention(block=16, samples=0, min_seq_len=10, is_causal=True),
        HyperAttention(min_seq_len=131, is_causal=True),
    ],
    ids=str,
)
def test_pairs_are_those_of_the_calls(monkeypatch, hyper):
    """131 tokens; masked samples are computed, so a layout of samples counts whole."""
    counted = 0

    def listen(q, k, v, *, who=None, is_causal=False, **rest):
        nonlocal counted
        n, m = q.shape[2], k.shape[2]
        if isinstance(who, fv.patterns.Documents):
            counted += who.layout(n, m).area * q.shape[1]
        else:
            counted += q.shape[1] * sum(min(m, m - n + i + 1) if is_causal else m for i in range(n))
        return partial(q, k, v, who=who, is_causal=is_causal, **rest)

    for where in (module, halves):
        monkeypatch.setattr(where, "partial", listen)
    q, k, v = tensors(1, 2, 1, 131, 131)
    hyper(q, k, v)
    assert counted == 2 * hyper.pairs(131)
