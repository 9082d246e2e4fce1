"""Boundaries between chunks of keys: evenly spaced, or where a score is high."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.patterns.base import integer


def fixed_boundaries(k_len: int, chunk: int, *, forced: int | None = None) -> Tensor:
    """int64 (C + 1,): 0, chunk, 2 chunk, ... and k_len; besides `forced`, where a chunk must start.

    >>> fixed_boundaries(10, 4, forced=9).tolist()
    [0, 4, 8, 9, 10]
    """
    k_len, chunk = (
        integer("fixed_boundaries", name, x, 1) for name, x in (("k_len", k_len), ("chunk", chunk))
    )
    inside = torch.arange(0, k_len, chunk)
    ends = [k_len] if forced is None else [integer("fixed_boundaries", "forced", forced, 0, k_len), k_len]
    return torch.unique(torch.cat([inside, torch.tensor(ends)]))


@torch.no_grad()
def select_boundaries(
    score: Tensor, theta: float = 1.1, max_chunks: int | None = None, nms: int = 8, forced: int | None = None
) -> Tensor:
    """Where chunks start, from a score of each position: a boundary lies *after* a chosen position.

    Positions with a score above theta, the largest first, are taken unless they are within `nms` positions of one that
    is taken (non-maximum suppression); then 0 and the length N are added.

    Args:
        score: (B, N).
        theta: least score, not included.
        max_chunks: most positions that are taken, the forced one among them; None for no limit.
        nms: half-width of the suppression; 0 for none.
        forced: a chunk must start there, 0 <= forced <= N; no other starts after it.

    Returns:
        int64 (B, C + 1), ascending in each row: 0 first, N last. Rows with fewer chunks than others are filled up
        with N, which makes empty chunks.

    >>> score = torch.tensor([[0.0, 2.0, 1.5, 0.0, 0.0, 3.0, 0.0, 0.0]])
    >>> select_boundaries(score, theta=1.0, nms=1).tolist()
    [[0, 2, 6, 8]]
    """
    if (
        not isinstance(score, Tensor)
        or score.ndim != 2
        or not score.is_floating_point()
        or score.shape[1] < 1
    ):
        got = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"score must be a float tensor (batch, length), got {got}")
    nms = integer("select_boundaries", "nms", nms, 0)
    n = score.shape[1]
    most = n if max_chunks is None else integer("select_boundaries", "max_chunks", max_chunks, 1)
    start = n if forced is None else integer("select_boundaries", "forced", forced, 0, n)
    rows = []
    for row in score[:, : min(start, n - 1)].float().cpu():
        order = row.argsort(descending=True, stable=True)
        near = bytearray(n + 2 * nms)  # place t + nms: within nms of a taken one
        chosen = [start] if 0 < start < n else []
        if chosen:
            near[start - 1 : start + 2 * nms] = b"\x01" * (2 * nms + 1)
        for t in order[: int((row > theta).sum())].tolist():
            if len(chosen) >= most:
                break
            if not near[t + nms]:
                chosen.append(t + 1)
                near[t : t + 2 * nms + 1] = b"\x01" * (2 * nms + 1)
        rows.append(torch.tensor([0, *sorted(chosen), n]))
    longest = max(len(row) for row in rows)
    filled = [torch.nn.functional.pad(row, (0, longest - len(row)), value=n) for row in rows]
    return torch.stack(filled).to(score.device)
