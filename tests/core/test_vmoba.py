"""VMoBA against a brute-force writing of its steps, pair by pair, and against what must hold of it."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

import foveate as fv
from foveate.core.patterns import tile_major
from foveate.core.selectors import vmoba as module
from foveate.core.selectors.vmoba import VMoBA, largest, vmoba_attention, vmoba_cycle

GRID = (4, 3, 5)  # 60 tokens
KINDS = {
    "time": (GRID, (1, 3, 5)),
    "part of a frame": ((60,), (17,)),
    "space": (GRID, (4, 3, 1)),
    "both": (GRID, (2, 3, 1)),
    "both, ragged": (GRID, (3, 2, 2)),
}
MODES = [("threshold", s) for s in ("head", "query", "block", "all")] + [
    ("topk", s) for s in ("head", "query", "all")
]


def tensors(batch, heads, kv_heads, n, dim=8, seed=0, dtype=torch.float64, shared=0.5):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, n, dim, generator=g, dtype=torch.float64)
    k = k + shared * torch.randn(batch, kv_heads, 1, dim, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


# ------------------------------------------------------------------------------------------------ the oracle
def oracle_blocks(shape, block):
    """Block number of each token in row-major order; blocks counted in row-major order too."""
    per_axis = [math.ceil(n / b) for n, b in zip(shape, block, strict=True)]
    numbers = []
    for cell in itertools.product(*map(range, shape)):
        number = 0
        for x, b, count in zip(cell, block, per_axis, strict=True):
            number = number * count + x // b
        numbers.append(number)
    return numbers


def oracle_pool(pairs, gate, own, cfg):
    """The pairs of one pool that are chosen; pairs are (head, query, block)."""
    mine = [p for p in pairs if p in own]
    others = sorted((p for p in pairs if p not in own), key=lambda p: -gate[p])
    chosen = set(mine)
    if cfg.mode == "topk":
        return chosen | set(others[: (cfg.topk - 1) * len(mine)])
    low, high = min(gate[p] for p in pairs), max(gate[p] for p in pairs)
    span = high - low if high - low > 1e-6 else 1.0
    share = {p: (gate[p] - low) / span for p in pairs}
    total = math.fsum(share.values()) + 1e-6
    need = max(cfg.tau - math.fsum(share[p] for p in mine) / total, 0.0)
    held = 0.0
    for p in others:
        chosen.add(p)
        held += share[p]
        if held / total >= need:
            break
    return chosen


@functools.cache
def oracle_gates(q, k, block):
    """(head, query, block) -> gate, from tuples of numbers."""
    gate, groups = {}, len(q) // len(k)
    for h, queries in enumerate(q):
        for c in range(max(block) + 1):
            members = [key for key, number in zip(k[h // groups], block, strict=True) if number == c]
            mean = [math.fsum(x) / len(members) for x in zip(*members, strict=True)]
            for i, query in enumerate(queries):
                gate[h, i, c] = math.fsum(a * b for a, b in zip(query, mean, strict=True))
    return gate


def nested(x):
    return tuple(map(nested, x)) if isinstance(x, list) else x


def oracle(q, k, cfg):
    """The choice of one batch row, bool (H, N, C); q (H, N, D), k (Hkv, N, D)."""
    block = oracle_blocks(cfg.shape, cfg.block)
    heads, n, count = len(q), len(block), max(block) + 1
    gate = oracle_gates(nested(q.tolist()), nested(k.tolist()), tuple(block))
    own = {(h, i, block[i]) for h in range(heads) for i in range(n)}
    keys = {"head": lambda p: p[0], "query": lambda p: p[:2], "block": lambda p: p[2], "all": lambda p: 0}
    pools = {}
    for p in gate:
        pools.setdefault(keys[cfg.scope](p), []).append(p)
    choice = torch.zeros(heads, n, count, dtype=torch.bool)
    for pairs in pools.values():
        for p in oracle_pool(pairs, gate, own, cfg):
            choice[p] = True
    return choice


# ------------------------------------------------------------------------------------------------- the tests
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "scope"), MODES)
@pytest.mark.parametrize("sorted_pools", [1, 1 << 12])  # cut by a histogram first, and sorted at once
def test_equals_the_oracle(kind, mode, scope, sorted_pools, monkeypatch):
    monkeypatch.setattr(module, "SORTED", sorted_pools)
    q, k = tensors(1, 4, 2, 60)
    for tau, topk in ((0.0, 1), (0.25, 2), (0.8, 3)):
        cfg = VMoBA(*KINDS[kind], tau=tau, mode=mode, scope=scope, topk=topk)
        got = cfg.select(q, k)
        assert torch.equal(got[0], oracle(q[0], k[0], cfg)), tau
        assert not got.all()


def test_equals_the_oracle_on_a_line_of_prime_length():
    q, k = tensors(1, 2, 1, 131, dim=3, seed=4)
    cfg = VMoBA(131, 13, tau=0.4)
    assert torch.equal(cfg.select(q, k)[0], oracle(q[0], k[0], cfg))


@pytest.mark.parametrize("seed", range(5))
def test_histogram_and_sorting_agree(seed, monkeypatch):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(7, 500, generator=g).mul(3).round().div(3)  # many ties
    values[3] = 1.0
    values[4, 0] = 1e9
    weights = torch.rand(7, 500, generator=g).mul(4).floor()
    weights[:, ::7] = 0
    for need in (0.0, 1e-9, 1.0, 37.0, 5e2, 1e9):
        for least in (0, 1):
            needs = torch.full((7,), need, dtype=torch.float64)
            monkeypatch.setattr(module, "SORTED", 10_000)
            one = largest(values, weights, needs, least)
            monkeypatch.setattr(module, "SORTED", 1)
            assert torch.equal(one, largest(values, weights, needs, least))
            for row in range(7):
                order = sorted(range(500), key=lambda i: (-values[row, i].item(), i))
                held, want = 0.0, set(order[:least])
                for i in order:
                    if held >= need:
                        break
                    want.add(i)
                    held += weights[row, i].item()
                assert set(one[row].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [{"tau": 1.0}, {"tau": 1.5}, {"mode": "topk", "topk": 60}])
@pytest.mark.parametrize("scope", ["head", "query", "all"])
def test_the_limit_is_full_attention(kind, cfg, scope):
    q, k = tensors(1, 4, 2, 60, dtype=torch.float32)
    v = torch.randn(1, 2, 60, 8)
    chooser = VMoBA(*KINDS[kind], scope=scope, **cfg)
    assert chooser.select(q, k).all()
    full = fv.attention(q, k, v, engine="reference")
    torch.testing.assert_close(vmoba_attention(q, k, v, chooser), full, atol=1e-5, rtol=0)
    torch.testing.assert_close(fv.attention(q, k, v, chooser), full, atol=1e-5, rtol=0)


def test_tau_one_is_full_in_every_scope():
    q, k = tensors(1, 2, 1, 60)
    assert VMoBA(GRID, (2, 2, 2), tau=1.0, scope="block").select(q, k).all()


def test_blocks_are_cells_of_the_grid_and_the_order_makes_them_contiguous():
    chooser = VMoBA((4, 6, 10), (2, 3, 5))
    place = torch.cartesian_prod(*(torch.arange(n) for n in (4, 6, 10)))
    for c in range(8):
        cells = place[chooser.blocks == c]
        assert len(cells) == 30
        assert (cells.amax(0) - cells.amin(0)).tolist() == [1, 2, 4]
    order = tile_major((4, 6, 10), (2, 3, 5))
    x = torch.randn(240, 3)
    assert torch.equal(order.undo(order.apply(x)), x)
    assert order.apply(chooser.blocks, 0).tolist() == [c for c in range(8) for _ in range(30)]
    # two axes: tiles over all frames, in the order tiles, frame, row, column
    space = tile_major((4, 6, 10), (4, 3, 5)).permutation.view(2, 2, 4, 3, 5)
    cell = torch.arange(240).view(4, 2, 3, 2, 5)
    assert torch.equal(space, cell.permute(1, 3, 0, 2, 4))


def test_the_cycle_of_layers():
    time, space, both = vmoba_cycle((4, 6, 10), frames=1.5, tile=(3, 5), cube=(2, 3, 5), tau=0.3, text=2)
    assert time.blocks[:240].tolist() == [i // 90 for i in range(240)]
    assert torch.bincount(time.blocks).tolist() == [90, 90, 60, 2]
    assert torch.bincount(space.blocks).tolist() == [60] * 4 + [2]
    assert torch.bincount(both.blocks).tolist() == [30] * 8 + [2]
    assert {c.tau for c in (time, space, both)} == {0.3}
    for frames in (0.001, 5):
        with pytest.raises(ValueError, match="frames must make blocks of 1 to 240 tokens"):
            vmoba_cycle((4, 6, 10), frames=frames, tile=(3, 5), cube=(2, 3, 5))
    with pytest.raises(ValueError, match="shape must be"):
        vmoba_cycle((4, 6), frames=1, tile=(3, 5), cube=(2, 3, 5))


@pytest.mark.parametrize("scope", ["head", "query", "block", "all"])
def test_own_blocks_and_growth_with_tau(scope):
    q, k = tensors(2, 4, 2, 60, seed=3)
    own = VMoBA(GRID, (2, 2, 2)).blocks
    last = torch.zeros(2, 4, 60, 12, dtype=torch.bool)
    counts = []
    for tau in (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0):
        got = VMoBA(GRID, (2, 2, 2), tau=tau, scope=scope).select(q, k)
        assert got[:, :, torch.arange(60), own].all()
        assert (got | last).equal(got)  # more, and never others
        last = got
        counts.append(got.sum((2, 3)))
    assert (torch.stack(counts).diff(dim=0) >= 0).all()
    assert (counts[-1] > counts[0]).all()


def test_the_others_of_a_head_are_its_largest_gates():
    q, k = tensors(1, 3, 3, 60, seed=5)
    chooser = VMoBA(GRID, (2, 2, 2))
    chosen = chooser.select(q, k)[0]
    mean = torch.stack([k[0, :, chooser.blocks == c].mean(1) for c in range(12)], 1)
    gate = q[0] @ mean.mT  # (H, N, C)
    others = torch.nn.functional.one_hot(chooser.blocks, 12) == 0
    for h in range(3):
        taken, left = gate[h][others & chosen[h]], gate[h][others & ~chosen[h]]
        assert len(taken) > 60
        assert taken.min() > left.max()
    per_query = chosen.sum(-1)
    assert per_query.unique().numel() > 2  # queries differ in how many blocks they get


def test_topk_of_a_query_is_plain_mixture_of_blocks():
    """Each query: its own block and the topk - 1 others with the largest gates."""
    q, k = tensors(1, 2, 1, 131, seed=6)
    chooser = VMoBA(131, 20, mode="topk", scope="query", topk=3)
    chosen = chooser.select(q, k)[0]
    for h in range(2):
        for i in range(131):
            gates = [float(q[0, h, i] @ k[0, 0, c * 20 : c * 20 + 20].mean(0)) for c in range(7)]
            gates[i // 20] = math.inf
            best = sorted(range(7), key=lambda c: -gates[c])[:3]
            assert chosen[h, i].nonzero().flatten().tolist() == sorted(best)


def test_equal_gates():
    """No gate above the least: the share is out of reach and all are chosen; of equal ones the first are."""
    q, k = torch.zeros(1, 1, 60, 4), torch.randn(1, 1, 60, 4)
    assert VMoBA(GRID, (2, 2, 2), tau=0.25).select(q, k).all()
    few = VMoBA(GRID, (4, 3, 1), mode="topk", topk=2).select(q, k)[0, 0]
    assert few.sum() == 120
    assert few[:15].sum(1).tolist() == [5] * 15  # 4 others each, and then no more
    assert few[15:].sum(1).tolist() == [1] * 45


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [0, 7])
def test_gathered_attention_is_attention_over_the_layout(kind, text):
    q, k = tensors(2, 4, 2, 60 + text, seed=7)
    v = torch.randn(2, 2, 60 + text, 5, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    chooser = VMoBA(*KINDS[kind], tau=0.3, text=text)
    choice = chooser.select(q, k)
    mask = choice[..., chooser.blocks]
    logits = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~mask, -torch.inf)
    want = torch.softmax(logits, -1) @ v.repeat_interleave(2, 1)
    towards = torch.randn_like(want)
    exact = torch.autograd.grad(want, leaves, towards)
    assert torch.equal(chooser.layout(q, k).to_dense(), mask)
    for out in (vmoba_attention(q, k, v, chooser), fv.attention(q, k, v, chooser, engine="reference")):
        torch.testing.assert_close(out, want, atol=1e-10, rtol=0)
        for got, grad in zip(torch.autograd.grad(out, leaves, towards), exact, strict=True):
            torch.testing.assert_close(got, grad, atol=1e-9, rtol=0)


def test_text_is_seen_by_all_sees_all_and_changes_no_choice():
    q, k = tensors(1, 2, 2, 64, seed=8)
    chooser = VMoBA(GRID, (2, 2, 2), text=4)
    chosen = chooser.select(q, k)
    assert chosen.shape == (1, 2, 64, 13)
    assert chosen[:, :, 60:].all()
    assert chosen[..., 12].all()
    grid = VMoBA(GRID, (2, 2, 2)).select(q[:, :, :60], k[:, :, :60])
    assert torch.equal(chosen[:, :, :60, :12], grid)
    assert chooser.layout(q, k).to_dense()[:, :, 60:].all()
    assert chooser.layout(q, k).to_dense()[..., 60:].all()


def test_any_order_of_tokens_gives_the_same_choice():
    q, k = tensors(1, 2, 1, 60, seed=9)
    v = torch.randn(1, 1, 60, 8, dtype=torch.float64)
    rows = VMoBA(GRID, (2, 2, 2))
    for order in (tile_major(GRID, (2, 2, 2)), "hilbert"):
        other = VMoBA(GRID, (2, 2, 2), order=order)
        moved = [other.order.apply(t) for t in (q, k, v)]
        assert torch.equal(other.order.undo(other.select(*moved[:2])), rows.select(q, k))
        out = other.order.undo(vmoba_attention(*moved, other))
        torch.testing.assert_close(out, vmoba_attention(q, k, v, rows), atol=1e-10, rtol=0)


@pytest.mark.parametrize("scope", ["head", "query", "block", "all"])
def test_heads_and_batch_rows(scope, monkeypatch):
    q, k = tensors(3, 4, 2, 60, seed=10)
    chooser = VMoBA(GRID, (2, 2, 2), scope=scope)
    whole = chooser.select(q, k)
    monkeypatch.setattr(module, "CHUNK", 1)  # head by head, where heads do not compete
    assert torch.equal(whole, chooser.select(q, k))
    for b in range(3):
        assert torch.equal(whole[b : b + 1], chooser.select(q[b : b + 1], k[b : b + 1]))
    copied = chooser.select(q, k.repeat_interleave(2, 1))
    assert torch.equal(whole, copied)
    if scope in ("head", "query"):
        assert torch.equal(whole[:, 3:], chooser.select(q[:, 3:], k[:, 1:]))


def test_low_precision_strides_and_gradients_do_not_matter():
    q, k = tensors(2, 4, 2, 60, dtype=torch.bfloat16)
    chooser = VMoBA(GRID, (2, 2, 2))
    base = chooser.select(q, k)
    assert torch.equal(base, chooser.select(q.float(), k.float()))
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(base, chooser.select(*strided))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda held: held):
        chooser.select(q.requires_grad_(), k)
    assert not kept  # nothing is kept for a backward
    assert vmoba_attention(q, k, k, chooser).dtype == torch.bfloat16


def test_extreme_and_spoilt_inputs_leave_a_choice():
    q, k = tensors(1, 1, 1, 60, dtype=torch.float32)
    q[0, 0, 3], k[0, 0, 5] = 3e30, 3e30  # the product overflows
    q[0, 0, 7] = torch.nan
    for scope in ("head", "query"):
        for size in (1, 1 << 12):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "SORTED", size)
                chosen = VMoBA(GRID, (2, 2, 2), scope=scope).select(q, k)
                assert chosen[0, 0, torch.arange(60), VMoBA(GRID, (2, 2, 2)).blocks].all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": (2, 2)}, "block must be one int or 3"),
        ({"block": (5, 1, 1)}, "block must be an int >= 1 and <= 4, got 5"),
        ({"block": (0, 1, 1)}, "block"),
        ({"shape": ()}, "shape"),
        ({"tau": -0.1}, "tau must be a finite number >= 0"),
        ({"tau": math.inf}, "tau"),
        ({"tau": True}, "tau"),
        ({"mode": "best"}, "mode must be one of threshold, topk, got 'best'"),
        ({"scope": "heads"}, "scope must be one of head, query, block, all"),
        ({"mode": "topk", "scope": "block"}, "topk has no scope block"),
        ({"topk": 0}, "topk must be an int >= 1, got 0"),
        ({"text": -1}, "text"),
        ({"order": "raster"}, "order"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        VMoBA(**{"shape": GRID, "block": (2, 2, 2), **settings})


def test_inputs_are_checked():
    chooser = VMoBA(GRID, (2, 2, 2))
    q, k = tensors(1, 4, 2, 60)
    with pytest.raises(ValueError, match="is_causal=True"):
        chooser.layout(q, k, is_causal=True)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        chooser.select(q[:, :3], k)
    with pytest.raises(ValueError, match="q must be a tensor"):
        chooser.select(q[0], k)
    with pytest.raises(ValueError, match="needs 60 queries and keys, got 59 and 60"):
        chooser.select(q[:, :, :59], k)
    with pytest.raises(ValueError, match="needs q"):
        vmoba_attention(q, k, k[:, :, :59], chooser)
    with pytest.raises(TypeError, match="unexpected keyword"):
        VMoBA(GRID, (2, 2, 2), budget=3)  # pyright: ignore[reportCallIssue]
