"""Mixture-of-head attention: a router decides for every token which heads it uses, and how much of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.attention import attention
from foveate.core.rotary import Rotary
from foveate.layers.intervals import interval_layout
from foveate.layers.self_attention import KeyValueState

ROUTERS = ("linear", "query_norm")


def route_heads(
    x: Tensor,
    wg: Tensor | None,
    ws: Tensor | None = None,
    w0: Tensor | None = None,
    *,
    k: int,
    shared: int | None = None,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gates of all heads from the tokens: shared heads always, k of the routed ones.

        p = softmax(x W_g),  m = multi-hot(top-k of p),    r = k (p m) / sum(p m),   s = h_s softmax(x W_s)
        (a_1, a_2) = 2 softmax(x W_0),                     g = [a_1 s, a_2 r]
        aux = E sum_e mean_t(m_te) mean_t(p_te)            E routed heads; k at perfect balance

    The factors k, h_s and 2 keep the mean gate at 1. a_1 = a_2 = 1 without shared or without routed heads, s = 1 for
    one shared head.

    Args:
        x: (B, N, C), what the router reads.
        wg: (C, E); None: no routed heads.
        ws: (C, h_s); None for at most one shared head.
        w0: (C, 2); needed where there are shared and routed heads and k > 0.
        k: routed heads that each token uses, 0 to E; of equal ones the first.
        shared: h_s; default: as many as ws has, else 0.
        renormalize: False: the paper's equations, without the three factors and without the division.

    Returns:
        gates (B, N, h_s + E), shared heads first, in at least float32; aux, a scalar.

    Raises:
        ValueError: shapes or k that do not fit.

    >>> gates, aux = route_heads(torch.randn(2, 5, 8), torch.zeros(8, 4), k=4)
    >>> gates.unique().tolist(), aux.item()
    ([1.0], 4.0)
    """
    shared = (0 if ws is None else ws.shape[1]) if shared is None else shared
    routed = 0 if wg is None else wg.shape[1]
    if not 0 <= k <= routed:
        raise ValueError(f"route_heads: k must lie in [0, {routed}], the routed heads; got {k}")
    for name, weight, columns in (("wg", wg, routed), ("ws", ws, shared), ("w0", w0, 2)):
        if weight is not None and weight.shape != (x.shape[-1], columns):
            raise ValueError(
                f"route_heads: {name} must be ({x.shape[-1]}, {columns}), got {tuple(weight.shape)}"
            )
    if shared > 1 and ws is None:
        raise ValueError(f"route_heads: {shared} shared heads need ws ({x.shape[-1]}, {shared}), got None")
    both = shared > 0 and k > 0
    if both and w0 is None:
        raise ValueError(f"route_heads: shared and routed heads need w0 ({x.shape[-1]}, 2), got None")
    wide = torch.promote_types(x.dtype, torch.float32)
    s, r = (x.new_ones(*x.shape[:2], n, dtype=wide) for n in (shared, 0))  # (B, N, h_s), (B, N, 0)
    aux = s.new_zeros(())
    if ws is not None:
        s = (shared if renormalize else 1) * _softmax(x, ws)
    if wg is not None:
        p = _softmax(x, wg)  # (B, N, E)
        m = _top(p.detach(), k)
        aux = routed * (m.flatten(0, 1).mean(0) * p.flatten(0, 1).mean(0)).sum()
        r = p * m
        if renormalize and k:
            r = k * r / r.sum(-1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
    if both and w0 is not None:
        a1, a2 = ((2 if renormalize else 1) * _softmax(x, w0)).split(1, -1)
        s, r = a1 * s, a2 * r
    return torch.cat([s, r], -1), aux


def route_heads_by_query_norm(q: Tensor, *, shared: int, k: int) -> Tensor:
    """Gates 0 or 1 from the lengths of the queries: for trained models, without weights of a router.

        z_te = |q_te| / std_e(|q_te|),   p = softmax_e(z),   g = [1, multi-hot(top-k of p)]   (e: routed heads)

    The gradient passes the choice straight through: backward, a routed gate is p.

    Args:
        q: (B, H, N, D), queries before rotation.
        shared: the first heads, always on.
        k: routed heads on, 0 to H - shared; of equal ones the first.

    Returns:
        (B, N, H), in at least float32. std is the unbiased one over the routed heads.

    >>> q = torch.tensor([3.0, 1.0, 2.0, 5.0]).view(1, 4, 1, 1)
    >>> route_heads_by_query_norm(q, shared=1, k=1).tolist()
    [[[1.0, 0.0, 0.0, 1.0]]]
    """
    heads = q.shape[1]
    if not 0 <= shared <= heads or not 0 <= k <= heads - shared:
        raise ValueError(
            f"route_heads_by_query_norm: shared + k must lie in [0, {heads}], both >= 0; got {shared} and {k}"
        )
    wide = q[:, shared:].to(torch.promote_types(q.dtype, torch.float32))
    z = wide.norm(dim=-1).transpose(1, 2)  # (B, N, E)
    if z.shape[-1] > 1:
        z = z / z.std(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    p = z.softmax(-1)
    routed = _top(p.detach(), k) + (p - p.detach())
    return torch.cat([routed.new_ones(*z.shape[:2], shared), routed], -1)


def chosen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Attention of the chosen queries of each head to all keys; the others cost nothing and give 0.

    Each head's chosen queries are moved to its front, so that whole tiles are left out; keys stay for all.

    Args:
        q: (B, H, N, D); k, v: (B, Hkv, M, D), the last query standing at the last key.
        chosen: bool (B, H, N).
        is_causal, scale, engine: as in `attention`.

    Returns:
        (B, H, N, Dv).

    >>> q = k = v = torch.randn(1, 2, 5, 4)
    >>> chosen = torch.tensor([[[True] * 5, [False, True, False, False, False]]])
    >>> chosen_attention(q, k, v, chosen)[0, 1].any(-1).tolist()
    [False, True, False, False, False]
    """
    if chosen.dtype != torch.bool or chosen.shape != q.shape[:3]:
        raise ValueError(
            f"chosen must be bool {tuple(q.shape[:3])}, got {chosen.dtype} {tuple(chosen.shape)}"
        )
    if not bool(chosen.any()):
        return q.new_zeros(*q.shape[:3], v.shape[3])
    n, m = q.shape[2], k.shape[2]
    order = torch.sort(chosen.byte(), dim=2, descending=True, stable=True).indices  # (B, H, N)
    counts = chosen.sum(2, keepdim=True)  # (B, H, 1)
    rows = int(counts.max())
    leave = counts.expand(-1, -1, m)
    enter = torch.zeros_like(leave)
    if is_causal:  # key j is seen from the first chosen query at or after it: after all those before it
        before = torch.nn.functional.pad(chosen.cumsum(2), (m - n + 1, 0))  # chosen queries before position j
        enter = before[..., :m]
    layout = interval_layout(enter.contiguous(), leave.contiguous(), rows, q.shape[1])
    at = order[..., :rows, None]  # (B, H, R, 1)
    found = attention(
        q.gather(2, at.expand(-1, -1, -1, q.shape[3])), k, v, layout, scale=scale, engine=engine
    )
    assert isinstance(found, Tensor)
    out = found.new_zeros(*q.shape[:3], v.shape[3])
    return out.scatter(2, at.expand(-1, -1, -1, v.shape[3]), found)


class MixtureOfHeads(nn.Module):
    """Multi-head attention as a weighted sum over heads, of which every token uses some.

        out_t = sum_h g_th O^h_t W_O^h,   g from `route_heads` or `route_heads_by_query_norm`

    Keys and values are computed for all tokens in all heads, as others may attend to them; only queries are sparse.

    Args:
        dim: width of the tokens.
        heads, kv_heads: query heads, and key/value heads that they share; kv_heads None: as many as heads.
        shared: the first heads, always on.
        k: of the others, on for each token.
        head_dim: default dim / heads.
        causal: tokens see themselves and earlier ones; then the layer carries a state.
        rotary: rotate queries and keys (base 10,000).
        bias: of the maps to queries, keys and values.
        router: "linear" (learnt) or "query_norm" (gates 0 and 1, for trained models).
        renormalize: False: the gates of the paper's equations, see `route_heads`.
        sparse: compute only the chosen queries of each head; else all heads, then gates. The results are equal.

    Attributes:
        aux_loss: the balance loss of the last forward in train mode, else None; see `moh_total_aux`.
        gates: (B, N, H) of the last forward, detached.

    Shape: (B, N, dim) -> (B, N, dim).

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention (2024), the router as in its code. Differs: queries
    that are not chosen are really left out (the code computes all heads and masks).

    >>> layer = MixtureOfHeads(32, heads=8, shared=2, k=4)
    >>> x = torch.randn(1, 20, 32)
    >>> dense, layer.sparse = layer(x), True
    >>> torch.allclose(layer(x), dense, atol=1e-5), (layer.gates > 0).sum(-1).unique().tolist()
    (True, [6])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        shared: int,
        k: int,
        head_dim: int | None = None,
        causal: bool = False,
        rotary: bool = False,
        bias: bool = False,
        router: str = "linear",
        renormalize: bool = True,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or (head_dim is None and dim % heads):
            raise ValueError(
                "MixtureOfHeads: dim must be a multiple of heads, and heads of kv_heads; "
                f"got dim={dim}, heads={heads}, kv_heads={kv_heads}"
            )
        if shared < 0 or k < 0 or not 1 <= shared + k <= heads:
            raise ValueError(
                f"MixtureOfHeads: shared + k must lie in [1, {heads}], both >= 0; got {shared} and {k}"
            )
        if router not in ROUTERS:
            raise ValueError(f"MixtureOfHeads: router must be one of {', '.join(ROUTERS)}, got {router!r}")
        self.heads, self.kv_heads, self.shared, self.k = heads, kv_heads, shared, k
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.causal, self.router, self.renormalize, self.sparse = causal, router, renormalize, sparse
        self.rotary = Rotary() if rotary else None
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=bias)
        linear, routed = router == "linear", heads - shared
        self.wg = nn.Linear(dim, routed, bias=False) if linear and routed and k else None
        self.ws = nn.Linear(dim, shared, bias=False) if linear and shared > 1 else None
        self.w0 = nn.Linear(dim, 2, bias=False) if linear and shared and k else None
        self.aux_loss: Tensor | None = None
        self.gates: Tensor | None = None

    def forward(
        self, x: Tensor, *, state: KeyValueState | None = None
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """out (B, N, dim); with the state of the tokens before (causal only), (out, state after these)."""
        if state is not None and not self.causal:
            raise ValueError("MixtureOfHeads: state is for causal=True, got a state with causal=False")
        q, k, v = (
            proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.route(x, q)  # (B, N, H)
        seen = 0 if state is None else state.position
        if self.rotary is not None:
            at = torch.arange(seen, seen + x.shape[1], device=x.device)
            q, k = self.rotary(q, at), self.rotary(k, at)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        if self.sparse:
            out = chosen_attention(q, k, v, (gates != 0).transpose(1, 2), is_causal=self.causal)
        else:
            out = attention(q, k, v, is_causal=self.causal)
        assert isinstance(out, Tensor)
        out = out.transpose(1, 2) * gates.to(out.dtype).unsqueeze(-1)  # (B, N, H, D)
        out = self.o_proj(out.flatten(2))
        return out if state is None else (out, KeyValueState(k, v, seen + x.shape[1]))

    def route(self, x: Tensor, q: Tensor) -> Tensor:
        """Gates (B, N, H) of tokens (B, N, dim) and their queries before rotation (B, H, N, D)."""
        aux = None
        if self.router == "linear":
            wg, ws, w0 = (None if m is None else m.weight.t() for m in (self.wg, self.ws, self.w0))
            gates, aux = route_heads(
                x, wg, ws, w0, k=self.k, shared=self.shared, renormalize=self.renormalize
            )
            if wg is None:  # no head of the others is ever on
                gates = nn.functional.pad(gates, (0, self.heads - self.shared))
        else:
            gates = route_heads_by_query_norm(q, shared=self.shared, k=self.k)
        self.aux_loss = aux if self.training and self.wg is not None else None
        self.gates = gates.detach()
        return gates

    def initial_state(self, x: Tensor) -> KeyValueState:
        """The state before the first token, for inputs like x (B, N, dim); causal layers only."""
        if not self.causal:
            raise ValueError("MixtureOfHeads: only causal=True carries a state, got causal=False")
        none = self.v_proj(x[:, :0]).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return KeyValueState(none, none, 0)

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, shared={self.shared}, k={self.k}, "
            f"causal={self.causal}, router={self.router}"
        )


def moh_total_aux(model: nn.Module, weight: float = 0.01) -> Tensor | float:
    """weight * mean of the balance losses of the layers with routed heads, after a forward in train mode; else 0.

    Add it to the task's loss: loss + moh_total_aux(model).

    >>> layer = MixtureOfHeads(32, heads=8, shared=2, k=4).train()
    >>> _ = layer(torch.randn(1, 20, 32))
    >>> moh_total_aux(layer) >= 0.01 * 3
    tensor(True)
    """
    found: list[Any] = [m.aux_loss for m in model.modules() if isinstance(m, MixtureOfHeads)]
    losses = [loss for loss in found if loss is not None]
    return weight * torch.stack(losses).mean() if losses else 0.0


def _softmax(x: Tensor, weight: Tensor) -> Tensor:
    """softmax(x W) in at least float32, (B, N, columns)."""
    return (x @ weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)


def _top(p: Tensor, k: int) -> Tensor:
    """1 for the k largest along the last axis, else 0; of equal ones the first."""
    best = torch.sort(p, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(p).scatter(-1, best, 1.0)
