"""Each geometry against a plain-loop oracle written from its published definition, and its invariants."""

import math

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.core import patterns as P
from foveate.core.layout import TILE
from foveate.core.patterns.base import CACHE, LayoutCache

LENGTHS = [(1, 1), (7, 7), (5, 13), (13, 5), (70, 70), (67, 131)]


def dense(pattern, n, m=None):
    return pattern.layout(n, m).to_dense()


def loops(rule, n, m):
    """Bool (n, m) of rule(position, key, query index), one pair at a time; last query at last key."""
    return torch.tensor([[bool(rule(i + m - n, j, i)) for j in range(m)] for i in range(n)])


def power_of_two(x):
    return x > 0 and math.log2(x).is_integer()


FREE = [  # patterns that live on any lengths: (pattern, rule)
    (P.Full(), lambda i, j, q: True),
    (P.Causal(), lambda i, j, q: j <= i),
    (P.SlidingWindow(5), lambda i, j, q: i - 5 < j <= i),
    (P.SlidingWindow(1), lambda i, j, q: i == j),
    (P.SlidingWindow(before=3, after=66), lambda i, j, q: i - 3 <= j <= i + 66),
    (P.SlidingWindow.symmetric(5), lambda i, j, q: abs(i - j) <= 2),
    (P.SlidingWindow.symmetric(4), lambda i, j, q: i - 2 <= j <= i + 1),
    (P.Dilated(4, 3), lambda i, j, q: j in (i, i - 3, i - 6, i - 9)),
    (P.Dilated(dilation=5, before=2, after=1), lambda i, j, q: j in (i + 5, i, i - 5, i - 10)),
    (P.Strided(6), lambda i, j, q: j in range(i - 600, i + 600, 6)),
    (P.Blocked(6), lambda i, j, q: math.floor(i / 6) == math.floor(j / 6)),
    (
        P.Blocked(4, before=2, after=1),
        lambda i, j, q: math.floor(j / 4) - math.floor(i / 4) in (-2, -1, 0, 1),
    ),
    (P.Sinks(3), lambda i, j, q: j in (0, 1, 2)),
    (P.Sinks(0), lambda i, j, q: False),
    (P.PrefixLM(4), lambda i, j, q: j in range(4) or j <= i),
    (P.PowerOfTwo(), lambda i, j, q: i == j or power_of_two(i - j)),
    (P.PowerOfTwo(include_self=False), lambda i, j, q: power_of_two(i - j)),
    (
        P.PowerOfTwo(4),
        lambda i, j, q: j <= i and (i // 4 == j // 4 or power_of_two(i // 4 - j // 4)),
    ),
    (
        P.power_attention(3, window_blocks=4, sink_blocks=2),
        lambda i, j, q: j <= i and (power_of_two(i // 3 - j // 3) or i // 3 - j // 3 < 4 or j // 3 < 2),
    ),
    (
        P.MaskMod(lambda b, h, q_idx, kv_idx: q_idx * 3 >= kv_idx),
        lambda i, j, q: q * 3 >= j,
    ),
]


@pytest.mark.parametrize(("n", "m"), LENGTHS)
@pytest.mark.parametrize(
    ("pattern", "rule"), FREE, ids=[f"{i}-{type(p).__name__}" for i, (p, _) in enumerate(FREE)]
)
def test_free_patterns(pattern, rule, n, m):
    assert torch.equal(dense(pattern, n, m)[0, 0], loops(rule, n, m))


def test_window_counts_the_querys_own_key():
    for w in (1, 2, 64, 65):
        rows = dense(P.SlidingWindow(w), 200)[0, 0].sum(1)
        assert rows.tolist() == [min(i + 1, w) for i in range(200)]
        assert dense(P.SlidingWindow(w), 200)[0, 0].diagonal().all()
        middle = dense(P.SlidingWindow.symmetric(w), 200)[0, 0].sum(1)[100]
        assert middle == w
        assert dense(P.Dilated(w, 2), 200)[0, 0].sum(1)[199] == w


ALIGNED = [p for p, _ in FREE[:-1]] + [
    P.GlobalTokens([1, 60]),
    P.PrefixLM([3, 50]),
    P.SharedQuestion((40, 50, 41)),
    P.Documents(torch.arange(131) // 30),
    P.Regions(torch.arange(131) // 30 % 2, torch.eye(2, dtype=torch.bool)),
    P.Shards(8, 1, 3),
    P.Random(0.3, block=8, seed=4, heads=2),
    P.Random(0.3, causal=True),
    P.Neighborhood(131, 20),
]


@pytest.mark.parametrize("pattern", ALIGNED, ids=[repr(p)[:40] for p in ALIGNED])
@pytest.mark.parametrize("n", [1, 64, 70, 130])
def test_a_query_keeps_its_keys_when_it_comes_alone(pattern, n):
    """The last n queries, laid out alone (decoding, chunked prefill), see the same keys as among all."""
    assert torch.equal(dense(pattern, n, 131), dense(pattern, 131)[:, :, -n:])


def test_causal_is_bottom_right_aligned():
    assert dense(P.Causal(), 1, 5)[0, 0].tolist() == [[True] * 5]  # decoding sees the whole cache
    seen = dense(P.Causal(), 3, 1)[0, 0, :, 0]  # queries before the first key see nothing
    assert seen.tolist() == [False, False, True]


def test_sliding_window_forms_are_one_value():
    assert P.SlidingWindow(4) == P.SlidingWindow(before=3, after=0) == P.SlidingWindow(4, 3, 0)
    assert hash(P.SlidingWindow(4)) == hash(P.SlidingWindow(before=3, after=0))


@pytest.mark.parametrize(("n", "m"), LENGTHS)
def test_global_tokens(n, m):
    tokens = sorted({0, m // 2})
    for options, rule in (
        ({}, lambda i, j, q: i in tokens or j in tokens),
        ({"columns": False}, lambda i, j, q: i in tokens),
        ({"rows": False}, lambda i, j, q: j in tokens),
    ):
        assert torch.equal(dense(P.GlobalTokens(tokens, **options), n, m)[0, 0], loops(rule, n, m))
    assert P.GlobalTokens(1) == P.GlobalTokens([0])


def test_prefix_per_batch_row():
    got = dense(P.PrefixLM(torch.tensor([2, 0, 9])), 7)
    for b, p in enumerate((2, 0, 9)):
        assert torch.equal(got[b, 0], loops(lambda i, j, q, p=p: j < p or j <= i, 7, 7))


def test_documents():
    ids = [[3, 3, 1, 1, 1, -1, 0], [0, 1, 0, 1, -2, -1, 0]]
    for n in (7, 4, 1):
        got = dense(P.Documents(ids), n, 7)
        for b, row in enumerate(ids):
            want = loops(lambda i, j, q, row=row: row[i] == row[j] and row[i] >= 0, n, 7)
            assert torch.equal(got[b, 0], want)
    cross = dense(P.Documents([0, 1, 5], [1, 1, 0, -1, 5]), 3, 5)[0, 0].int().tolist()
    assert cross == [[0, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    packed = P.Documents.from_cu_seqlens(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 3, 4]))
    assert dense(packed, 5, 4)[0, 0].int().tolist() == [[1, 0, 0, 0]] * 2 + [[0, 0, 0, 1]] * 3


def test_shared_question():
    lengths = (5, 3, 1, 60, 8)
    owner = [d for d, length in enumerate(lengths) for _ in range(length)]
    got = dense(P.SharedQuestion(lengths), 77)[0, 0]
    assert torch.equal(got, loops(lambda i, j, q: j <= i and (owner[j] == 0 or owner[i] == owner[j]), 77, 77))
    assert torch.equal(dense(P.SharedQuestion(lengths), 3, 77)[0, 0], got[-3:])


def test_regions():
    table = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    q, k = [0, 1, 1, 0], [2, 1, 0, 0, 1]
    got = dense(P.Regions(q, table, k), 4, 5)[0, 0]
    assert torch.equal(got, loops(lambda i, j, n: table[q[n]][k[j]], 4, 5))
    labels = torch.randint(0, 3, (2, 90))
    square = torch.rand(3, 3) < 0.5
    got = dense(P.Regions(labels, square), 70, 90)
    for b in range(2):
        assert torch.equal(got[b, 0], square[labels[b, -70:]][:, labels[b]])


def test_padding_and_masks():
    real = torch.rand(2, 70) < 0.8
    got = dense(P.KeyPadding(real), 65, 70)
    assert torch.equal(got[:, 0], real[:, None].expand(2, 65, 70))
    assert torch.equal(dense(P.KeyPadding(real[0]), 3, 70)[0, 0], real[0].expand(3, 70))
    for shape in [(65, 70), (3, 65, 70), (2, 1, 65, 70), (2, 3, 1, 70), (2, 1, 65, 1)]:
        mask = torch.rand(shape) < 0.5
        got = dense(P.Mask(mask), 65, 70)
        four = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        assert torch.equal(got, four.expand(four.shape[0], four.shape[1], 65, 70))


def test_mask_mod_is_called_with_batch_and_head():
    pattern = P.MaskMod(lambda b, h, q, k: (q + b * k) % 3 == h, batch=2, heads=3)
    got = dense(pattern, 70, 66)
    for b in range(2):
        for h in range(3):
            assert torch.equal(got[b, h], loops(lambda i, j, q, b=b, h=h: (q + b * j) % 3 == h, 70, 66))


# ------------------------------------------------------------------------------------- PowerAttention
def test_power_reachability():
    """R_l[i, j] iff popcount(i - j) <= l; the contiguous reach after l layers is exactly 2**(l + 1) - 2."""
    n = 80
    for layers in range(1, 6):
        reach = P.reachability(P.PowerOfTwo(), n, layers)[0, 0]
        assert torch.equal(reach, loops(lambda i, j, q, x=layers: j <= i and (i - j).bit_count() <= x, n, n))
        row = reach[n - 1].flip(0)
        contiguous = int((~row).float().argmax()) if not row.all() else n
        assert contiguous - 1 == min(2 ** (layers + 1) - 2, n - 1)
    with pytest.raises(ValueError, match="8192"):
        P.reachability(P.PowerOfTwo(), 10_000, 1)


def test_power_layout_is_logarithmic():
    n, block, window, sinks = 16_384 + 5, 64, 5, 1
    layout = P.power_attention(block, window, sinks).layout(n)
    per_row = layout.row_ptr.diff()
    assert int(per_row.max()) <= math.floor(math.log2(-(-n // block))) + 2 + window + sinks
    assert (layout.tile_idx <= layout.rows).all()  # nothing after the query
    full = dense(P.power_attention(4, window_blocks=100), 70)[0, 0]
    assert torch.equal(full, dense(P.Causal(), 70)[0, 0])


@pytest.mark.parametrize("n", [131, 500])
def test_power_attention_is_attention_under_its_rule(n):
    """Lengths that are no multiple of the block; the rule is written again, element by element."""
    q, k, v = (torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    e = torch.arange(n)[:, None] // 24 - torch.arange(n) // 24
    seen = torch.tensor([[int(x) >= 0 and (power_of_two(int(x)) or 0 <= x < 4) for x in row] for row in e])
    seen = (seen | (torch.arange(n) < 24)) & torch.ones(n, n, dtype=torch.bool).tril()
    want = (q @ k.mT / 4).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    got = fv.attention(q, k, v, P.power_attention(24, window_blocks=4, sink_blocks=1))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------- S2-Attention
def shard_rule(h, c, local, v, step):
    return lambda i, j, q: j <= i and (i // c - j // c < local or (j // c + h * step + 1) % v == 0)


@pytest.mark.parametrize(
    ("c", "local", "v", "heads"), [(1, 1, 3, 3), (4, 2, 4, 8), (16, 0, 2, 2), (5, 1, 3, 5)]
)
def test_shards(c, local, v, heads):
    for n, m in LENGTHS:
        got = dense(P.Shards(c, local, v, layouts=heads), n, m)[0]
        for h in range(heads):
            assert torch.equal(got[h], loops(shard_rule(h, c, local, v, max(1, v // heads)), n, m))
    union = dense(P.Shards(c, local, v, layouts=heads), 131)[0].any(0)
    assert torch.equal(union, dense(P.Causal(), 131)[0, 0])  # together the heads see everything


def test_shards_variants():
    same = dense(P.Shards(8, 1, 4, layouts=3, homogeneous=True), 100)[0]
    for h in range(3):
        assert torch.equal(same[h], loops(shard_rule(0, 8, 1, 4, 0), 100, 100))
    chosen = dense(P.Shards(8, 1, 3, offsets=(2, 0, 1)), 100)[0]
    for h, offset in enumerate((2, 0, 1)):
        assert torch.equal(chosen[h], loops(shard_rule(offset, 8, 1, 3, 1), 100, 100))
    grouped = dense(P.Shards(8, 1, 2, group=3), 100)[0]
    assert grouped.shape[0] == 6
    for h in range(6):
        assert torch.equal(grouped[h], dense(P.Shards(8, 1, 2), 100)[0, h // 3])
    assert torch.equal(dense(P.Shards(8, 1, 1), 100)[0, 0], dense(P.Causal(), 100)[0, 0])
    assert torch.equal(dense(P.Shards(8, 13, 4), 100)[0, 2], dense(P.Causal(), 100)[0, 0])


@pytest.mark.parametrize(("layouts", "stride"), [(4, 8), (3, 8), (2, 4), (1, 2)])
def test_shards_report_incomplete_coverage(layouts, stride):
    with pytest.raises(ValueError, match="in no shard"):
        P.Shards(stride=stride, layouts=layouts)
    assert P.Shards(stride=stride, layouts=layouts, require_coverage=False).heads == layouts


def test_shards_density_tends_to_one_over_stride():
    layout = P.Shards(64, 1, 8).layout(8192)
    per_head = layout.row_area.sum(-1)[0].double() / (8192 * 8193 / 2)
    assert (per_head - 1 / 8).abs().max() < 0.04


@pytest.mark.parametrize("head", range(4))
def test_shards_kv_keep_is_what_later_queries_read(head):
    pattern = P.Shards(4, 2, 4)
    future = dense(pattern, 120)[0, head]
    for length in (1, 17, 40, 63):
        kept = set(pattern.kv_keep(head, length).tolist())
        needed = set(future[length:, :length].any(0).nonzero().flatten().tolist())
        assert needed == kept


def test_shards_decode_from_a_cache_that_frees_keys():
    """Step by step, a head holding only `kv_keep` and the new key gives what the whole pattern gives."""
    pattern, n = P.Shards(4, 2, 4), 75
    q, k, v = (torch.randn(1, 4, n, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    whole = fv.attention(q, k, v, pattern, engine="reference")
    for head in range(4):
        held = torch.empty(0, dtype=torch.int64)
        for step in range(n):
            kept = pattern.kv_keep(head, step)
            assert set(kept.tolist()) <= set(held.tolist())  # what was freed is never asked for again
            held = torch.cat([kept, torch.tensor([step])])
            row, keys, values = (t[:, head, at] for t, at in ((q, [step]), (k, held), (v, held)))
            out = (row @ keys.mT / 8**0.5).softmax(-1) @ values
            torch.testing.assert_close(out[0, 0], whole[0, head, step], atol=1e-5, rtol=0)
        assert len(held) <= 2 * 4 + -(-n // 16) * 4  # the band and the shard


# --------------------------------------------------------------------------------------------- Random
def test_random_is_seeded_and_nested():
    n = 64 * 60
    assert P.Random(0.3, seed=1).layout(n) == P.Random(0.3, seed=1).layout(n)
    assert P.Random(0.3, seed=1).layout(n) != P.Random(0.3, seed=2).layout(n)
    small, large = dense(P.Random(0.1), 640)[0, 0], dense(P.Random(0.6), 640)[0, 0]
    assert (large | ~small).all()
    heads = dense(P.Random(0.3, heads=2, batch=2), 640)
    assert len({tuple(heads[b, h].flatten().tolist()) for b in range(2) for h in range(2)}) == 4
    for density in (0.05, 0.3, 0.9):
        layout = P.Random(density, diagonal=False).layout(n)
        sigma = math.sqrt(density * (1 - density) / 3600)
        assert abs(layout.density - density) < 5 * sigma


@pytest.mark.parametrize("block", [16, 64, 100])
def test_random_keeps_whole_blocks_and_the_diagonal(block):
    got = dense(P.Random(0.2, block=block, seed=5), 300)[0, 0]
    for i in range(0, 300, block):
        assert got[i : i + block, i : i + block].all()
        for j in range(0, 300, block):
            piece = got[i : i + block, j : j + block]
            assert piece.all() or not piece.any()
    nothing = dense(P.Random(0.0, block=block), 300)[0, 0]
    assert torch.equal(nothing, dense(P.Blocked(block), 300)[0, 0])
    assert dense(P.Random(1.0, block=block), 300).all()
    assert not dense(P.Random(0.0, block=block, diagonal=False), 300).any()
    ahead = dense(P.Random(1.0, block=block, causal=True), 300)[0, 0]
    assert torch.equal(ahead, loops(lambda i, j, q: j // block <= i // block, 300, 300))


@pytest.mark.parametrize(("n", "m"), [(700, 700), (130, 500)])
def test_random_matches_another_layout_row_by_row(n, m):
    like = (P.Causal() & (P.SlidingWindow(100), P.Sinks(64) | P.SlidingWindow(10), P.Strided(90))).layout(
        n, m
    )
    for seed in (0, 1):
        pattern = P.Random.matching(like, seed=seed)
        got = pattern.layout(n, m)
        assert torch.equal(got.row_ptr, like.row_ptr)
        causal = (P.Causal() & pattern).layout(n, m)
        assert torch.equal(causal.row_ptr, like.row_ptr)  # every chosen tile has something to see
    assert got != like
    assert P.Random.matching(like) == P.Random.matching(like)
    with pytest.raises(ValueError, match="causal=False"):
        P.Random.matching(P.Full().layout(n, m)).layout(n, m)
    assert P.Random.matching(P.Full().layout(n, m), causal=False).layout(n, m) == P.Full().layout(n, m)
    with pytest.raises(ValueError, match="rows of tiles"):
        pattern.layout(n + 64, m)


# ---------------------------------------------------------------------------------------------- grids
def neighbours(x, n, k, s, d, causal):
    """Set of neighbours of coordinate x on an axis of n cells, from the papers' definition."""
    group = [y for y in range(n) if y % d == x % d]
    c, length = x // d, len([y for y in range(n) if y % d == x % d])
    if causal:
        leader = min((c // s) * s + s - 1, length - 1)
        picked = range(max(0, leader - k + 1), c + 1)
    else:
        leader = min((c // s) * s + s // 2, length - 1)
        start = max(0, leader - k // 2)
        start = min(start, length - k)
        picked = range(start, start + k)
    return {group[p] for p in picked}


def row(pattern, n, i):
    return dense(pattern, n)[0, 0, i].nonzero().flatten().tolist()


def test_neighborhood_rows_of_the_papers():
    p = P.Neighborhood(8, 4)  # an even window leans left
    assert [row(p, 8, i) for i in (0, 1, 2)] == [[0, 1, 2, 3]] * 3
    assert row(p, 8, 3) == [1, 2, 3, 4]
    assert row(p, 8, 7) == [4, 5, 6, 7]
    p = P.Neighborhood(10, 4, stride=4)  # the last block is shifted inwards
    assert row(p, 10, 8) == row(p, 10, 9) == [6, 7, 8, 9]
    p = P.Neighborhood(10, 4, stride=2, causal=True)
    assert row(p, 10, 4) == [2, 3, 4]
    assert row(p, 10, 5) == [2, 3, 4, 5]


CASES = [
    ((11,), (4,), (1,), (1,), (False,)),
    ((12,), (3,), (2,), (3,), (False,)),
    ((13,), (3,), (3,), (4,), (True,)),
    ((7, 9), (3, 4), (1, 2), (1, 2), (False, False)),
    ((7, 9), (3, 4), (3, 1), (2, 1), (True, False)),
    ((4, 5, 6), (2, 3, 4), (1, 3, 2), (2, 1, 1), (False, True, False)),
]


@pytest.mark.parametrize(("shape", "k", "s", "d", "causal"), CASES)
@pytest.mark.parametrize("order", ["row_major", "hilbert"])
def test_neighborhood(shape, k, s, d, causal, order):
    pattern = P.Neighborhood(shape, k, s, d, causal, order)
    n = math.prod(shape)
    cells = [np.unravel_index(int(c), shape) for c in pattern.order.permutation]

    def rule(i, j, q):
        return all(
            cells[j][a] in neighbours(int(cells[i][a]), shape[a], k[a], s[a], d[a], causal[a])
            for a in range(len(shape))
        )

    got = dense(pattern, n)[0, 0]
    assert torch.equal(got, loops(rule, n, n))
    assert got.diagonal().all()  # every query is its own neighbour
    if not any(causal):
        assert (got.sum(1) == math.prod(k)).all()
    assert torch.equal(dense(pattern, n // 2, n)[0, 0], got[-(n // 2) :])


def test_neighborhood_limits():
    """window = grid: full; 1-D causal: sliding window; stride = window dividing the axis: blocks."""
    assert dense(P.Neighborhood((5, 6), (5, 6)), 30).all()
    assert P.Neighborhood(100, 7, causal=True).layout(100) == P.SlidingWindow(7).layout(100)
    assert P.Neighborhood(96, 8, stride=8).layout(96) == P.Blocked(8).layout(96)
    for n in range(2, 16):
        for k in range(1, n + 1):
            for s in range(1, k + 1):
                got = dense(P.Neighborhood(n, k, stride=s), n)[0, 0]
                assert (got.sum(1) == k).all()
                assert got.diagonal().all()
                groups = torch.arange(n) // s
                assert all(
                    (got[i] == got[j]).all() for i in range(n) for j in range(n) if groups[i] == groups[j]
                )


def swin(shape, window, shift):
    """Swin's own construction: roll by -shift, number the windows, label the wrapped regions, roll back."""
    labels = np.zeros(shape, int)
    count = 0
    parts = [
        [slice(0, n - w), slice(n - w, n - s), slice(n - s, n)] if s else [slice(0, n)]
        for n, w, s in zip(shape, window, shift, strict=True)
    ]
    for ys in parts[0]:
        for xs in parts[1]:
            labels[ys, xs] = count
            count += 1
    y, x = np.indices(shape)
    windows = (y // window[0]) * 1000 + x // window[1]
    both = labels * 1_000_000 + windows  # on the rolled grid
    back = np.roll(both, shift, axis=(0, 1)).reshape(-1)
    return torch.from_numpy(back[:, None] == back[None, :])


@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 3), (0, 2)])
def test_windows_are_swins(shift):
    shape, window = (8, 12), (4, 4)
    assert torch.equal(dense(P.Windows(shape, window, shift), 96)[0, 0], swin(shape, window, shift))


def test_windows_cyclic_and_ragged():
    got = dense(P.Windows(6, 3, shift=1, cyclic=True), 6)[0, 0]
    assert torch.equal(got, loops(lambda i, j, q: (i - 1) % 6 // 3 == (j - 1) % 6 // 3, 6, 6))
    got = dense(P.Windows(7, 3), 7)[0, 0]
    assert got.sum(1).tolist() == [3, 3, 3, 3, 3, 3, 1]


def test_grid_is_maxvits():
    """x.reshape(g, H / g, g, W / g): tokens with equal inner coordinates attend to each other."""
    shape, grid = (8, 6), (4, 2)
    cells = torch.arange(48).view(4, 2, 2, 3).permute(1, 3, 0, 2).reshape(6, 8)  # one row per group
    want = torch.zeros(48, 48, dtype=torch.bool)
    for group in cells:
        want[group[:, None], group[None, :]] = True
    assert torch.equal(dense(P.Grid(shape, grid), 48)[0, 0], want)


def test_axial():
    shape = (3, 4, 5)
    cells = [np.unravel_index(i, shape) for i in range(60)]
    for axes in ((0,), (1,), (2,), (0, 2), (0, 1, 2)):
        fixed = [a for a in range(3) if a not in axes]
        want = loops(lambda i, j, q, f=fixed: all(cells[i][a] == cells[j][a] for a in f), 60, 60)
        assert torch.equal(dense(P.Axial(shape, axes), 60)[0, 0], want)
    assert P.Axial(shape, -1) == P.Axial(shape, (2,))


# ------------------------------------------------------------------------------- values, cache, errors
def test_patterns_with_tensors_are_values():
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    a, b = P.Documents(ids), P.Documents(ids.clone())
    assert a == b
    assert hash(a) == hash(b)
    assert a != P.Documents(ids + 1)
    assert P.Causal() & a == P.Causal() & b
    before = a.layout(9)
    ids[0] = 7  # the pattern holds a copy
    assert a == b
    assert a.layout(9) is before
    assert P.Mask(torch.ones(2, 3, dtype=torch.bool)) != P.Mask(torch.ones(3, 2, dtype=torch.bool))


def test_cache_is_by_value():
    pattern = P.Causal() & P.SlidingWindow(9)
    assert pattern.layout(333) is (P.Causal() & P.SlidingWindow(before=8, after=0)).layout(333)
    assert pattern.layout(333) is not pattern.layout(334)
    assert pattern.layout(333) is pattern.layout(333, 333)


def test_cache_is_bounded():
    cache = LayoutCache(max_bytes=1 << 20, max_entries=4)
    kept = [cache.get(P.SlidingWindow(w), 100, 100) for w in range(1, 8)]
    assert len(cache) == 4
    assert cache.nbytes == sum(x.nbytes for x in kept[-4:])
    assert cache.get(P.SlidingWindow(7), 100, 100) is kept[-1]
    assert cache.get(P.SlidingWindow(1), 100, 100) is not kept[0]
    tiny = LayoutCache(max_bytes=100)
    tiny.get(P.Causal(), 1000, 1000)
    assert len(tiny) == tiny.nbytes == 0
    cache.clear()
    assert len(cache) == cache.nbytes == 0


def test_mask_mod_cache_can_be_refused():
    limit = torch.tensor(2)

    def rule(b, h, q, k):
        return k < limit

    fresh = P.Causal() & P.MaskMod(rule, cache=False)
    kept = len(CACHE)
    assert fresh.layout(77).area == 1 + 2 * 76
    limit += 1
    assert fresh.layout(77).area == 1 + 2 + 3 * 75
    assert len(CACHE) == kept
    assert P.MaskMod(rule) == P.MaskMod(rule)
    assert P.MaskMod(rule).layout(77) is P.MaskMod(rule).layout(77)


BAD = [
    (lambda: P.SlidingWindow(0), "window must be an int >= 1, got 0"),
    (lambda: P.SlidingWindow(), "window=, or before= and after="),
    (lambda: P.SlidingWindow(before=3), "after is missing"),
    (lambda: P.SlidingWindow(9, 3, 3), "window must be before"),
    (lambda: P.SlidingWindow(before=-1, after=0), "before must be an int >= 0, got -1"),
    (lambda: P.Dilated(3, 0), "dilation must be an int >= 1, got 0"),
    (lambda: P.Strided(0), "stride must be"),
    (lambda: P.Blocked(0), "block must be"),
    (lambda: P.Sinks(-1), "n must be"),
    (lambda: P.PrefixLM(-2), "prefix must be >= 0, got -2"),
    (lambda: P.PrefixLM([]), "prefix"),
    (lambda: P.GlobalTokens([-1]), "tokens must be positions >= 0"),
    (lambda: P.GlobalTokens(0), "tokens must be an int >= 1"),
    (lambda: P.GlobalTokens(1, rows=False, columns=False), "at least one"),
    (lambda: P.GlobalTokens([9]).layout(9), "positions < k_len = 9, got 9"),
    (lambda: P.KeyPadding(torch.ones(4, dtype=torch.bool)).layout(4, 5), "k_len = 5"),
    (lambda: P.Documents([0, 1]).layout(3), "k_len = 3 entries, got 2"),
    (lambda: P.Documents([0, 1]).layout(3, 2), "q_len <= k_len"),
    (lambda: P.Documents([0, 1], [0, 1, 1]).layout(3, 2), "got 2 and 3"),
    (lambda: P.Documents([[0], [1]], [[0], [1], [2]]), "equal batch rows"),
    (lambda: P.Documents.from_cu_seqlens([1, 2]), "rise from 0"),
    (lambda: P.Documents.from_cu_seqlens([0, 3, 2]), "rise from 0"),
    (lambda: P.Documents.from_cu_seqlens([0, 3], [0, 1, 2]), "as many entries"),
    (lambda: P.SharedQuestion((2, 0)), "lengths must be an int >= 1"),
    (lambda: P.SharedQuestion((2, 3)).layout(6), "sum to k_len = 6, got 5"),
    (lambda: P.Regions([0, 2], torch.ones(2, 2, dtype=torch.bool)), r"labels must lie in \[0, 2\)"),
    (lambda: P.Regions([0], torch.ones(1, 1, dtype=torch.bool), [1]), r"k_labels must lie in \[0, 1\)"),
    (lambda: P.Mask(torch.ones(3, 4, dtype=torch.bool)).layout(3, 5), r"end in \(3, 5\)"),
    (lambda: P.PowerOfTwo(0), "block must be"),
    (lambda: P.Shards(offsets=(0, 1), homogeneous=True), "offsets"),
    (lambda: P.Shards(stride=2, offsets=(0, 1), layouts=3), "layouts = 3 entries, got 2"),
    (lambda: P.Shards(stride=2).kv_keep(2, 5), "head must be"),
    (lambda: P.Random(1.5), r"density must be a number in \[0, 1\], got 1.5"),
    (lambda: P.Random(0.5, rows=np.zeros((1, 1, 1), int)), "rows="),
    (lambda: P.Neighborhood((4, 4), (3, 5)), "at most the axis of 4, got 5"),
    (lambda: P.Neighborhood((4, 4), 3, dilation=2), "window . dilation"),
    (lambda: P.Neighborhood((4, 4), 2, stride=3), "stride must be an int >= 1 and <= 2, got 3"),
    (lambda: P.Neighborhood((4, 4), (2, 2, 2)), "one int or 2"),
    (lambda: P.Neighborhood((4, 4), 2, causal=(True,)), "causal must be"),
    (lambda: P.Neighborhood((4, 4), 2).layout(15), "k_len must be 16"),
    (lambda: P.Neighborhood((4, 4), 2).layout(17, 16), "q_len must be at most"),
    (lambda: P.Windows((4, 4), 5), "window must be an int >= 1 and <= 4, got 5"),
    (lambda: P.Windows((4, 4), 2, shift=2), "shift must be an int >= 0 and <= 1, got 2"),
    (lambda: P.Windows(5, 2, cyclic=True), "divide"),
    (lambda: P.Grid((4, 6), 4), "grid must divide shape, got 4 for an axis of 6"),
    (lambda: P.Axial((4, 6), 2), "axis must be"),
    (lambda: P.Axial((4, 6), ()), "at least one axis"),
    (lambda: P.Causal().layout(0), "q_len must be an int >= 1, got 0"),
    (lambda: P.Causal().layout(3, -1), "k_len must be an int >= 1, got -1"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_illegal_values_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()


WRONG = [
    (lambda: P.SlidingWindow(2.5), "window must be an int >= 1, got 2.5"),
    (lambda: P.Sinks(True), "n must be an int"),
    (lambda: P.KeyPadding(torch.ones(4)), "mask must be a bool tensor"),
    (lambda: P.Documents(torch.ones(4)), "ids must be an integer tensor"),
    (lambda: P.Documents("abc"), "got str"),
    (lambda: P.Mask(torch.ones(4, dtype=torch.bool)), "2 or 3 or 4 dimensions"),
    (lambda: P.MaskMod(3), "callable"),
    (lambda: P.MaskMod(lambda b, h, q, k: q + k).layout(4), "must return a bool tensor, got torch.int64"),
    (lambda: P.Random("much"), "density must be a number"),
    (lambda: P.Random(), "density must be a number"),
    (lambda: P.Causal().layout(4.0), "q_len must be an int"),
]


@pytest.mark.parametrize(("make", "words"), WRONG)
def test_wrong_types_name_the_argument(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_mask_mod_is_called_with_zero_along_axes_of_one():
    first = P.MaskMod(lambda b, h, q, k: (k + b + h) % 2 == 0)
    both = dense(first & P.per_head(P.Full(), P.Full()), 5)[0]
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[0], dense(first, 5)[0, 0])


def test_mask_mod_that_is_not_elementwise():
    with pytest.raises(ValueError, match="elementwise"):
        P.MaskMod(lambda b, h, q, k: torch.ones(5, 7, dtype=torch.bool)).layout(70)


def test_a_pattern_needs_only_contains():
    class Odd(P.Pattern):
        def contains(self, ext, b, h, q, k):
            return (q + k) % 2 == 1

    assert torch.equal(
        dense(Odd() & P.Causal(), 70)[0, 0], loops(lambda i, j, q: j <= i and (q + j) % 2 == 1, 70, 70)
    )
    with pytest.raises(NotImplementedError, match="contains"):
        P.Pattern().layout(3)
    assert TILE == 64
