"""What a policy sees of one layer when it decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 24  # logits formed at once


@dataclass(frozen=True)
class View:
    """One layer at one moment. S slots for each batch row and KV head; entries where ``valid`` is False mean nothing.

    Attributes:
        layer: its number.
        keys: (B, Hkv, S, D), values: (B, Hkv, S, Dv), positions: (B, Hkv, S) int64 in the sequence.
        valid: bool (B, Hkv, S): real tokens (never padding) that the model may still attend to.
        first, last: (B,) int64: positions of the first and of the last real token of each row.
        seen: (B,) int64: real tokens seen, evicted ones included.
        queries: (B, H, W, D): the last queries, as many as the policy asked for; fewer if there are not as many.
        query_positions: (B, W) int64; -1 = none.
        outputs: (B, H, W, Dv) attention output of these queries, at the end of a prefill, else None.
        mass: (B, Hkv, S): attention received so far, for policies that track it.
        scale, softcap: of the layer's logits.
        out_weight: (H, Dv, d_model): each head's slice of the output projection, or None where there is none.
    """

    layer: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    first: Tensor
    last: Tensor
    seen: Tensor
    queries: Tensor
    query_positions: Tensor
    outputs: Tensor | None
    mass: Tensor
    scale: float
    softcap: float | None = None
    out_weight: Tensor | None = None

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def weights(self, last: int | None = None) -> Tensor:
        """(B, Hkv, G, W, S) float32: softmax weights of the last queries on the slots held, causal by position.

        Rows of queries that do not exist are 0.
        """
        q, at = self.queries, self.query_positions
        if last is not None:
            q, at = q[:, :, -last:], at[:, -last:]
        batch, heads, n, dim = q.shape
        hkv, slots = self.keys.shape[1], self.keys.shape[2]
        rows = q.reshape(batch, hkv, (heads // hkv) * n, dim).float() * self.scale
        logits = rows @ self.keys.float().transpose(2, 3)  # (B, Hkv, G*W, S)
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.view(batch, hkv, heads // hkv, n, slots)
        later = self.positions[:, :, None, None, :] > at[:, None, None, :, None]
        return torch.softmax(
            logits.masked_fill(later | ~self.valid[:, :, None, None, :], -torch.inf), -1
        ).nan_to_num(0.0)


def received(q: Tensor, k: Tensor, valid: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """(B, Hkv, N) float32: softmax weight that each key receives from all queries of a causal prefill, mean over the
    query heads of its group; chunk by chunk, never N x N.

    Args:
        q: (B, H, N, D), k: (B, Hkv, N, D). valid: bool (B, N): real tokens; the queries of others count nothing.
    """
    batch, heads, n, dim = q.shape
    hkv = k.shape[1]
    group = heads // hkv
    keys = k.float().transpose(2, 3)  # (B, Hkv, D, N)
    total = torch.zeros(batch, hkv, n, device=q.device)
    at = torch.arange(n, device=q.device)
    step = max(1, CHUNK // max(1, batch * heads * n))
    for a in range(0, n, step):
        b = min(a + step, n)
        rows = q[:, :, a:b].reshape(batch, hkv, group * (b - a), dim).float() * scale
        logits = rows @ keys[..., :b]
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.view(batch, hkv, group, b - a, b)
        hidden = (at[None, :b] > at[a:b, None])[None] | ~valid[:, None, :b]  # (B, rows, b)
        p = torch.softmax(logits.masked_fill(hidden[:, None, None], -torch.inf), -1).nan_to_num(0.0)
        p = p * valid[:, None, None, a:b, None]
        total[:, :, :b] += p.sum((2, 3)) / group
    return total
