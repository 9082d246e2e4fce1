"""Attention in which every query chooses whole blocks of keys: its exact layout, and the gathered way to run it.

A *choice* is a bool tensor (B, H, N, C): query i of head h attends to the keys of block c. Blocks are any partition of
the keys; block[j] says which one key j belongs to.

A tile of 64 queries must visit every block that one of them chose, so queries that disagree leave little to skip.
`choice_attention` turns it round: the queries that chose a block are gathered and attend to it together, block after
block, and each query's partial results are merged by their log-sum-exp. Its work is the number of chosen pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.core.attention import attention
from foveate.core.layout import TILE, BlockLayout, pack_bits, tiles

ROWS = 1 << 18  # gathered queries per call of the engine, unless one head has more


def choice_layout(choice: Tensor, block: Tensor) -> BlockLayout:
    """The exact layout of a choice, bool (B, H, N, C), of the blocks of keys, int64 (M,), in any order of tokens.

    >>> choice = torch.tensor([[True, False], [True, True], [False, True]])[None, None]
    >>> choice_layout(choice, torch.tensor([0, 1, 1])).to_dense()[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 1], [0, 1, 1]]
    """
    batch, heads, n, blocks, m = *_checked(choice, block), len(block)
    nq, nk = tiles(n), tiles(m)
    held, words = _blocks_of_tiles(block.cpu().numpy(), nk)  # (nk, R) each
    # key tiles that hold the same columns of the same blocks share their bitmaps: they are of one kind
    kinds, kind = np.unique(np.concatenate([held, words], 1), axis=0, return_inverse=True)
    held, words, kind = kinds[:, : held.shape[1]], kinds[:, held.shape[1] :], kind.reshape(-1)
    table, rows, idx, which = [], [], [], []
    made = 0
    for row, chosen in enumerate(choice.detach().flatten(0, 1)):
        seen = np.zeros((nq * TILE, blocks), bool)
        seen[:n] = chosen.cpu().numpy()
        bits = np.zeros((nq * TILE, len(kinds)), np.int64)
        for r in range(held.shape[1]):
            bits |= np.where(seen[:, held[:, r]], words[:, r], 0)
        bits = bits.reshape(nq, TILE, -1).transpose(0, 2, 1)  # (nq, kinds, 64)
        some = bits.any(2)
        number = np.full(some.shape, -1)
        number[some] = made + np.arange(some.sum())
        made += int(some.sum())
        i, j = np.nonzero(some[:, kind])
        table.append(bits[some])
        rows.append(row * nq + i)
        idx.append(j)
        which.append(number[i, kind[j]])
    parts = [np.concatenate(x) for x in (rows, idx, table, which)]
    made_of = BlockLayout.from_tiles(n, m, *parts[:3], batch=batch, heads=heads, which=parts[3])
    return made_of.to(choice.device)


def choice_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Tensor,
    block: Tensor,
    *,
    gates: Tensor | None = None,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Attention over the chosen blocks, by gathering the queries of each block.

        out_i = sum_c w_ic o_ic,  w_ic = exp(lse_ic) / sum_c' exp(lse_ic'),  c over the blocks that query i chose,

    with o_ic and lse_ic the attention of query i over the keys of block c alone: one softmax over all of them. With
    `gates`, g_ic stands in the place of lse_ic: a softmax over blocks, and one inside each.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), as in `attention`.
        choice: bool (B, H, N, C); block: int64 (M,), numbers below C.
        gates: (B, H, N, C), logits of the blocks, finite where chosen; None for one softmax over all chosen keys.
        scale, engine: as in `attention`.

    Returns:
        (B, H, N, Dv) in q's dtype; 0 for a query that chose nothing. First derivatives of q, k, v and the gates; the
        choice has none. Partial results of about `ROWS` gathered queries (at least one head's) are held at once, and
        kept for the backward.

    >>> q, k, v = (torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    >>> choice = torch.rand(1, 2, 6, 3, generator=torch.Generator().manual_seed(3)) < 0.6
    >>> block = torch.tensor([0, 1, 2, 2, 1, 0])
    >>> gathered = choice_attention(q, k, v, choice, block)
    >>> torch.allclose(gathered, attention(q, k, v, choice_layout(choice, block)), atol=1e-6)
    True
    """
    batch, heads, n, _ = _checked(choice, block)
    shapes = [tuple(t.shape) if isinstance(t, Tensor) and t.ndim == 4 else (0, 0, 0, 0) for t in (q, k, v)]
    kv_heads, m = shapes[1][1:3]
    keys = (batch, kv_heads, len(block))
    if (
        shapes[0][:3] != (batch, heads, n)
        or any(s[:3] != keys for s in shapes[1:])
        or not kv_heads
        or heads % kv_heads
    ):
        raise ValueError(
            f"a choice of shape {tuple(choice.shape)} over {len(block)} keys needs q ({batch}, {heads}, {n}, D) and "
            f"k, v ({batch}, Hkv, {len(block)}, D), {heads} a multiple of Hkv; got {', '.join(map(str, shapes))}"
        )
    if gates is not None and tuple(gates.shape) != tuple(choice.shape):
        raise ValueError(
            f"gates must have the shape {tuple(choice.shape)} of choice, got {tuple(gates.shape)}"
        )
    order = torch.argsort(block, stable=True)
    if not torch.equal(order, torch.arange(m, device=order.device)):
        k, v = k.index_select(2, order.to(k.device)), v.index_select(2, order.to(v.device))
    counts = torch.bincount(block, minlength=choice.shape[3])
    items = choice.detach().flatten(0, 1) & (counts > 0).to(choice.device)  # (B H, N, C)
    sizes, queries = counts.cpu().numpy(), q.reshape(-1, q.shape[3])
    groups, parts, first = heads // kv_heads, [], 0
    while first < len(items):
        last = first + 1
        total = int(items[first].sum())
        while last < len(items) and (total := total + int(items[last].sum())) <= ROWS:
            last += 1
        low, high = first // groups * m, ((last - 1) // groups + 1) * m
        own = np.arange(first, last) // groups * m - low  # where each item's keys start among those passed on
        keys, values = (t.flatten(0, 2)[low:high] for t in (k, v))
        mine = queries[first * n : last * n]
        given = None if gates is None else gates.flatten(0, 1)[first:last]
        parts.append(_gathered(mine, keys, values, items[first:last], own, sizes, given, scale, engine))
        first = last
    return torch.cat(parts).view(batch, heads, n, -1)


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Tensor,
    own: np.ndarray,
    sizes: np.ndarray,
    gates: Tensor | None,
    scale: Any,
    engine: str,
) -> Tensor:
    """Some heads, their queries (items * N, D) and keys (L, D) one after another; `own`: their first keys."""
    items, n, blocks = choice.shape
    item, c, i = choice.transpose(1, 2).nonzero(as_tuple=True)  # pairs, by item, block and query
    target = item * n + i
    if len(target) == 0:
        return q.new_zeros(items * n, v.shape[1]) + 0 * (q.sum() + k.sum() + v.sum())
    counts = torch.bincount(item * blocks + c, minlength=items * blocks)
    padded = (counts + TILE - 1) // TILE * TILE  # a tile of queries belongs to one block
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    place = torch.arange(len(target), device=q.device) + torch.repeat_interleave(shift, counts)
    source = torch.zeros(int(padded.sum()), dtype=torch.int64, device=q.device).index_put((place,), target)
    starts = (own[:, None] + np.cumsum(sizes) - sizes).reshape(-1)
    layout = _segments(padded.cpu().numpy() // TILE, starts, np.tile(sizes, items), len(source), len(k))
    out, lse = attention(
        q.index_select(0, source)[None, None], k[None, None], v[None, None], layout.to(q.device), scale=scale,
        return_lse=True, engine=engine,
    )  # fmt: skip
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = lse[0, 0, place] if gates is None else gates[item, i, c].to(wide)  # (pairs,)
    top = torch.full((items * n,), -torch.inf, dtype=lse.dtype, device=q.device)
    top = top.scatter_reduce(0, target, lse.detach(), "amax")
    weight = (lse - top[target]).exp()
    total = torch.zeros_like(top).index_add(0, target, weight)
    weight = weight / total[target]
    return _WeightedSum.apply(out[0, 0].to(wide), weight, place, target, items * n).to(q.dtype)  # pyright: ignore


def _segments(rows: np.ndarray, starts: np.ndarray, sizes: np.ndarray, q_len: int, k_len: int) -> BlockLayout:
    """Layout in which `rows[s]` tiles of queries see the keys starts[s] ... starts[s] + sizes[s] - 1."""
    used = (rows > 0) & (sizes > 0)
    ends = starts + sizes
    first, last = starts // TILE, (ends - 1) // TILE
    column = np.arange(TILE)
    at_first = column >= (starts - first * TILE)[:, None]
    at_last = column < (ends - last * TILE)[:, None]
    at_first = np.where((first == last)[:, None], at_first & at_last, at_first)
    words = pack_bits(np.stack([at_first, at_last], 1).reshape(-1, TILE))  # bitmaps 2 s and 2 s + 1
    segment = np.repeat(np.arange(len(rows)), rows)  # of each tile of queries
    wide = np.where(used, last - first + 1, 0)[segment]
    row = np.repeat(np.arange(len(segment)), wide)
    step = np.arange(len(row)) - np.repeat(np.cumsum(wide) - wide, wide)
    segment = segment[row]
    idx = first[segment] + step
    which = np.where(idx == first[segment], 2 * segment, np.where(idx == last[segment], 2 * segment + 1, -1))
    return BlockLayout.from_tiles(q_len, k_len, row, idx, np.repeat(words[:, None], TILE, 1), which=which)


class _WeightedSum(torch.autograd.Function):
    """out[t] = sum over pairs p with target[p] = t of weight[p] x[place[p]]; places differ."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, place: Tensor, target: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, weight, place, target)
        order = torch.argsort(target, stable=True)
        counts = torch.bincount(target, minlength=size)
        return torch.nn.functional.embedding_bag(
            place[order],
            x,
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=weight[order].to(x.dtype),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        x, weight, place, target = ctx.saved_tensors
        grad = grads[0][target]  # (pairs, Dv)
        towards = torch.zeros_like(x).index_copy(0, place, grad * weight[:, None].to(x.dtype))
        return towards, (grad * x[place]).sum(-1).to(weight.dtype), None, None, None


def _blocks_of_tiles(block: np.ndarray, nk: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks in each tile of keys and their columns as words, int64 (nk, R) each, filled up with empty words."""
    place = np.arange(len(block))
    order = np.lexsort((block, place // TILE))
    tile, kind = (place // TILE)[order], block[order]
    bits = np.uint64(1) << (place[order] % TILE).astype(np.uint64)
    new = np.flatnonzero(np.r_[True, (tile[1:] != tile[:-1]) | (kind[1:] != kind[:-1])])
    tile, kind, word = tile[new], kind[new], np.bitwise_or.reduceat(bits, new).view(np.int64)
    counts = np.bincount(tile, minlength=nk)
    rank = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    held, words = np.zeros((2, nk, counts.max()), np.int64)
    held[tile, rank], words[tile, rank] = kind, word
    return held, words


def _checked(choice: Tensor, block: Tensor) -> tuple[int, int, int, int]:
    if not isinstance(choice, Tensor) or choice.dtype != torch.bool or choice.ndim != 4:
        got = f"{choice.dtype} {tuple(choice.shape)}" if isinstance(choice, Tensor) else type(choice).__name__
        raise TypeError(f"choice must be a bool tensor (batch, heads, queries, blocks), got {got}")
    if not isinstance(block, Tensor) or block.dtype != torch.int64 or block.ndim != 1 or not len(block):
        got = f"{block.dtype} {tuple(block.shape)}" if isinstance(block, Tensor) else type(block).__name__
        raise TypeError(f"block must be an int64 tensor (keys,), got {got}")
    if int(block.min()) < 0 or int(block.max()) >= choice.shape[3]:
        raise ValueError(
            f"block must hold numbers below {choice.shape[3]}, the blocks of choice; "
            f"got {int(block.min())} to {int(block.max())}"
        )
    batch, heads, n, blocks = choice.shape
    return batch, heads, n, blocks
