"""The ragged store against plain lists, and attention over it against a loop over heads."""

from __future__ import annotations

import math
import random

import pytest
import torch

from foveate.cache import RaggedStore
from foveate.cache.attend import attend


def tensors(batch, heads, n, dim=3, v_dim=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, heads, n, d, generator=g) for d in (dim, v_dim))
    return k, v


def filled(keep, seed=0, **sizes):
    batch, heads, n = keep.shape
    k, v = tensors(batch, heads, n, seed=seed, **sizes)
    at = torch.arange(n).expand(batch, heads, n)
    return RaggedStore.of(k, v, at, keep), k, v


def contents(store):
    """Per segment a dict position -> (key, value, pinned, mass)."""
    out = []
    for r in range(store.batch * store.heads):
        span = store.span(r)
        rows = zip(
            store.positions[span].tolist(),
            store.keys[span].tolist(),
            store.values[span].tolist(),
            store.pinned[span].tolist(),
            store.mass[span].tolist(),
            strict=True,
        )
        held = {p: rest for p, *rest in rows}
        assert len(held) == int(store.count[r])  # no position twice
        out.append(held)
    return out


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_changes_leaves_what_a_list_of_dicts_would(seed):
    """append (with padding), evict, reorder rows, shrink: 40 random operations; every step compared."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    heads, n = 3, 7
    keep = torch.rand(2, heads, n, generator=g) < 0.5
    store, k, v = filled(keep, seed)
    held = [
        {p: [k[b, h, p].tolist(), v[b, h, p].tolist(), False, 0.0] for p in range(n) if keep[b, h, p]}
        for b in range(2)
        for h in range(heads)
    ]
    now = n
    for _ in range(40):
        what = rng.choice(("append", "append", "evict", "rows", "shrink"))
        batch = store.batch
        if what == "append":
            new = rng.choice((1, 1, 2, 40))
            k, v = tensors(batch, heads, new, seed=rng.randrange(10**6))
            real = torch.rand(batch, new, generator=g) < (0.6 if rng.random() < 0.5 else 2.0)
            store.append(k, v, torch.arange(now, now + new).expand(batch, new), real)
            for b in range(batch):
                for h in range(heads):
                    for i in range(new):
                        if real[b, i]:
                            held[b * heads + h][now + i] = [
                                k[b, h, i].tolist(),
                                v[b, h, i].tolist(),
                                False,
                                0.0,
                            ]
            now += new
        elif what == "evict":
            drop = torch.rand(batch, heads, store.longest(), generator=g) < 0.4
            positions = store.padded("positions")
            for r in range(batch * heads):
                b, h = divmod(r, heads)
                for s in range(int(store.count[r])):
                    if drop[b, h, s]:
                        del held[r][int(positions[b, h, s])]
            store.evict(drop)
        elif what == "rows":
            rows = torch.tensor([rng.randrange(batch) for _ in range(rng.choice((1, 2, 3)))])
            store.select_rows(rows)
            held = [dict(held[int(b) * heads + h]) for b in rows for h in range(heads)]
        else:
            before = store.nbytes
            store.shrink()
            assert store.nbytes <= before
        assert contents(store) == held
        assert (store.capacity >= store.count).all()


def test_bytes_follow_what_is_kept():
    wide, _, _ = filled(torch.ones(2, 4, 500, dtype=torch.bool), dim=64, v_dim=64)
    few = torch.zeros(2, 4, 500, dtype=torch.bool)
    few[:, 0, :400] = True  # one head keeps much, the others little: the sum counts, not the largest
    few[:, 1:, :10] = True
    thin, _, _ = filled(few, dim=64, v_dim=64)
    per_token = 2 * 64 * 4 + 8 + 1 + 4
    assert wide.nbytes == 2 * 4 * (500 + 32) * per_token
    assert thin.nbytes == 2 * (400 + 3 * 10 + 4 * 32) * per_token


def test_padded_reads_back_and_valid_says_what_is_real():
    keep = torch.tensor([[[1, 0, 1, 1], [0, 1, 0, 0]]], dtype=torch.bool)
    store, k, _ = filled(keep)
    assert store.valid().tolist() == [[[True, True, True], [True, False, False]]]
    assert store.padded("positions")[0, 0].tolist() == [0, 2, 3]
    assert torch.equal(store.padded("keys")[0, 0], k[0, 0, [0, 2, 3]])
    assert torch.equal(store.padded("keys")[0, 1, 0], k[0, 1, 1])


def test_a_segment_may_be_empty():
    keep = torch.tensor([[[0, 0, 0], [1, 1, 0]]], dtype=torch.bool)
    store, *_ = filled(keep)
    q = torch.randn(1, 4, 1, 3)
    out, p = attend(q, store, scale=1.0, weights=True)
    assert p is not None
    assert (out[:, :2] == 0).all()
    assert (p[:, :2] == 0).all()
    assert torch.isfinite(out).all()


def by_loop(q, store, *, scale, allowed=None, softcap=None, sinks=None, slots=None):
    """Float64, one query at a time."""
    batch, heads, n, _ = q.shape
    group = heads // store.heads
    out = torch.zeros(batch, heads, n, store.values.shape[1], dtype=torch.float64)
    width = store.longest() if slots is None else slots.shape[2]
    weights = torch.zeros(batch, heads, n, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            r = b * store.heads + h // group
            span = store.span(r)
            keys, values = store.keys[span].double(), store.values[span].double()
            for i in range(n):
                chosen = range(len(keys)) if slots is None else slots[b, h // group].tolist()
                logits, seen = [], []
                for at, s in enumerate(chosen):
                    if s < 0 or s >= len(keys):
                        continue
                    if allowed is not None:
                        a = allowed.shape[1]
                        which = {1: 0, store.heads: h // group, heads: h}[a]
                        if not allowed[b, which, i, at]:
                            continue
                    x = float(q[b, h, i].double() @ keys[s]) * scale
                    logits.append(softcap * math.tanh(x / softcap) if softcap else x)
                    seen.append((at, s))
                if not logits:
                    continue
                sink = [] if sinks is None else [float(sinks[h])]
                p = torch.softmax(torch.tensor([*logits, *sink], dtype=torch.float64), 0)
                for (at, s), weight in zip(seen, p, strict=False):
                    out[b, h, i] += weight * values[s]
                    weights[b, h, i, at] = weight
    return out, weights


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_equals_a_loop(even, n, softcap, sinks):
    g = torch.Generator().manual_seed(n)
    keep = torch.ones(2, 3, 11, dtype=torch.bool) if even else torch.rand(2, 3, 11, generator=g) < 0.6
    store, *_ = filled(keep, seed=5)
    assert store.even == even
    q = torch.randn(2, n, 6, 3, generator=g).transpose(1, 2)  # not contiguous
    kwargs = {"scale": 0.9, "softcap": softcap, "sinks": torch.randn(6, generator=g) if sinks else None}
    for shape in (None, (2, 1, n, store.longest()), (2, 3, n, store.longest()), (2, 6, n, store.longest())):
        allowed = None if shape is None else torch.rand(shape, generator=g) < 0.7
        if allowed is not None:
            allowed[0, 0, 0] = False  # a query that may see nothing
        got, p = attend(q, store, allowed=allowed, weights=True, **kwargs)
        wanted, weights = by_loop(q, store, allowed=allowed, **kwargs)
        assert p is not None
        torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(p.double(), weights, atol=2e-6, rtol=1e-5)


def test_chosen_slots_equal_a_loop_and_unreal_ones_count_nothing():
    keep = torch.rand(2, 3, 11, generator=torch.Generator().manual_seed(1)) < 0.6
    store, *_ = filled(keep)
    q = torch.randn(2, 6, 1, 3)
    slots = torch.stack([torch.randperm(11)[:5] for _ in range(6)]).view(2, 3, 5)
    slots[0, 0, 2] = -1
    got, _ = attend(q, store, scale=1.3, slots=slots)
    wanted, _ = by_loop(q, store, scale=1.3, slots=slots)
    torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=1e-5)


def test_float64_is_computed_in_float64_and_bfloat16_in_float32():
    keep = torch.ones(1, 1, 9, dtype=torch.bool)
    k, v = (torch.randn(1, 1, 9, 4, dtype=torch.float64) for _ in range(2))
    at = torch.arange(9).expand(1, 1, 9)
    q = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    for store in (RaggedStore.of(k, v, at, keep), RaggedStore.of(k, v, at, keep & (at != 3))):
        got, _ = attend(q, store, scale=0.5)
        wanted, _ = by_loop(q, store, scale=0.5)
        torch.testing.assert_close(got, wanted, atol=1e-14, rtol=1e-13)
    low = RaggedStore.of(k.bfloat16(), v.bfloat16(), at, keep)
    got, _ = attend(q.bfloat16(), low, scale=0.5)
    wanted, _ = by_loop(q.bfloat16(), low, scale=0.5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, atol=0, rtol=2**-8)
