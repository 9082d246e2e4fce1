"""Agent attention: a few pooled tokens read all keys, and hand what they read to every query."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.patterns.base import integer
from foveate.core.scores import Bias


def pool_agents(q: Tensor, agents: int | tuple[int, int], grid: tuple[int, int] | None = None) -> Tensor:
    """Agents as means of the queries of a cell: adaptive average pooling per head.

        a_m = mean of q_i over cell m;  cell m of p on a side of s tokens is  floor(m s / p) .. ceil((m + 1) s / p) - 1

    Args:
        q: (B, H, N, D).
        agents: n, cells of a line (grid None); or (rows, columns) of cells on a grid.
        grid: (h, w) with h w = N, the tokens in row-major order; None: tokens on a line.

    Returns:
        (B, H, n, D), n = rows * columns, in q's dtype, averaged in at least float32.

    >>> q = torch.arange(6.0).view(1, 1, 6, 1)
    >>> pool_agents(q, 2).flatten().tolist(), pool_agents(q, (1, 3), (2, 3)).flatten().tolist()
    ([1.0, 4.0], [1.5, 2.5, 3.5])
    """
    cells = agents if isinstance(agents, tuple) else (1, agents)
    if len(cells) != 2 or (isinstance(agents, tuple) != (grid is not None)):
        raise ValueError(
            "pool_agents: agents must be (rows, columns) with a grid and an int without; "
            f"got agents={agents!r}, grid={grid!r}"
        )
    rows, columns = (integer("pool_agents", "agents", cell, 1) for cell in cells)
    side = (1, q.shape[2]) if grid is None else grid
    if q.ndim != 4 or side[0] * side[1] != q.shape[2]:
        raise ValueError(f"pool_agents: q must be (B, H, h * w, D), got {tuple(q.shape)} for grid {grid}")
    wide = q.to(torch.promote_types(q.dtype, torch.float32)).mT.unflatten(3, side)  # (B, H, D, h, w)
    pooled = F.adaptive_avg_pool2d(wide.flatten(0, 1), (rows, columns))  # (B H, D, rows, columns)
    return pooled.flatten(2).mT.unflatten(0, q.shape[:2]).to(q.dtype)


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor | int = 49,
    *,
    bias_agg: Tensor | None = None,
    bias_bcast: Tensor | None = None,
    scale: float | None = None,
    scale_bcast: float | None = None,
    dropout_p: float = 0.0,
    engine: str = "auto",
) -> Tensor:
    """Two thin softmax attentions in a row: agents read the keys, queries read the agents.

        V~ = softmax(scale A K^T + B1) V,   O = softmax(scale' Q A^T + B2) V~

    This is linear attention, O = phi_q(Q) phi_k(K)^T V, whose N x M matrix has rank at most n and rows of sum 1. It
    computes n (N + M) pairs per head instead of N M, and no N x M matrix. Not causal: agents read all keys.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), H a multiple of Hkv.
        agents: A, (B, H, n, D); or n: the queries in their order are pooled into n (`pool_agents`).
        bias_agg: B1, broadcastable to (B, H, n, M); bias_bcast: B2, broadcastable to (B, H, N, n).
        scale: factor on A K^T, default D ** -0.5; scale_bcast: on Q A^T, default scale.
        dropout_p: dropout on the weights of both.
        engine: as in `attention`.

    Returns:
        (B, H, N, Dv) in q's dtype.

    Raises:
        ValueError, TypeError: shapes that do not fit.

    Source: Agent Attention: On the Integration of Softmax and Linear Attention (2023). Differs: grouped heads, fewer
    or more keys than queries, and agents pooled along a line are not in the paper.

    >>> q, k, v = (torch.randn(1, 4, 196, 16) for _ in range(3))
    >>> agent_attention(q, k, v, pool_agents(q, (7, 7), (14, 14))).shape
    torch.Size([1, 4, 196, 16])
    """
    if not isinstance(agents, Tensor):
        agents = pool_agents(q, integer("agent_attention", "agents", agents, 1))
    if agents.ndim != 4 or (*agents.shape[:2], agents.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            "agent_attention: agents must be (B, H, n, D) for q (B, H, N, D), "
            f"got {tuple(agents.shape)} and {tuple(q.shape)}"
        )
    n = agents.shape[2]
    thin = {"dropout_p": dropout_p, "engine": engine}
    score = _score("bias_agg", bias_agg, (*q.shape[:2], n, k.shape[2]))
    gathered = attention(agents, k, v, score=score, scale=scale, **thin)  # V~, (B, H, n, Dv)
    score = _score("bias_bcast", bias_bcast, (*q.shape[:3], n))
    scale = scale if scale_bcast is None else scale_bcast
    return cast(Tensor, attention(q, agents, cast(Tensor, gathered), score=score, scale=scale, **thin))


def _score(name: str, bias: Tensor | None, shape: tuple[int, ...]) -> Bias | None:
    if bias is None:
        return None
    mine = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if bias.ndim > 4 or any(a not in (1, b) for a, b in zip(mine, shape, strict=True)):
        raise ValueError(
            f"agent_attention: {name} must be broadcastable to {shape}, got shape {tuple(bias.shape)}"
        )
    return Bias(bias)


class AgentBias(nn.Module):
    """The two position biases of agent attention, as sums of small tables.

        B1[m, (y, x)] = resize(an)[m, y, x] + ah[m, y] + aw[m, x]   (agents to keys)
        B2[(y, x), m] = resize(na)[m, y, x] + ha[y, m] + wa[x, m]   (queries to agents)

    an and na are tables of table x table places that are resized bilinearly; ah, aw, ha and wa have one number per row
    or column of the resolution given here, and are interpolated linearly at another one. A class token has a column of
    its own, first.

    Args:
        heads: H.
        resolution: (h, w), rows and columns of the query map.
        agents: n.
        reduction: keys lie on a map of (h // reduction, w // reduction).
        class_token: keys and queries begin with one more token.
        table: side of the resized tables.

    Parameters are named and shaped as in the released code, and start as normal numbers of deviation 0.02.

    Source: Agent Attention: On the Integration of Softmax and Linear Attention (2023). Differs: other resolutions than
    the one that it was made for.

    >>> bias = AgentBias(2, (8, 6), agents=9, class_token=True)
    >>> [tuple(b.shape) for b in bias()], [tuple(b.shape) for b in bias((16, 12))]
    ([(2, 9, 49), (2, 49, 9)], [(2, 9, 193), (2, 193, 9)])
    """

    def __init__(
        self,
        heads: int,
        resolution: tuple[int, int],
        agents: int = 49,
        *,
        reduction: int = 1,
        class_token: bool = False,
        table: int = 7,
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("agents", agents), ("reduction", reduction), ("table", table)):
            integer("AgentBias", name, value, 1)
        self.resolution, self.reduction = sides("AgentBias", resolution, reduction), reduction
        h, w = self.resolution
        hk, wk = h // reduction, w // reduction
        self.an_bias = _table(heads, agents, table, table)
        self.na_bias = _table(heads, agents, table, table)
        self.ah_bias = _table(1, heads, agents, hk, 1)
        self.aw_bias = _table(1, heads, agents, 1, wk)
        self.ha_bias = _table(1, heads, h, 1, agents)
        self.wa_bias = _table(1, heads, 1, w, agents)
        self.ac_bias = _table(1, heads, agents, 1) if class_token else None
        self.ca_bias = _table(1, heads, 1, agents) if class_token else None

    def forward(self, resolution: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """(B1 (H, n, M), B2 (H, N, n)) for queries on (h, w) = resolution; default: the one it was made for."""
        h, w = self.resolution if resolution is None else sides("AgentBias", resolution, self.reduction)
        keys = (h // self.reduction, w // self.reduction)
        ha, wa = self.ha_bias[0].movedim(3, 1), self.wa_bias[0].movedim(3, 1)  # (H, n, h, 1), (H, n, 1, w)
        agg = _placed(self.an_bias, self.ah_bias[0], self.aw_bias[0], keys)
        bcast = _placed(self.na_bias, ha, wa, (h, w)).mT
        if self.ac_bias is not None and self.ca_bias is not None:
            agg = torch.cat([self.ac_bias[0], agg], 2)
            bcast = torch.cat([self.ca_bias[0], bcast], 1)
        return agg, bcast

    def extra_repr(self) -> str:
        return f"resolution={self.resolution}, reduction={self.reduction}, class_token={self.ac_bias is not None}"


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def _placed(table: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, n, places) from tables (H, n, t, t), (H, n, h, 1) and (H, n, 1, w), each resized."""
    whole = _resized(table, size)
    return (whole + _resized(rows, (size[0], 1)) + _resized(columns, (1, size[1]))).flatten(2)


def _resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    if table.shape[2:] == size:
        return table
    return F.interpolate(table, size, mode="bilinear", align_corners=False)


def sides(owner: str, resolution: tuple[int, int], reduction: int = 1) -> tuple[int, int]:
    """A checked (rows, columns), each at least `reduction`."""
    if (
        not isinstance(resolution, (tuple, list))
        or len(resolution) != 2
        or any(isinstance(s, bool) or not isinstance(s, int) or s < max(1, reduction) for s in resolution)
    ):
        raise ValueError(
            f"{owner}: resolution must be (rows, columns), ints >= {max(1, reduction)}, got {resolution!r}"
        )
    return resolution[0], resolution[1]


def square(owner: str, agents: int) -> int:
    """p of n = p * p agents."""
    integer(owner, "agents", agents, 1)
    if math.isqrt(agents) ** 2 != agents:
        raise ValueError(f"{owner}: agents must be a square number, got {agents}")
    return math.isqrt(agents)
