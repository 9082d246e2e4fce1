"""DHSA's boundary predictor: where attention to the keys changes, seen from the keys; and how it is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.patterns.base import integer

CHUNK = 1 << 24  # elements of unfolded windows, or of attention probabilities, that are held at once
END = -100.0  # logit of a place without a full window on either side


class BoundaryPredictor(nn.Module):
    """Logit of a boundary after each key, from the `window` keys up to it and the `window` keys after it.

        u = LayerNorm(MultiHead([x_{t-w+1} ... x_{t+w}]))
        l, r = mean of the first w, of the last w of u
        logit_t = Linear(ReLU(Linear([l, r, |l - r|, l r, cos(l, r)])))

    and -100, which is never a boundary, where a side has fewer than w keys. One predictor serves all layers of a model.
    For `DHSA(predictor=)`.

    Args:
        channels: C, the key heads times their dimension.
        window: w, keys on either side.
        heads: of the attention within the 2 w keys; divides C.
        hidden: width of the hidden layer.

    Cost per key, in multiply-adds: (3 + 2 w) C**2 + 8 w**2 C + 4 C hidden; windows are unfolded in pieces.

    Source: Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs (2025); the attention
    encoder of the released code (the others are not built). Keys are projected once, not once for every window.

    >>> import torch
    >>> predictor = BoundaryPredictor(channels=32, heads=4)
    >>> predictor(torch.randn(2, 32, 100)).shape
    torch.Size([2, 100])
    """

    def __init__(self, channels: int, window: int = 4, heads: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.channels, self.window, self.heads, hidden = (
            integer("BoundaryPredictor", name, value, 1)
            for name, value in (
                ("channels", channels),
                ("window", window),
                ("heads", heads),
                ("hidden", hidden),
            )
        )
        if channels % heads:
            raise ValueError(f"BoundaryPredictor: heads must divide channels = {channels}, got {heads}")
        self.project = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.score = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, keys: Tensor) -> Tensor:
        """(B, C, N) keys (rotated, heads one after another) -> (B, N) logits; in the dtype of the parameters."""
        if not isinstance(keys, Tensor) or keys.ndim != 3 or keys.shape[1] != self.channels:
            got = tuple(keys.shape) if isinstance(keys, Tensor) else type(keys).__name__
            raise ValueError(f"keys must be a tensor (batch, {self.channels}, length), got {got}")
        w = self.window
        x = keys.transpose(1, 2).to(self.out.weight.dtype)  # (B, N, C)
        if x.shape[1] < 2 * w:
            return x.new_full(x.shape[:2], END)
        qkv = self.project(x).unfold(1, 2 * w, 1)  # (B, N - 2 w + 1, 3 C, 2 w)
        step = max(1, CHUNK // (keys.shape[0] * self.channels * 2 * w))
        found = torch.cat([self._logits(piece) for piece in qkv.split(step, 1)], 1)
        return F.pad(found, (w - 1, w), value=END)

    def _logits(self, qkv: Tensor) -> Tensor:
        """(B, n, 3 C, 2 w) -> (B, n)"""
        parts = (
            qkv.unflatten(2, (3, self.heads, -1)).transpose(-1, -2).unbind(2)
        )  # (B, n, heads, 2 w, C / heads)
        mixed = F.scaled_dot_product_attention(*parts)  # pyright: ignore[reportArgumentType]
        u = self.norm(self.out(mixed.transpose(2, 3).flatten(3)))  # (B, n, 2 w, C)
        left, right = u.unflatten(2, (2, -1)).mean(3).unbind(2)  # (B, n, C)
        alike = F.cosine_similarity(left, right, dim=-1, eps=1e-6).unsqueeze(-1)
        features = torch.cat([left, right, (left - right).abs(), left * right, alike], -1)
        return self.score(features).squeeze(-1)


@torch.no_grad()
def boundary_targets(
    q: Tensor, k: Tensor, *, window: int = 4, future: int | None = None, scale: float | None = None
) -> Tensor:
    """How much more attention later queries pay to one side of a place than to the other: what a predictor learns.

        ratio_t = (max(P_t, F_t) + 1e-6) / (min(P_t, F_t) + 1e-6)
        P_t = sum_{i in R_t} sum_{j = t-w+1 .. t} A_ij,   F_t = sum_{i in R_t} sum_{j = t+1 .. t+w} A_ij

    with A the causal attention averaged over the heads and R_t the queries from t + w on (`future` of them at most).
    A is never held: the rectangles are differences of the running sums over rows (an integral image), taken while rows
    of A are computed piece by piece. Time is that of dense attention.

    Args:
        q: (B, H, N, D); k: (B, Hkv, N, D): all queries and keys of a layer.
        window: w.
        future: queries that count, for layers with a sliding window; None: all.
        scale: factor on q k^T; default D ** -0.5.

    Returns:
        float64 (B, N), >= 1; 0 nearer than 2 w to either end, where nothing is learnt.

    >>> import torch
    >>> k = torch.cat([torch.ones(1, 1, 20, 2), -torch.ones(1, 1, 20, 2)], 2)  # another direction from key 20 on
    >>> ratio = boundary_targets(torch.ones(1, 1, 40, 2), k)
    >>> ratio.argmax().item()  # the boundary comes after key 19
    19
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[0::2] != k.shape[0::2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q (B, H, N, D) and k (B, Hkv, N, D) must fit, got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, heads, n, dim = q.shape
    kv_heads, w = k.shape[1], integer("boundary_targets", "window", window, 1)
    if heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k, got {heads} and {kv_heads}")
    most = n if future is None else integer("boundary_targets", "future", future, 1)
    scale = float(dim**-0.5 if scale is None else scale)
    ratio = torch.zeros(batch, n, dtype=torch.float64, device=q.device)
    places = torch.arange(2 * w - 1, n - 2 * w, device=q.device)  # t
    if not len(places):
        return ratio
    columns = places[:, None] + torch.arange(1 - w, w + 1, device=q.device)  # (places, 2 w)
    begins, ends = places + w, (places + w + most).clamp(max=n)  # rows of R_t
    before = torch.zeros(batch, n, dtype=torch.float64, device=q.device)  # sums over the rows so far
    sums = torch.zeros(batch, len(places), 2 * w, dtype=torch.float64, device=q.device)
    keys = k.float() if k.dtype != torch.float64 else k
    step = max(1, CHUNK // (batch * heads * n))
    for first in range(0, n, step):
        last = min(first + step, n)
        rows = q[:, :, first:last].to(keys).unflatten(1, (kv_heads, -1)).flatten(2, 3) * scale
        logits = (rows @ keys[:, :, :last].mT).view(batch, heads, last - first, last)
        hidden = torch.ones(last - first, last, dtype=torch.bool, device=q.device).triu(first + 1)
        mean = torch.softmax(logits.masked_fill_(hidden, -torch.inf), -1).mean(1)  # (B, rows, last)
        image = (
            F.pad(mean.double().cumsum(1), (0, 0, 1, 0)) + before[:, None, :last]
        )  # row r: over rows < first + r
        for edge, sign in ((begins, -1.0), (ends, 1.0)):
            here = ((edge >= first) & (edge < last) | ((edge == n) & (last == n))).nonzero().squeeze(1)
            taken = image[:, (edge[here] - first)[:, None], columns[here].clamp(max=last - 1)]
            sums[:, here] += sign * taken.masked_fill(columns[here] >= last, 0.0)
        before[:, :last] = image[:, -1]
    past, later = sums.unflatten(2, (2, w)).sum(3).clamp_min(0).unbind(2)
    ratio[:, places] = (torch.maximum(past, later) + 1e-6) / (torch.minimum(past, later) + 1e-6)
    return ratio


def boundary_loss(
    logits: Tensor,
    ratio: Tensor,
    *,
    window: int = 4,
    gamma: float = 2.0,
    positive: float = 1.3,
    hard: bool = False,
) -> Tensor:
    """Focal cross-entropy of logits (B, N) against the labels of `boundary_targets`' ratios (B, N); a mean.

        y = sigmoid(2 (log ratio - log 2))        a boundary is where one side gets more than twice the attention
        p_t = p y + (1 - p)(1 - y),   loss = (1 - p_t)**gamma (-positive y log p - (1 - y) log(1 - p))

    Positions nearer than 2 * window to an end do not count.

    Args:
        positive: weight of boundaries.
        hard: labels 0 or 1 (y >= 0.5), as the released training does.

    >>> import torch
    >>> ratio = torch.ones(1, 40)
    >>> bool(boundary_loss(torch.full((1, 40), 3.0), ratio) > boundary_loss(torch.full((1, 40), -3.0), ratio))
    True
    """
    if logits.shape != ratio.shape or logits.ndim != 2:
        raise ValueError(
            f"logits and ratio must be (B, N) both, got {tuple(logits.shape)} and {tuple(ratio.shape)}"
        )
    inside = slice(2 * window - 1, logits.shape[1] - 2 * window)
    if logits[:, inside].numel() == 0:
        raise ValueError(f"no position is {2 * window} from both ends of {logits.shape[1]}")
    z = logits[:, inside]
    y = torch.sigmoid(2 * (ratio[:, inside].clamp_min(1.0).log() - math.log(2))).to(z)
    y = (y >= 0.5).to(z) if hard else y
    p = torch.sigmoid(z)
    weight = (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    cross = F.binary_cross_entropy_with_logits(z, y, pos_weight=z.new_tensor(positive), reduction="none")
    return (weight * cross).mean()
