"""Attention recall: the share of the dense attention mass that a layout keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout, unpack_bits
from foveate.core.patterns import Causal
from foveate.core.selectors.base import Selector

CHUNK = 1 << 25  # logits held at once


def row_masks(layout: BlockLayout, rows: Tensor) -> Tensor:
    """Bool (batch, heads, R, M) of the layout's own batch and heads: the keys that some of its queries see.

    Args:
        rows: int64 (R,), query numbers.

    >>> layout = Causal().layout(100)
    >>> row_masks(layout, torch.tensor([0, 70])).sum(-1).tolist()
    [[[1, 71]]]
    """
    at = rows.detach().cpu().numpy()
    ptr, idx, ids = (t.cpu().numpy() for t in (layout.row_ptr, layout.tile_idx, layout.tile_id))
    words = np.concatenate([np.full((1, TILE), -1, np.int64), layout.dictionary.cpu().numpy()])
    lists = np.arange(layout.batch * layout.heads)[:, None] * layout.q_tiles + at // TILE  # (B H, R)
    lists = lists.reshape(-1)
    counts = ptr[lists + 1] - ptr[lists]
    owner = np.repeat(np.arange(len(lists)), counts)
    entry = (
        np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(ptr[lists], counts)
    )
    held = np.zeros((len(lists), layout.k_tiles), np.int64)
    held[owner, idx[entry]] = words[ids[entry], (at % TILE)[owner % len(at)]]
    seen = unpack_bits(held).reshape(layout.batch, layout.heads, len(at), -1)[..., : layout.k_len]
    return torch.from_numpy(np.ascontiguousarray(seen))


@torch.no_grad()
def attention_recall(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    *,
    rows: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
) -> Tensor:
    """For each head and row, the share of the dense softmax that lies on the pairs of the layout.

        recall_i = sum over j kept of p_ij,   p_i = softmax over all (earlier) keys j of scale q_i . k_j

    Exact: whole rows of p are formed, some at a time, and never N x M.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D), H a multiple of Hkv; causal positions are bottom-right aligned.
        layout: N x M, its batch and heads 1 or those of q. Pairs that the dense map does not have add nothing.
        rows: int64 (R,), the queries that are looked at; default all.
        scale: factor on q k^T; default D ** -0.5.
        is_causal: whether the dense map is causal.

    Returns:
        float64 (B, H, R), in [0, 1].

    Raises:
        ValueError: shapes that do not fit.

    >>> q = k = torch.zeros(1, 1, 4, 2)  # uniform attention: row i has mass 1 / (i + 1) per key
    >>> attention_recall(q, k, Causal().layout(4)).tolist()
    [[[1.0, 1.0, 1.0, 1.0]]]
    >>> from foveate.patterns import SlidingWindow
    >>> attention_recall(q, k, (Causal() & SlidingWindow(1)).layout(4)).tolist()
    [[[1.0, 0.5, 0.3333333333333333, 0.25]]]
    """
    batch, heads, n, dim = q.shape
    kv_heads, m = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != dim or heads % kv_heads:
        raise ValueError(f"q and k do not fit each other: {tuple(q.shape)} and {tuple(k.shape)}")
    if (
        (layout.q_len, layout.k_len) != (n, m)
        or layout.batch not in (1, batch)
        or layout.heads not in (1, heads)
    ):
        raise ValueError(
            f"layout is {layout.batch} x {layout.heads} of {layout.q_len} x {layout.k_len}; "
            f"q and k need {batch} x {heads} of {n} x {m}, or 1 in place of batch and heads"
        )
    rows = torch.arange(n) if rows is None else rows.cpu()
    scale = float(dim**-0.5 if scale is None else scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(wide).unsqueeze(2).transpose(-1, -2)  # (B, Hkv, 1, D, M)
    column = torch.arange(m, device=q.device)
    out = torch.empty(batch, heads, len(rows), dtype=torch.float64)
    step = max(1, CHUNK // (batch * heads * m))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        mine = q[:, :, part.to(q.device)].to(wide).unflatten(1, (kv_heads, -1))  # (B, Hkv, G, r, D)
        logits = torch.matmul(mine, keys).mul_(scale).flatten(1, 2)  # (B, H, r, M)
        if is_causal:
            logits.masked_fill_(column > (part.to(q.device) + (m - n))[:, None], -torch.inf)
        mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        whole = mass.sum(-1, dtype=torch.float64)
        kept = mass.mul_(row_masks(layout, part).to(q.device)).sum(-1, dtype=torch.float64)
        out[:, :, first : first + step] = (kept / whole).clamp_(max=1.0).cpu()
    return out


def sampled_rows(n: int, count: int, seed: int) -> Tensor:
    """At most `count` different queries, one drawn from each of as many equal stretches of the n; ascending.

    >>> sampled_rows(8, 100, 0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    count = min(count, n)
    edges = np.arange(count + 1) * n // count
    drawn = np.random.default_rng([seed, n]).random(count)
    return torch.from_numpy(edges[:-1] + (drawn * np.diff(edges)).astype(np.int64))


@dataclass(frozen=True)
class Sample:
    """Queries and keys of one layer, and how they are scaled."""

    layer: int
    q: Tensor
    k: Tensor
    scale: float | None


@dataclass(frozen=True, eq=False)
class Recorder(Selector):
    """Keeps the queries and keys that it is given, and selects everything."""

    seen: list[tuple[Tensor, Tensor, float | None]]

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        self.seen.append((q, k, scale))
        return Causal().layout(q.shape[2], k.shape[2])


@torch.no_grad()
def samples(model: Any, ids: Tensor, layers: int, seed: int) -> list[Sample]:
    """Queries and keys of at most `layers` layers of a model that attends densely to ids (n,), drawn by seed.

    Only layers whose own rule is plainly causal are drawn from; others (windows, chunks) have another dense map.
    """
    import foveate.hf as hf

    n = len(ids)
    given = {"input_ids": ids[None].to(model.device), "use_cache": False}
    with hf.apply(model, "dense", phase="prefill") as handle:
        model(**given)
    heads, causal = model.config.get_text_config().num_attention_heads, n * (n + 1) // 2
    plain = sorted(
        layer.layer
        for layer in handle.report().layers
        if layer.kind == "self" and layer.calls == 1 and layer.rule_area == heads * causal
    )
    if not plain:
        return []
    chosen = np.random.default_rng(seed).choice(plain, size=min(layers, len(plain)), replace=False)
    recorder = Recorder([])
    drawn = sorted(int(x) for x in chosen)
    with hf.apply(model, recorder, layers=drawn, phase="prefill"):
        model(**given)
    return [Sample(layer, *seen) for layer, seen in zip(drawn, recorder.seen, strict=True)]
