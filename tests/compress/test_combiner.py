"""Combiner against a token-by-token writing of the paper in float64, and its invariants."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.compress import combiner_attention, region_summaries
from foveate.compress.combiner import OtherSegments


def tensors(batch=1, heads=2, kv_heads=1, n=37, dim=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim + 1))
    return [(1.5 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype) for shape in shapes]


def exact(q, k, v, causal=True):
    return fv.attention(q, k, v, is_causal=causal)


# ---------------------------------------------------------------------------------------------------- the oracle
def support(n, i, pattern="fixed", segment=1, grid=(1, 1), causal=True):
    """What query i reads: the direct tokens, and the tokens of each region."""
    allowed = range(i + 1 if causal else n)
    if pattern == "axial_col":
        columns = [[j for j in allowed if j % grid[1] == c] for c in range(grid[1])]
        return columns[i % grid[1]], [
            region for c, region in enumerate(columns) if c != i % grid[1] and region
        ]
    size = grid[1] if pattern == "axial_row" else segment
    own = i // size
    direct = [j for j in allowed if j // size == own]
    if pattern != "logsparse":
        regions = [[j for j in allowed if j // size == r] for r in range(-(-n // size)) if r != own]
        return direct, [region for region in regions if region]
    regions = []
    if causal:
        begin = 0
        for digit in reversed(range(20)):
            if own >> digit & 1:
                regions.append(list(range(begin * size, (begin + 2**digit) * size)))
                begin += 2**digit
    else:
        for digit in range(20):
            beside = (own >> digit) ^ 1
            region = [j for j in range(n) if j // size >> digit == beside]
            if region:
                regions.append(region)
    return direct, regions


def weights(q, k, s, pool="max", size_term=False, **how):
    """The implied weights of one head, q and k (N, D) -> (N, N), by loops."""
    n, each, made = len(q), s * q @ k.T, {}
    together = (lambda x: x.amax(0)) if pool == "max" else (lambda x: x.mean(0))
    w = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        direct, regions = support(n, i, **how)
        w[i, direct] = each[i, direct].exp()
        for region in regions:
            if tuple(region) not in made:
                p = (s * k[region] @ together(q[region])).exp()
                made[tuple(region)] = together(k[region]), p / p.sum()
            key, p = made[tuple(region)]
            w[i, region] = (s * q[i] @ key).exp() * (len(region) if size_term else 1) * p
        w[i] /= w[i].sum()
    return w


def implied(q, k, **how):
    """The weights that the function gives: its output for values that name their token."""
    names = torch.eye(q.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return combiner_attention(q, k, names, **how)


VARIANTS = [
    {"pattern": "fixed", "segment": 5},
    {"pattern": "fixed", "segment": 7, "causal": False},
    {"pattern": "fixed", "segment": 37, "causal": False},
    {"pattern": "logsparse"},
    {"pattern": "logsparse", "causal": False},
    {"pattern": "logsparse", "segment": 3},
    {"pattern": "logsparse", "segment": 3, "causal": False},
    {"pattern": "axial_row", "grid": (5, 8)},
    {"pattern": "axial_row", "grid": (37, 1), "causal": False},
    {"pattern": "axial_col", "grid": (5, 8)},
    {"pattern": "axial_col", "grid": (37, 1)},
    {"pattern": "axial_col", "grid": (1, 37)},
    {"pattern": "axial_col", "grid": (1, 37), "causal": False},
]


def name(how):
    return "-".join(str(x) for x in how.values())


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("size_term", [False, True])
@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_every_weight_is_the_papers(how, size_term, pool):
    q, k, _ = tensors(heads=2, kv_heads=1)
    got = implied(q, k, scale=0.6, pool=pool, size_term=size_term, **how)
    for h in range(2):
        want = weights(q[0, h], k[0, 0], 0.6, pool, size_term, **how)
        torch.testing.assert_close(got[0, h], want, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("n", "how"),
    [
        (197, {"pattern": "logsparse"}),
        (197, {"pattern": "logsparse", "causal": False}),
        (331, {"pattern": "logsparse", "segment": 5}),
        (331, {"pattern": "logsparse", "segment": 5, "causal": False}),
        (257, {"pattern": "logsparse", "segment": 70}),
        (256, {"pattern": "logsparse", "segment": 64, "causal": False}),
        (211, {"pattern": "fixed", "segment": 15}),
        (221, {"pattern": "axial_col", "grid": (13, 17), "causal": False}),
    ],
    ids=lambda x: name(x) if isinstance(x, dict) else str(x),
)
def test_more_tokens_than_a_tile(n, how):
    """Here blocks are as large as tiles of 64 queries, and larger."""
    q, k, _ = tensors(heads=1, n=n)
    for size_term in (False, True):
        want = weights(q[0, 0], k[0, 0], 0.5, size_term=size_term, **how)
        got = implied(q, k, size_term=size_term, **how)[0, 0]
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_segments_of_the_root_are_the_default():
    q, k, v = tensors(n=211)
    assert torch.equal(combiner_attention(q, k, v), combiner_attention(q, k, v, segment=15))


# ---------------------------------------------------------------------------------------------------- invariants
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        {"segment": 1},
        {"segment": 131},
        {"segment": 500},
        {"pattern": "logsparse", "segment": 131},
        {"pattern": "axial_row", "grid": (131, 1)},
        {"pattern": "axial_row", "grid": (1, 131)},
        {"pattern": "axial_col", "grid": (131, 1)},
        {"pattern": "axial_col", "grid": (1, 131)},
    ],
    ids=name,
)
def test_regions_of_one_token_and_one_segment_are_full_attention(how, causal):
    q, k, v = tensors(2, 4, 2, 131, dtype=torch.float32)
    torch.testing.assert_close(
        combiner_attention(q, k, v, causal=causal, **how), exact(q, k, v, causal), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("how", VARIANTS, ids=name)
def test_rows_sum_to_one_and_every_allowed_token_is_reached(how):
    q, k, _ = tensors(2, 2, 1)
    w = implied(q, k, **how)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]), atol=1e-12, rtol=0)
    allowed = torch.ones(37, 37).tril() > 0 if how.get("causal", True) else torch.ones(37, 37) > 0
    assert (w[..., allowed] > 0).all()
    assert (w[..., ~allowed] == 0).all()


@pytest.mark.parametrize("pattern", ["fixed", "axial_row"])
@pytest.mark.parametrize("causal", [True, False])
def test_equal_keys_of_a_region_weigh_what_they_do_with_the_size_term(pattern, causal):
    q, k, v = tensors(1, 2, 1, 35)
    k = k[:, :, ::5].repeat_interleave(5, 2)
    how = {"segment": 5} if pattern == "fixed" else {"grid": (7, 5)}
    sized = combiner_attention(q, k, v, pattern=pattern, causal=causal, size_term=True, **how)
    torch.testing.assert_close(sized, exact(q, k, v, causal), atol=1e-10, rtol=0)
    paper = combiner_attention(q, k, v, pattern=pattern, causal=causal, **how)
    for i in range(35):  # one representative per other region, with the mean of its values
        own = [j for j in range(35) if j // 5 == i // 5 and (j <= i or not causal)]
        others = [r for r in range(7) if (r < i // 5 if causal else r != i // 5)]
        keys = torch.cat([k[0, 0, own], k[0, 0, [5 * r for r in others]]])
        values = torch.cat([v[0, 0, own], torch.stack([v[0, 0, 5 * r : 5 * r + 5].mean(0) for r in others])
                            if others else v[0, 0, :0]])  # fmt: skip
        want = exact(q[:, :, i : i + 1], keys[None, None], values[None, None], False)
        torch.testing.assert_close(paper[:, :, i : i + 1], want, atol=1e-10, rtol=0)
    assert (paper - sized).abs().max() > 0.01


def test_equal_keys_everywhere_weigh_what_they_do_with_the_size_term():
    """Of any regions: all tokens have the same key."""
    q, k, v = tensors(1, 2, 1, 101)
    k = k[:, :, :1].expand_as(k)
    for how in VARIANTS:
        how = {**how, "grid": (13, 8)} if "grid" in how else how
        if how.get("causal", True) or "grid" not in how:
            sized = combiner_attention(q, k, v, size_term=True, **how)
            torch.testing.assert_close(sized, exact(q, k, v, how.get("causal", True)), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "how",
    [{"segment": 12}, {"pattern": "logsparse"}, {"pattern": "logsparse", "segment": 3},
     {"pattern": "axial_row", "grid": (11, 13)}, {"pattern": "axial_col", "grid": (11, 13)}],
    ids=name,
)  # fmt: skip
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_later_tokens_reach_no_earlier_one(how, pool):
    inputs = tensors(1, 4, 2, 141)
    base = combiner_attention(*inputs, pool=pool, **how)
    for t in (0, 12, 63, 64, 127, 128, 139):
        moved = [torch.cat([x[:, :, : t + 1], 20 - x[:, :, t + 1 :]], 2) for x in inputs]
        changed = combiner_attention(*moved, pool=pool, **how)
        assert torch.equal(changed[:, :, : t + 1], base[:, :, : t + 1])
        assert (changed[:, :, t + 1 :] != base[:, :, t + 1 :]).any(-1).all()


def test_logsparse_reads_as_many_regions_as_digits_and_they_are_the_past(monkeypatch):
    """Regions are told apart by values that name their token: all tokens of a region share one ratio to its u."""
    n = 150
    q, k, _ = tensors(1, 1, 1, n, seed=3)
    q = q[:, :, :1].expand_as(q).contiguous()  # rho is the same everywhere, so p is exp(s q.k) over its sum
    w = implied(q, k, pattern="logsparse")[0, 0]
    share = (0.5 * q[0, 0, 0] @ k[0, 0].T).exp()
    for i in range(n):
        ratio = (w[i, :i] / share[:i]).log()
        regions = 1 + int((ratio.diff().abs() > 1e-9).sum()) if i else 0
        assert regions == i.bit_count()
        assert (w[i, : i + 1] > 0).all()


# ----------------------------------------------------------------------------------------------------- summaries
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_summaries_of_any_regions(pool):
    q, k, v = tensors(2, 4, 2, 41)
    starts, lengths = [3, 0, 20, 20, 8, 40], [5, 41, 1, 7, 5, 1]
    kappa, u = region_summaries(q, k, v, torch.tensor(starts), lengths, pool=pool, scale=0.3)
    assert kappa.shape == (2, 2, 6, 4)
    assert u.shape == (2, 4, 6, 5)
    together = (lambda x: x.amax(0)) if pool == "max" else (lambda x: x.mean(0))
    for r, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        at = slice(start, start + length)
        for b in range(2):
            for h in range(4):
                key, value, query = k[b, h // 2, at], v[b, h // 2, at], q[b, h, at]
                torch.testing.assert_close(kappa[b, h // 2, r], together(key), atol=1e-12, rtol=0)
                p = (0.3 * key @ together(query)).softmax(0)
                torch.testing.assert_close(u[b, h, r], p @ value, atol=1e-12, rtol=0)


def test_the_other_segments_are_the_ones_that_differ():
    for n, size in ((67, 5), (131, 64), (200, 1), (13, 20)):
        count = -(-n // size)
        own, r = torch.arange(n)[:, None] // size, torch.arange(count)
        for causal in (True, False):
            seen = OtherSegments(size, causal).layout(n, count).to_dense()[0, 0]
            assert torch.equal(seen, r < own if causal else r != own)


# ----------------------------------------------------------------------------------------------------- the object
FEW = [
    {"segment": 9},
    {"segment": 9, "causal": False},
    {"pattern": "logsparse"},
    {"pattern": "logsparse", "causal": False},
    {"pattern": "axial_col", "grid": (12, 11)},
]


@pytest.mark.parametrize("how", FEW, ids=name)
def test_grouped_heads_batches_and_strides(how):
    q, k, v = tensors(3, 4, 2, 131)
    base = combiner_attention(q, k, v, **how)
    repeated = combiner_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)), **how)
    torch.testing.assert_close(repeated, base, atol=1e-12, rtol=0)
    alone = torch.cat([combiner_attention(*(t[b : b + 1] for t in (q, k, v)), **how) for b in range(3)])
    torch.testing.assert_close(alone, base, atol=1e-12, rtol=0)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(combiner_attention(*strided, **how), base, atol=1e-12, rtol=0)


@pytest.mark.parametrize("how", FEW, ids=name)
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_gradients_are_those_of_the_dense_definition(how, pool):
    """The same weights as a dense function of q and k, in float64; then the native engine in float32."""
    n = 131
    leaves = [t.requires_grad_() for t in tensors(1, 2, 1, n)]
    g = torch.randn(1, 2, n, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    want = torch.autograd.grad(dense(*leaves, pool, {"size_term": True, **how}), leaves, g)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        mine = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = combiner_attention(*mine, pool=pool, size_term=True, **how)
        got = torch.autograd.grad(out, mine, g.to(dtype))
        for a, b in zip(want, got, strict=True):
            assert a.abs().max() > 0
            torch.testing.assert_close(b.double(), a, atol=tolerance * float(a.abs().max()), rtol=0)


def dense(q, k, v, pool, how):
    """Differentiable, row by row."""
    how = dict(how)
    size_term = how.pop("size_term")
    together = (lambda x: x.amax(-2)) if pool == "max" else (lambda x: x.mean(-2))
    s, heads, n = q.shape[3] ** -0.5, q.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    made: dict[tuple, tuple] = {}
    rows = []
    for i in range(n):
        direct, regions = support(n, i, **how)
        keys, values, extra = [k[:, :, direct]], [v[:, :, direct]], [0.0] * len(direct)
        for region in regions:
            at = (region[0], region[-1], len(region))
            if at not in made:
                p = (together(q[:, :, region])[:, :, None] @ k[:, :, region].transpose(2, 3) * s).softmax(-1)
                made[at] = together(k[:, :, region])[:, :, None], p @ v[:, :, region]
            keys.append(made[at][0])
            values.append(made[at][1])
            extra.append(float(torch.tensor(len(region)).double().log()) if size_term else 0.0)
        logits = q[:, :, i : i + 1] @ torch.cat(keys, 2).transpose(2, 3) * s + torch.tensor(
            extra, dtype=q.dtype
        )
        rows.append(logits.softmax(-1) @ torch.cat(values, 2))
    return torch.cat(rows, 2)


@pytest.mark.parametrize("how", FEW, ids=name)
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_float32_and_bfloat16(how, pool):
    q, k, v = tensors(1, 4, 2, 131, 16, dtype=torch.bfloat16)
    want = combiner_attention(q.double(), k.double(), v.double(), pool=pool, **how)
    got = combiner_attention(q.float(), k.float(), v.float(), pool=pool, **how)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    low = combiner_attention(q, k, v, pool=pool, **how)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), want, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("pattern", ["fixed", "logsparse", "axial_row", "axial_col"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_short(pattern, n):
    q, k, v = tensors(1, 2, 1, n)
    how = {"grid": (2, 2) if n == 3 else (1, n)} if pattern.startswith("axial") else {}
    out = combiner_attention(q, k, v, pattern=pattern, **how)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0].expand(1, 2, 5), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "how",
    [{}, {"pattern": "logsparse"}, {"pattern": "axial_col", "grid": (256, 256)}, {"causal": False},
     {"pattern": "logsparse", "causal": False}],
    ids=name,
)  # fmt: skip
def test_long_sequences_need_no_square(how):
    """65,536 x 65,536 logits alone would be 16 GiB."""
    q, k, v = tensors(1, 1, 1, 65_536, dtype=torch.float32)
    assert torch.isfinite(combiner_attention(q, k, v, **how)).all()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"pattern": "strided"},
            "pattern must be one of fixed, logsparse, axial_row, axial_col, got 'strided'",
        ),
        ({"pool": "min"}, "pool must be one of max, mean, got 'min'"),
        ({"segment": 0}, "segment must be a positive int"),
        ({"segment": 2.0}, "segment must be a positive int"),
        ({"causal": 1}, "causal must be a bool, got 1"),
        ({"size_term": None}, "size_term must be a bool, got None"),
        ({"grid": (5, 8)}, "grid applies to the axial patterns"),
        ({"pattern": "axial_col"}, r"grid must be \(rows, columns\)"),
        ({"pattern": "axial_row", "grid": (5, 0)}, r"grid must be \(rows, columns\)"),
        ({"pattern": "axial_row", "grid": (5, 8), "segment": 3}, "segment applies to fixed and logsparse"),
        ({"pattern": "axial_col", "grid": (6, 8)}, "a grid of 6 x 8 needs 41 to 48 tokens, got 37"),
        (
            {"pattern": "axial_col", "grid": (5, 8), "causal": False},
            "a grid of 5 x 8 needs 40 tokens, got 37",
        ),
    ],
)
def test_settings_are_checked(how, words):
    with pytest.raises(ValueError, match=words):
        combiner_attention(*tensors(), **how)


def test_inputs_are_checked():
    q, k, v = tensors(1, 4, 2)
    with pytest.raises(ValueError, match="q must be a floating-point tensor"):
        combiner_attention(q[0], k, v)
    with pytest.raises(ValueError, match="k must be a floating-point tensor"):
        combiner_attention(q, k.int(), v)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        combiner_attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="must share B, N and D"):
        combiner_attention(q[:, :, 1:], k, v)
    with pytest.raises(ValueError, match="k and v must share batch, heads and length"):
        combiner_attention(q, k, v[:, :, 1:])
    for starts, lengths, words in (
        ([0, 5], [2], "as many, got 2 and 1"),
        ([0], [0], "hold at least 1"),
        ([-1], [2], "lie inside"),
        ([30], [8], "ends up to 38"),
        ([0.5], [2], "starts must be integers"),
        ([], [], "starts must be integers"),
        ([[0]], [1], "starts must be integers"),
    ):
        with pytest.raises(ValueError, match=words):
            region_summaries(q, k, v, starts, lengths)
    with pytest.raises(ValueError, match="pool must be one of"):
        region_summaries(q, k, v, [0], [1], pool="sum")
