"""Dynamic mask attention: values say how important each key is; a bias, and the choice of the keys that are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.scores import Bias
from foveate.layers.prefix_top import topw_prefix_selector
from foveate.layers.rotary import rotated

FORMS = ("linear", "exp")


def dma_bias(v: Tensor, dt_proj: nn.Linear, a: Tensor, form: str = "linear") -> Tensor:
    """The bias of every key, from the values of all key/value heads at its place.

        delta_j = softplus(W [v_j of head 1; ...; v_j of head Hkv]),   b_hj = A_h delta_jh   or   exp(A_h delta_jh)

    Args:
        v: (B, Hkv, N, D), values without rotation.
        dt_proj: linear, Hkv * D -> Hkv.
        a: A, (Hkv,).
        form: "linear" (the maintained code) or "exp" (the paper's formula).

    Returns:
        (B, Hkv, N), in at least float32.

    >>> v = torch.randn(1, 2, 5, 4)
    >>> dma_bias(v, nn.Linear(8, 2, bias=False), torch.zeros(2), "exp").unique().tolist()
    [1.0]
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    wide = torch.promote_types(v.dtype, torch.float32)
    delta = F.softplus(dt_proj(v.transpose(1, 2).flatten(2)).to(wide))  # (B, N, Hkv)
    bias = (a.to(wide) * delta).transpose(1, 2)
    return bias.exp() if form == "exp" else bias


def dma_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, w: int, *, scale: float | None = None, engine: str = "auto"
) -> Tensor:
    """Causal attention of every query to the w keys of largest bias among those up to it, with the bias added.

        S_i = top-w of {b_j : j <= i},   out_i = sum_{j in S_i} softmax_j(scale q_i . k_j + b_j) v_j

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), N <= M; the last query stands at the last key.
        bias: (B, Hkv, M); the H / Hkv query heads of a key/value head share it. -inf: padding, seen by nobody.
        w: keys that a query keeps.
        scale, engine: as in `attention`.

    Returns:
        (B, H, N, Dv), with gradients of q, k, v and of the bias of kept keys; the choice has none. Computes about
        N (w + w / 8) pairs per head; `KeptKeys` (foveate.layers.topw_prefix_selector) has the exact layout.

    Raises:
        ValueError, TypeError: shapes that do not fit, w < 1.

    >>> q, k, v = (torch.randn(1, heads, 100, 16) for heads in (4, 2, 2))
    >>> dma_attention(q, k, v, torch.randn(1, 2, 100), 10).shape
    torch.Size([1, 4, 100, 16])
    """
    if bias.shape != k.shape[:3] or q.shape[2] > k.shape[2]:
        raise ValueError(
            "bias must be (B, Hkv, M) for q (B, H, N, D) and k (B, Hkv, M, D) with N <= M; "
            f"got {tuple(bias.shape)}, {tuple(q.shape)} and {tuple(k.shape)}"
        )
    kept = topw_prefix_selector(bias, w, k.shape[2] - q.shape[2])
    if w < k.shape[2] or bool((bias.detach() == -torch.inf).any()):
        return kept.attend(q, k, v, bias, scale=scale, engine=engine)
    score = Bias(bias.repeat_interleave(q.shape[1] // k.shape[1], 1).unsqueeze(2))  # (B, H, 1, M)
    out = attention(q, k, v, is_causal=True, score=score, scale=scale, engine=engine)
    assert isinstance(out, Tensor)
    return out


@dataclass(frozen=True, eq=False)
class DMACache:
    """Keys, values and biases of the w best keys per key/value head: all that later queries can ever see.

    Attributes:
        k: (B, Hkv, L, D); v: (B, Hkv, L, Dv); bias: (B, Hkv, L); L = min(w, tokens so far), oldest first.
        positions: int64 (B, Hkv, L), where they stood.
        seen: tokens so far.
        keep: w.

    Immutable: `update` returns another. Queries of the next tokens attend to what is held and to one another, so a
    sequence in pieces gives what it gives as a whole.
    """

    k: Tensor
    v: Tensor
    bias: Tensor
    positions: Tensor
    seen: int
    keep: int

    @staticmethod
    def empty(k: Tensor, v: Tensor, bias: Tensor, keep: int) -> DMACache:
        """A cache of no keys for tensors like k (B, Hkv, N, D), v (B, Hkv, N, Dv) and bias (B, Hkv, N)."""
        nothing = torch.zeros(*k.shape[:2], 0, dtype=torch.int64, device=k.device)
        return DMACache(k[:, :, :0], v[:, :, :0], bias[:, :, :0], nothing, 0, keep)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, biases and positions."""
        return sum(t.nbytes for t in (self.k, self.v, self.bias, self.positions))

    def joined(self, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is held and the next tokens' (B, Hkv, n, ...), one after another."""
        return torch.cat([self.k, k], 2), torch.cat([self.v, v], 2), torch.cat([self.bias, bias], 2)

    def update(self, k: Tensor, v: Tensor, bias: Tensor) -> DMACache:
        """The cache after the next n tokens: of what is held and the new, the w of largest bias, newer ones first.

        >>> x = torch.zeros(1, 1, 1, 1)
        >>> cache = DMACache.empty(x, x, x[..., 0], keep=2)
        >>> for b in (5.0, 1.0, 2.0, 2.0, 0.0):
        ...     cache = cache.update(x, x, torch.full((1, 1, 1), b))
        >>> cache.positions.tolist(), cache.seen
        ([[[0, 3]]], 5)
        """
        n = k.shape[2]
        new = torch.arange(self.seen, self.seen + n, device=k.device).expand(*k.shape[:3])
        at = torch.cat([self.positions, new], 2)
        k, v, bias = self.joined(k, v, bias)
        if at.shape[2] > self.keep:
            order = torch.argsort(bias.detach(), dim=2, stable=True)  # of equal ones the older is less
            best = order[..., -self.keep :].sort(2).values  # (B, Hkv, w), oldest first
            k, v = (t.gather(2, best.unsqueeze(-1).expand(*best.shape, t.shape[3])) for t in (k, v))
            bias, at = bias.gather(2, best), at.gather(2, best)
        return DMACache(k, v, bias, at, self.seen + n, self.keep)


class DynamicMaskAttention(nn.Module):
    """Causal multi-head attention whose keys compete for w places, by an importance learnt from their values.

        delta_j = softplus(dt_proj(v_j)),  b_hj = A_h delta_jh (or exp of it),  S_i = top-w of {b_j : j <= i},
        out_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(D) + b_j) v_j

    The bias trains A, dt_proj and the values through the kept keys; the choice itself has no gradient. A starts at 0:
    all keys are equal, newer ones win, and the layer is a sliding window of w.

    Args:
        d_model: width of the tokens.
        heads, kv_heads: query heads, and key/value heads that they share; kv_heads None: as many as heads.
        keep_window: w.
        form: "linear" or "exp", see `dma_bias`; checkpoints hold for one of them.
        head_dim: D; default d_model / heads.

    Shape: (B, N, d_model) -> (B, N, d_model).

    Source: Trainable Dynamic Mask Sparse Attention (2025). Differs from the released model code: ties are broken newest
    first (there: as torch.topk does); no norm of queries and keys, which belongs to the host model.

    >>> layer = DynamicMaskAttention(32, heads=4, kv_heads=2, keep_window=8)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-6), state.k.shape
    (True, torch.Size([1, 2, 8, 8]))
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int | None = None,
        keep_window: int = 2048,
        form: str = "linear",
        *,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"DynamicMaskAttention: heads must be a multiple of kv_heads, got {heads} and {kv_heads}"
            )
        if head_dim is None and d_model % heads:
            raise ValueError(
                f"DynamicMaskAttention: d_model must be a multiple of heads, got {d_model} and {heads}"
            )
        if isinstance(keep_window, bool) or not isinstance(keep_window, int) or keep_window < 1:
            raise ValueError(f"DynamicMaskAttention: keep_window must be an int >= 1, got {keep_window!r}")
        if form not in FORMS:
            raise ValueError(f"DynamicMaskAttention: form must be one of {', '.join(FORMS)}, got {form!r}")
        self.heads, self.kv_heads, self.keep_window, self.form = heads, kv_heads, keep_window, form
        self.head_dim = head_dim or d_model // heads
        self.q_proj = nn.Linear(d_model, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, kv_heads * self.head_dim, bias=False)
        self.A = nn.Parameter(torch.zeros(kv_heads))
        self.dt_proj = nn.Linear(kv_heads * self.head_dim, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, d_model, bias=False)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, state: DMACache | None = None
    ) -> Tensor | tuple[Tensor, DMACache]:
        """out (B, N, d_model); with state, (out, state after these tokens).

        Args:
            x: (B, N, d_model), the next tokens.
            rope: angles (N, D / 2) of these tokens' positions, by which queries and keys are rotated; halves of a head
                form the pairs. None: no positions.
            state: of the tokens before (`initial_state`, or what the last call returned); it is not changed.
        """
        q, k, v = (
            proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = rotated(q, rope), rotated(k, rope)
        bias = self.bias(v)
        keys = (k, v, bias) if state is None else state.joined(k, v, bias)
        out = dma_attention(q, *keys, self.keep_window).transpose(1, 2).flatten(2)
        out = self.o_proj(out)
        return out if state is None else (out, state.update(k, v, bias))

    def bias(self, v: Tensor) -> Tensor:
        """`dma_bias` of values (B, Hkv, N, D) with this layer's parameters."""
        return dma_bias(v, self.dt_proj, self.A, self.form)

    def initial_state(self, x: Tensor) -> DMACache:
        """The state before the first token, for inputs like x (B, N, d_model)."""
        none = self.v_proj(x[:, :0]).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return DMACache.empty(none, none, self.bias(none), self.keep_window)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, keep_window={self.keep_window}, form={self.form}"
        )
