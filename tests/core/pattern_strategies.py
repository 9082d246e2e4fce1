"""Random patterns, expressions and lengths for hypothesis; a truth that does not use the algebra."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from foveate.core import patterns as P

SIZES = (1, 3, 63, 64, 65, 127, 130, 257, 500)
FACTORS = {
    1: [(1,)],
    3: [(3,), (1, 3)],
    63: [(63,), (7, 9), (3, 3, 7)],
    64: [(8, 8), (4, 4, 4), (64,)],
    65: [(5, 13), (65,)],
    127: [(127,)],
    130: [(10, 13), (2, 5, 13)],
    257: [(257,)],
    500: [(20, 25), (5, 10, 10), (500,)],
}


def truth(pattern, n, m):
    """Bool (batch, heads, n, m) of a leaf: `contains` on every pair."""
    ext = P.Extent(n, m)
    q, k = np.arange(n)[:, None], np.arange(m)[None, :]
    rows = [
        [np.broadcast_to(pattern.contains(ext, b, h, q, k), (n, m)) for h in range(pattern.heads)]
        for b in range(pattern.batch)
    ]
    return torch.from_numpy(np.array(rows))


def arrays(draw, shape, low, high):
    seed = draw(st.integers(0, 2**31))
    made = np.random.default_rng(seed).integers(low, high + 1, shape)
    return np.sort(made, axis=-1) if draw(st.booleans()) else made


def bools(draw, shape):
    seed = draw(st.integers(0, 2**31))
    return torch.from_numpy(
        np.random.default_rng(seed).random(shape) < draw(st.sampled_from([0.05, 0.5, 0.97]))
    )


def orders(draw, shape):
    kind = draw(st.sampled_from(["row_major", "hilbert", "morton", "tile_major"]))
    if kind == "tile_major":
        return P.tile_major(shape, tuple(draw(st.integers(1, n)) for n in shape))
    return kind


def _bands(draw, n, m):
    w = st.integers(1, m + n)
    return draw(
        st.one_of(
            st.builds(P.Full),
            st.builds(P.Causal),
            st.builds(P.SlidingWindow, w),
            st.builds(lambda a, b: P.SlidingWindow(before=a, after=b), w, w),
            st.builds(P.SlidingWindow.symmetric, w),
            st.builds(P.Dilated, w, st.integers(1, 90)),
            st.builds(lambda d, a, b: P.Dilated(dilation=d, before=a, after=b), st.integers(1, 90), w, w),
            st.builds(P.Strided, st.integers(1, 200)),
        )
    )


def _blocks(draw, n, m):
    block = st.sampled_from([1, 2, 5, 16, 64, 100, 128])
    few = st.integers(0, 3)
    return draw(
        st.one_of(
            st.builds(P.Blocked, block, few, few),
            st.builds(P.PowerOfTwo, block, st.booleans()),
            st.builds(P.power_attention, block, st.integers(1, 3), few),
            st.builds(
                P.Random,
                st.floats(0, 1),
                block=block,
                seed=st.integers(0, 9),
                heads=st.sampled_from([1, 2]),
                diagonal=st.booleans(),
                causal=st.booleans(),
            ),
            st.builds(
                lambda b, c, s, hom: P.Shards(b, c, s, layouts=2, homogeneous=hom, require_coverage=False),
                block,
                few,
                st.integers(1, 5),
                st.booleans(),
            ),
        )
    )


def _columns(draw, n, m):
    kind = draw(st.sampled_from(["sinks", "padding", "global", "prefix", "prefixes"]))
    if kind == "sinks":
        return P.Sinks(draw(st.integers(0, m + 3)))
    if kind == "padding":
        return P.KeyPadding(bools(draw, (draw(st.sampled_from([1, 2])), m)))
    if kind == "global":
        tokens = draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=4))
        rows = draw(st.booleans())
        return P.GlobalTokens(tokens, rows=rows, columns=draw(st.booleans()) or not rows)
    if kind == "prefix":
        return P.PrefixLM(draw(st.integers(0, m + 3)))
    return P.PrefixLM([draw(st.integers(0, m)), draw(st.integers(0, m))])


def _packed(draw, n, m):
    count = draw(st.integers(0, 3))
    q = [0, *sorted(draw(st.lists(st.integers(0, n), min_size=count, max_size=count))), n]
    k = [0, *sorted(draw(st.lists(st.integers(0, m), min_size=count, max_size=count))), m]
    return P.Packed(q, q if n == m and draw(st.booleans()) else k, draw(st.booleans()))


def _labels(draw, n, m):
    if draw(st.sampled_from([False, False, True])):
        return _packed(draw, n, m)
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    cross = n > m or draw(st.booleans())
    if draw(st.booleans()):
        if cross:
            return P.Documents(arrays(draw, (*batch, n), -1, 4), arrays(draw, (*batch, m), -1, 4))
        return P.Documents(arrays(draw, (*batch, m), -1, 4))
    table = bools(draw, (4, 5))
    if cross:
        return P.Regions(arrays(draw, (*batch, n), 0, 3), table, arrays(draw, (*batch, m), 0, 4))
    return P.Regions(arrays(draw, (*batch, m), 0, 3), table)


def _masks(draw, n, m):
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(n, m), (2, n, m), (2, 1, n, m), (2, 2, 1, m), (1, n, 1)]))
        return P.Mask(bools(draw, shape))
    a, c = draw(st.integers(1, 9)), draw(st.integers(2, 9))
    heads = draw(st.sampled_from([1, 2]))
    return P.MaskMod(lambda b, h, q, k: (a * q + k + h) % c != 0, heads=heads)


def _grids(draw, n, m):
    shape = draw(st.sampled_from(FACTORS[m]))
    order = orders(draw, shape)
    kind = draw(st.sampled_from(["neighborhood", "neighborhood", "windows", "axial", "grid"]))
    if kind == "axial":
        axes = draw(st.lists(st.integers(-len(shape), len(shape) - 1), min_size=1, max_size=len(shape)))
        return P.Axial(shape, tuple(axes), order)
    if kind == "grid":
        return P.Grid(
            shape,
            tuple(draw(st.sampled_from([g for g in range(1, x + 1) if x % g == 0])) for x in shape),
            order,
        )
    window = tuple(draw(st.integers(1, x)) for x in shape)
    if kind == "windows":
        return P.Windows(shape, window, tuple(draw(st.integers(0, w - 1)) for w in window), order=order)
    return P.Neighborhood(
        shape,
        window,
        stride=tuple(draw(st.integers(1, w)) for w in window),
        dilation=tuple(draw(st.integers(1, x // w)) for x, w in zip(shape, window, strict=True)),
        causal=tuple(draw(st.booleans()) for _ in shape),
        order=order,
    )


def leaf(draw, n, m):
    kinds = [_bands, _blocks, _columns, _labels, _masks]
    if n <= m:
        kinds.append(_grids)
    return draw(st.sampled_from(kinds))(draw, n, m)


def tree(draw, n, m, depth):
    """(pattern, bool (batch, heads, n, m)) of a random expression; the truth is combined with torch alone."""
    kind = draw(st.sampled_from(["leaf", "and", "or", "not", "heads"])) if depth else "leaf"
    if kind == "leaf":
        made = leaf(draw, n, m)
        return made, truth(made, n, m)
    a, dense_a = tree(draw, n, m, depth - 1)
    if kind == "not":
        return ~a, ~dense_a
    b, dense_b = tree(draw, n, m, depth - 1)
    if kind == "heads":
        if a.heads > 1 or b.heads > 1:
            return a, dense_a
        dense_a, dense_b = torch.broadcast_tensors(dense_a, dense_b)
        return P.per_head(a, b), torch.cat([dense_a, dense_b], dim=1)
    return (a & b, dense_a & dense_b) if kind == "and" else (a | b, dense_a | dense_b)


@st.composite
def expressions(draw, depth=3, sizes=SIZES):
    """(pattern, q_len, k_len, truth)."""
    m = draw(st.sampled_from(sizes))
    n = draw(st.one_of(st.just(m), st.sampled_from(sizes)))
    pattern, dense = tree(draw, n, m, draw(st.integers(0, depth)))
    return pattern, n, m, dense
