"""Lightning attention: causal linear attention with a fixed decay per head, tile by tile, forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VARIANTS = ("chunk_loop", "parallel")
FORMS = ("slopes", "text")


def alibi_decay(heads: int, layer: int = 0, layers: int = 1, *, form: str = "slopes") -> Tensor:
    """Decay rates of the heads of one layer: slopes of ALiBi that fade out with depth.

        slopes:  s_h = 2^(-8 (h+1) / H) (1 - l / (L-1) + 1e-5)        (L = 1: without the quotient)
        text:    s_h = (8 h / H) (1 - l / L)

    h, l count from 0. Where H is no power of two the slopes are those of the power of two c below it and then every
    second one of 2 c. The last layer practically does not decay.

    Args:
        heads: H.
        layer, layers: l, L; 0 <= l < L.
        form: "slopes" (the released code) or "text" (the formula in the paper).

    Returns:
        float32 (H,), >= 0.

    Source: Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (2024).

    >>> alibi_decay(8).tolist()[:3]
    [0.5000050067901611, 0.25000250339508057, 0.12500125169754028]
    >>> alibi_decay(6, form="text").tolist()[:3]
    [0.0, 1.3333333730697632, 2.6666667461395264]
    """
    if heads < 1 or not 0 <= layer < layers:
        raise ValueError(
            f"alibi_decay: heads >= 1 and 0 <= layer < layers; got heads={heads}, layer={layer}, layers={layers}"
        )
    if form not in FORMS:
        raise ValueError(f"alibi_decay: form must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "text":
        return torch.tensor([8 * h / heads * (1 - layer / layers) for h in range(heads)])
    depth = 1 - layer / max(1, layers - 1) + 1e-5
    return torch.tensor([slope * depth for slope in _slopes(heads)])


def _slopes(heads: int) -> list[float]:
    below = 2 ** (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (h + 1) / below) for h in range(below)]
    return first if below == heads else first + _slopes(2 * below)[::2][: heads - below]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    block: int = 64,
    variant: str = "chunk_loop",
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with one decay rate per head; no denominator, no scale.

        o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j (+ exp(-s (t+1)) q_t S_0)

    Tile by tile, with rows i = 0 .. n-1 of a tile and the state S before it:

        O = ((Q K^T) * M) V + diag(lam^(i+1)) Q S,   M_ij = lam^(i-j) for i >= j, else 0,   lam = exp(-s)
        S <- lam^n S + (diag(lam^(n-1-j)) K)^T V

    The backward pass sweeps the tiles once to the right for dq and once to the left for dk and dv, with the same two
    products; nothing but the inputs is kept for it.

    Args:
        q: (B, H, N, D); k: (B, G, N, D); v: (B, G, N, E), of one dtype, G a divisor of H.
        decay: s >= 0, (H,), without a gradient; None: no decay. `linear_attention` has learnt ones, log_decay = -s.
        block: n, tokens of a tile.
        variant: "chunk_loop", one tile after another, or "parallel": all states first, then all tiles at once, which
            holds N / n states. The results are the same up to rounding.
        initial_state: S_0, (B, H, D, E): what came before.
        return_state: also return the state after the last token.

    Returns:
        out (B, H, N, E) in the dtype of q; or (out, state), the state in at least float32. Gradients of q, k, v and of
        the initial state, once differentiable. Sums are in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or decays that do not fit, an unknown variant, block < 1.

    Source: Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models (2024).
    The state here has already read the last token at full weight, S_t = lam S_{t-1} + k_t v_t^T, and o_t = q_t S_t.

    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> s = alibi_decay(2)
    >>> out, state = lightning_attention(q[:, :, :99], k[:, :, :99], v[:, :, :99], s, return_state=True)
    >>> last, state = lightning_step(state, q[:, :, 99], k[:, :, 99], v[:, :, 99], s)
    >>> torch.allclose(last, lightning_attention(q, k, v, s)[:, :, 99], atol=1e-4), state.shape
    (True, torch.Size([1, 2, 16, 16]))
    """
    decay = _checked(q, k, v, decay, block, variant)
    shape = (*q.shape[:2], q.shape[3], v.shape[3])
    state = _initial(q, shape, initial_state)
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    whole = q.shape[2] // block * block if variant == "parallel" else 0
    pieces = []
    for start, end, way in ((0, whole, "parallel"), (whole, q.shape[2], "chunk_loop")):
        if end > start:
            tokens = (t[:, :, start:end] for t in (q, k, v))
            out, state = LightningFunction.apply(*tokens, decay, state, block, way)  # pyright: ignore
            pieces.append(out)
    out = (
        torch.cat(pieces, 2)
        if len(pieces) > 1
        else pieces[0]
        if pieces
        else q.new_zeros(*shape[:2], 0, shape[3])
    )
    return (out, state) if return_state else out


def lightning_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: S <- exp(-s) S + k v^T, o = q S.

    Args:
        state: S, (B, H, D, E).
        q: (B, H, D); k: (B, G, D); v: (B, G, E), G a divisor of H.
        decay: s, (H,); None: no decay.

    Returns:
        (o (B, H, E) in the dtype of q, the state after it, in the dtype of state).

    Raises:
        ValueError: as `lightning_attention`.

    >>> o, state = lightning_step(torch.zeros(1, 1, 2, 1), *(torch.ones(1, 1, d) for d in (2, 2, 1)))
    >>> o.item(), state.flatten().tolist()
    (2.0, [1.0, 1.0])
    """
    q, k, v = (t.unsqueeze(2) for t in (q, k, v))
    decay = _checked(q, k, v, decay, 1, VARIANTS[0])
    _initial(q, (*q.shape[:2], q.shape[3], v.shape[3]), state)  # its shape
    rep = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(rep, 1).to(state.dtype) for t in (k, v))
    state = torch.exp(-decay.to(state.dtype))[:, None, None] * state + k.transpose(2, 3) * v  # (B, H, D, E)
    return (q.to(state.dtype) @ state).squeeze(2).to(q.dtype), state


@dataclass(frozen=True)
class LightningAttention:
    """`lightning_attention` with the decays of one layer, `alibi_decay`; the state is S, (B, H, D, E).

    Args:
        layer, layers, form: of `alibi_decay`; layers 0: no decay.
        block, variant: of `lightning_attention`.

    >>> op = LightningAttention()
    >>> q = k = v = torch.randn(1, 2, 50, 8)
    >>> out, state = op(q, k, v, state=op.initial_state(q, k, v))
    >>> torch.equal(out, op(q, k, v)), state.shape
    (True, torch.Size([1, 2, 8, 8]))
    """

    layer: int = 0
    layers: int = 1
    block: int = 64
    variant: str = "chunk_loop"
    form: str = "slopes"

    def __post_init__(self) -> None:
        if self.layers:
            alibi_decay(1, self.layer, self.layers, form=self.form)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out; with the state of the tokens before, (out, state after these)."""
        decay = alibi_decay(q.shape[1], self.layer, self.layers, form=self.form) if self.layers else None
        return lightning_attention(
            q,
            k,
            v,
            None if decay is None else decay.to(q.device),
            block=self.block,
            variant=self.variant,
            initial_state=state,
            return_state=state is not None,
        )

    def initial_state(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Zeros (B, H, D, E), for inputs like these."""
        return _initial(q, (*q.shape[:2], q.shape[3], v.shape[3]), None)


# ------------------------------------------------------------------------------------------------ the two passes
class LightningFunction(torch.autograd.Function):
    """(q, k, v, decay, state, block, variant) -> (out, state), all checked; the gradients are written out."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, block: int, variant: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, decay, state)
        ctx.block, ctx.variant = block, variant
        sweep = _parallel if variant == "parallel" else _loop
        return sweep(q, k, v, decay, state, block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, state = ctx.saved_tensors
        sweep = _parallel if ctx.variant == "parallel" else _loop
        # dq_t = dO_t S_t^T = sum_{j <= t} lam^(t-j) (dO_t . v_j) k_j: the same sum, with dO, v, k for q, k, v
        dq, _ = sweep(grad, v, k, decay, state.transpose(2, 3), ctx.block)
        dk, dv, dstate = _backward_loop(q, k, v, grad, decay, grad_state, ctx.block, ctx.variant)
        return dq.to(q.dtype), dk, dv, None, dstate, None, None


class _Powers(NamedTuple):
    """Powers of lam for tiles of n tokens, in the dtype of sums; no exponent is ever positive."""

    mask: Tensor  # (H, n, n): lam^(i-j) for i >= j, else 0
    since: Tensor  # (H, n, 1): lam^(i+1)
    left: Tensor  # (H, n, 1): lam^(n-1-j)
    whole: Tensor  # (H, 1, 1): lam^n


def _powers(decay: Tensor, n: int, wide: torch.dtype) -> _Powers:
    s = decay.to(wide)[:, None, None]  # (H, 1, 1)
    i = torch.arange(n, device=decay.device, dtype=wide)
    apart = i[:, None] - i  # (n, n)
    mask = (-s * apart).masked_fill(apart < 0, -math.inf).exp()
    return _Powers(
        mask, torch.exp(-s * (i[:, None] + 1)), torch.exp(-s * (n - 1 - i[:, None])), torch.exp(-s * n)
    )


def _loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(out, state after), one tile after another."""
    wide, n = state.dtype, q.shape[2]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    p = _powers(decay, min(block, n), wide)
    for start in range(0, n, block):
        tile = slice(start, min(start + block, n))
        q_b, k_b, v_b = (t[:, :, tile].to(wide) for t in (q, k, v))  # (B, H, n, .)
        if q_b.shape[2] < p.mask.shape[1]:
            p = _powers(decay, q_b.shape[2], wide)
        out[:, :, tile] = (q_b @ k_b.transpose(2, 3) * p.mask) @ v_b + (q_b * p.since) @ state
        state = p.whole * state + (k_b * p.left).transpose(2, 3) @ v_b
    return out, state


def _parallel(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """(out, state after) of whole tiles: the states before all tiles, then all tiles at once."""
    wide = state.dtype
    p = _Powers(*(t.unsqueeze(1) for t in _powers(decay, block, wide)))  # (H, 1, ., .)
    q_b, k_b, v_b = (t.unflatten(2, (-1, block)).to(wide) for t in (q, k, v))  # (B, H, T, n, .)
    before, state = _carried((k_b * p.left).transpose(3, 4) @ v_b, p.whole[:, 0], state)
    out = (q_b @ k_b.transpose(3, 4) * p.mask) @ v_b + (q_b * p.since) @ before
    return out.flatten(2, 3).to(q.dtype), state


def _carried(own: Tensor, whole: Tensor, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """What is carried into each tile, and out of the last: own (B, H, T, D, E) is replaced by it.

    P_b = lam^n P_(b-1) + own_(b-1); from the right if reverse.
    """
    tiles = range(own.shape[2])
    for b in reversed(tiles) if reverse else tiles:
        added = whole * state + own[:, :, b]
        own[:, :, b] = state
        state = added
    return own, state


def _backward_loop(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, decay: Tensor, dstate: Tensor, block: int, variant: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dk, dv, gradient of the initial state): from right to left, dstate carried.

    dK = ((dO V^T) * M)^T Q + diag(lam^(n-1-j)) V dS^T,   dV = ((Q K^T) * M)^T dO + diag(lam^(n-1-j)) K dS
    dS <- lam^n dS + (diag(lam^(i+1)) Q)^T dO
    """
    wide, n = dstate.dtype, q.shape[2]
    if variant == "parallel":
        p = _Powers(*(t.unsqueeze(1) for t in _powers(decay, block, wide)))
        q_b, k_b, v_b, g_b = (t.unflatten(2, (-1, block)).to(wide) for t in (q, k, v, grad))
        after, dstate = _carried((q_b * p.since).transpose(3, 4) @ g_b, p.whole[:, 0], dstate, reverse=True)
        dk, dv = _tile_gradients(q_b, k_b, v_b, g_b, after, p)
        return dk.flatten(2, 3).to(k.dtype), dv.flatten(2, 3).to(v.dtype), dstate
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    p = None
    for start in reversed(range(0, n, block)):
        tile = slice(start, min(start + block, n))
        q_b, k_b, v_b, g_b = (t[:, :, tile].to(wide) for t in (q, k, v, grad))
        if p is None or q_b.shape[2] != p.mask.shape[1]:
            p = _powers(decay, q_b.shape[2], wide)
        dk[:, :, tile], dv[:, :, tile] = _tile_gradients(q_b, k_b, v_b, g_b, dstate, p)
        dstate = p.whole * dstate + (q_b * p.since).transpose(2, 3) @ g_b
    return dk, dv, dstate


def _tile_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, after: Tensor, p: _Powers
) -> tuple[Tensor, Tensor]:
    """(dk, dv) of tiles (..., n, .), given the gradient of the state after each."""
    dk = (grad @ v.transpose(-1, -2) * p.mask).transpose(-1, -2) @ q + (v * p.left) @ after.transpose(-1, -2)
    dv = (q @ k.transpose(-1, -2) * p.mask).transpose(-1, -2) @ grad + (k * p.left) @ after
    return dk, dv


# ------------------------------------------------------------------------------------------------ the arguments
def _checked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, block: int, variant: str) -> Tensor:
    """The decays, after everything is found to fit."""
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not fits or k.shape[:3] != v.shape[:3] or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "lightning_attention: shapes must be q (B, H, N, D), k (B, G, N, D), v (B, G, N, E), G a divisor of the "
            f"heads H; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"lightning_attention: q, k, v must have one floating point dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if variant not in VARIANTS:
        raise ValueError(
            f"lightning_attention: variant must be one of {', '.join(VARIANTS)}, got {variant!r}"
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"lightning_attention: block must be an int >= 1, got {block!r}")
    if decay is None:
        return torch.zeros(q.shape[1], device=q.device)
    if (
        decay.shape != q.shape[1:2]
        or decay.requires_grad
        or not bool((decay >= 0).all() & decay.isfinite().all())
    ):
        raise ValueError(
            f"lightning_attention: decay must be ({q.shape[1]},), one per head, finite, >= 0 and without a gradient; "
            f"got {tuple(decay.shape)}, {decay.detach().flatten()[:8].tolist()}, requires_grad={decay.requires_grad}"
        )
    return decay


def _initial(q: Tensor, shape: tuple[int, ...], state: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        return torch.zeros(shape, dtype=wide, device=q.device)
    if state.shape != shape:
        raise ValueError(
            f"lightning_attention: the state must be (B, H, D, E) = {tuple(shape)}, got {tuple(state.shape)}"
        )
    return state.to(wide)
