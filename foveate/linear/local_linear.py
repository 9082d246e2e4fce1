"""Local linear attention: for every query a linear fit of values on keys, weighted like softmax attention.

    w_ij = softmax_j(scale q_i . k_j),  kbar_i = sum_j w_ij k_j
    C_i = sum_j w_ij (k_j - kbar_i)(k_j - kbar_i)^T + reg I,   x_i = C_i^-1 (kbar_i - q_i)
    s_ij = w_ij (1 - (k_j - kbar_i) . x_i),   out_i = sum_j s_ij v_j

which is the intercept b of min_{b, W} sum_j w_ij |v_j - b - W (k_j - q_i)|^2 + reg |W|^2. Written with the uncentred
Sigma = C + mu mu^T, mu = kbar - q and rho = Sigma^-1 mu, the weights are s = w (1 - z . rho) / (1 - mu . rho), the
same by the Sherman-Morrison formula; centred, nothing is divided by a difference that may vanish.

Forward and backward go through blocks of queries x keys and recompute w, so that memory is linear in the lengths. The
solution enters the backward by its equation: with g = d out and a_j = v_j . g, the adjoint is
u_i = C_i^-1 (sum_j w_ij a_j (kbar_i - k_j)), a second solve with the same matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.core.patterns import Pattern
from foveate.core.patterns.base import Extent

SOLVERS = ("dense", "cg")


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the tiles need beside the tensors; mask (B, Hkv | 1, G | 1, N, M) or a pattern."""

    n: int
    m: int
    heads: tuple[int, int]  # Hkv, G
    scale: float
    causal: bool
    mask: Tensor | Pattern | None
    solver: str
    cg_iters: int
    tol: float
    block_q: int
    block_k: int

    def rows(self) -> Iterator[slice]:
        yield from (slice(i, min(i + self.block_q, self.n)) for i in range(0, self.n, self.block_q))

    def tiles(self, rows: slice, device: torch.device) -> list[tuple[slice, Tensor | None]]:
        """The key blocks that some of these queries see, each with the pairs hidden in it (None: none)."""
        offset = self.m - self.n
        end = min(self.m, rows.stop + offset) if self.causal else self.m
        found = []
        for j in range(0, end, self.block_k):
            cols = slice(j, min(j + self.block_k, end))
            hidden = self._hidden(rows, cols, device)
            if self.causal and cols.stop - 1 > rows.start + offset:
                at = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset
                later = torch.arange(cols.start, cols.stop, device=device) > at
                hidden = later if hidden is None else hidden | later
            if hidden is None or not bool(hidden.all()):
                found.append((cols, hidden))
        return found

    def _hidden(self, rows: slice, cols: slice, device: torch.device) -> Tensor | None:
        if self.mask is None:
            return None
        if isinstance(self.mask, Tensor):
            return ~self.mask[..., rows, cols]
        pattern, extent = self.mask, Extent(self.n, self.m)
        q, k = np.arange(rows.start, rows.stop)[:, None], np.arange(cols.start, cols.stop)
        shape = (q.size, k.size)
        seen = np.stack([
            np.stack([np.broadcast_to(pattern.contains(extent, b, h, q, k), shape) for h in range(pattern.heads)])
            for b in range(pattern.batch)
        ])  # (1 | B, 1 | H, rows, cols)  # fmt: skip
        seen = seen[:, :, None] if pattern.heads == 1 else seen.reshape(len(seen), *self.heads, *shape)
        return ~torch.from_numpy(seen).to(device)


class _Block:
    """A block of queries (B, Hkv, G, rows, D) with all keys (B, Hkv, 1, M, D): its weights, sums and systems."""

    def __init__(
        self, q: Tensor, k: Tensor, reg: Tensor, plan: _Plan, rows: slice, lse: Tensor | None
    ) -> None:
        self.q, self.k, self.reg, self.plan = q[..., rows, :], k, reg, plan
        self.tiles = plan.tiles(rows, q.device)
        self.kept: list[tuple[slice, Tensor]] | None = None
        if lse is None:
            self.lse, self.mean = self._first_sweep()
        else:
            self.lse = lse[..., rows]
            self.mean = torch.zeros_like(self.q)
            for cols, w in self.weights():
                self.mean = self.mean + w @ self.k[..., cols, :]
        self.seeing = (self.lse > -torch.inf).unsqueeze(-1)  # (B, Hkv, G, rows, 1)
        self.mu = torch.where(self.seeing, self.mean - self.q, 0.0)

    def logits(self, cols: slice, hidden: Tensor | None) -> Tensor:
        x = self.plan.scale * self.q @ self.k[..., cols, :].transpose(-1, -2)
        return x if hidden is None else x.masked_fill(hidden, -torch.inf)

    def weights(self) -> list[tuple[slice, Tensor]] | Iterator[tuple[slice, Tensor]]:
        """(key block, w of its pairs); recomputed at every sweep, unless all keys are one block."""
        if self.kept is not None:
            return self.kept
        base = torch.where(self.lse > -torch.inf, self.lse, 0.0).unsqueeze(-1)
        made = ((cols, (self.logits(cols, hidden) - base).exp()) for cols, hidden in self.tiles)
        if len(self.tiles) > 1:
            return made
        self.kept = list(made)
        return self.kept

    def _first_sweep(self) -> tuple[Tensor, Tensor]:
        """log sum_j exp and the mean of keys, online."""
        lse = self.q.new_full(self.q.shape[:-1], -torch.inf)
        mean = torch.zeros_like(self.q)
        for cols, hidden in self.tiles:
            x = self.logits(cols, hidden)
            new = torch.logaddexp(lse, x.logsumexp(-1))
            base = torch.where(new > -torch.inf, new, 0.0)
            mean = mean * (lse - base).exp().unsqueeze(-1)
            mean = mean + (x - base.unsqueeze(-1)).exp() @ self.k[..., cols, :]
            lse = new
        return lse, mean

    def product(self, p: Tensor) -> Tensor:
        """C p for p (..., rows, D), by one sweep and no D x D matrix; c sums to 0 but for rounding."""
        out, offset = self.reg * p, (self.mean * p).sum(-1, keepdim=True)
        for cols, w in self.weights():
            k = self.k[..., cols, :]
            c = w * (p @ k.transpose(-1, -2) - offset)
            out = out + c @ k - c.sum(-1, keepdim=True) * self.mean
        return out

    def solve(self, b: Tensor) -> tuple[Tensor, Tensor]:
        """x with C x = b - r, and r: 0 of the dense solver, what is left of conjugate gradients."""
        return (self._dense(b), torch.zeros_like(b)) if self.plan.solver == "dense" else self._cg(b)

    def _dense(self, b: Tensor) -> Tensor:
        d = self.q.shape[-1]
        second = self.q.new_zeros(*self.q.shape[:-1], d * d)
        for cols, w in self.weights():
            k = self.k[..., cols, :]
            second = second + w @ (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)
        c = second.unflatten(-1, (d, d)) - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)
        c = c + self.reg.unsqueeze(-1) * torch.eye(d, dtype=c.dtype, device=c.device)
        factor, info = torch.linalg.cholesky_ex(c)
        if bool(info.any()):
            raise ValueError(
                "local_linear_attention: reg is too small for these keys; accepted: a larger one"
            )
        return torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)

    def _cg(self, b: Tensor) -> tuple[Tensor, Tensor]:
        x, r, p = torch.zeros_like(b), b, b
        left = (r * r).sum(-1, keepdim=True)  # squared residuals, a row for itself
        enough = self.plan.tol**2 * left
        active = left > enough
        for _ in range(self.plan.cg_iters):
            if not bool(active.any()):
                break
            cp = self.product(p)
            bend = (p * cp).sum(-1, keepdim=True)
            active = active & (bend > 0)
            step = torch.where(active, left / bend, 0.0)
            x, r = x + step * p, r - step * cp
            new = (r * r).sum(-1, keepdim=True)
            p = torch.where(active, r + new / left * p, p)
            left = torch.where(active, new, left)
            active = active & (left > enough)
        return x, r


class _LocalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, reg: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        out = v.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1])
        x, rest = torch.empty_like(q), torch.empty_like(q)
        for rows in plan.rows():
            block = _Block(q, k, reg, plan, rows, None)
            xs, left = block.solve(block.mu)
            offset = 1 + (block.mean * xs).sum(-1, keepdim=True)
            total = v.new_zeros(*xs.shape[:-1], v.shape[-1])
            for cols, w in block.weights():
                total = total + (w * (offset - xs @ k[..., cols, :].transpose(-1, -2))) @ v[..., cols, :]
            out[..., rows, :], lse[..., rows], x[..., rows, :], rest[..., rows, :] = (
                total,
                block.lse,
                xs,
                left,
            )
        ctx.save_for_backward(q, k, v, reg, out, lse, x, rest)
        ctx.plan = plan
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, reg, out, lse, x, rest = ctx.saved_tensors
        plan, grad = ctx.plan, grads[0]
        dq, dk, dv, dreg = (
            torch.zeros_like(q),
            torch.zeros_like(k),
            torch.zeros_like(v),
            torch.zeros_like(reg),
        )
        for rows in plan.rows():
            block = _Block(q, k, reg, plan, rows, lse)
            g, xs, mean = grad[..., rows, :], x[..., rows, :], block.mean
            mean_a, mean_ak = torch.zeros_like(g[..., :1]), torch.zeros_like(xs)
            for cols, w in block.weights():
                wa = w * (g @ v[..., cols, :].transpose(-1, -2))
                mean_a = mean_a + wa.sum(-1, keepdim=True)
                mean_ak = mean_ak + wa @ k[..., cols, :]
            u, _ = block.solve(mean_a * mean - mean_ak)
            u = torch.where(block.seeing, u, 0.0)
            dot = lambda a, b: (a * b).sum(-1, keepdim=True)  # noqa: E731
            kx, ku = dot(mean, xs), dot(mean, u)
            dmean = mean_a * xs + u + kx * u + ku * xs
            cx = torch.where(block.seeing, block.mu - rest[..., rows, :], 0.0)  # C x
            # sum_j w_j dw_j, by which the gradient of the softmax is centred
            centre = dot(g, out[..., rows, :]) - dot(u, cx - reg * xs) - ku * kx + dot(dmean, mean)
            dq_rows = -u
            for cols, w in block.weights():
                kc, vc = k[..., cols, :], v[..., cols, :]
                a = g @ vc.transpose(-1, -2)
                px, pu = xs @ kc.transpose(-1, -2), u @ kc.transpose(-1, -2)
                s = 1 + kx - px
                dl = w * (s * a - px * pu + dmean @ kc.transpose(-1, -2) - centre)
                dq_rows = dq_rows + plan.scale * dl @ kc
                dv[..., cols, :] += ((w * s).transpose(-1, -2) @ g).sum(2, keepdim=True)
                dkc = (
                    plan.scale * dl.transpose(-1, -2) @ block.q
                    - (w * (a + pu)).transpose(-1, -2) @ xs
                    - (w * px).transpose(-1, -2) @ u
                    + w.transpose(-1, -2) @ dmean
                )
                dk[..., cols, :] += dkc.sum(2, keepdim=True)
            dq[..., rows, :] = dq_rows
            dreg = dreg - dot(u, xs).sum_to_size(reg.shape)
        return dq, dk, dv, dreg, None


def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    reg: float | Tensor = 1e-2,
    scale: float | None = None,
    mask: Tensor | Pattern | None = None,
    causal: bool = False,
    solver: str = "dense",
    cg_iters: int = 16,
    tol: float = 1e-4,
    block_q: int = 64,
    block_k: int = 128,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What a linear fit of values on keys, weighted by softmax attention, predicts at each query.

        out_i = vbar_i + S_i (q_i - kbar_i),   S_i = Cov_w(v, k) (Cov_w(k, k) + reg I)^-1

    reg -> infinity is softmax attention, scale = 0 the global ridge regression (`global_ridge`). The weights of the
    values sum to 1 and may be negative.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv); query head h reads key/value head h // (H / Hkv).
        reg: ridge strength > 0 on the slope: a number or (H,), with gradient.
        scale: of the logits; default D ** -0.5.
        mask: who sees whom: a `Pattern`, or booleans that broadcast to (B, H, N, M), True = sees.
        causal: no later keys, the last query at the last key.
        solver: "dense" builds C and factors it in float64, 2 N M D^2 multiply-adds; "cg" applies it by sweeps over the
            keys, 3 N M D multiply-adds each, in float32 (float64 for float64 inputs).
        cg_iters, tol: at most so many steps, and the relative residual at which a row stops.
        block_q, block_k: size of the tiles; dense holds block_k D^2 numbers besides.
        return_lse: also the log-sum-exp of each row of logits, without gradient.

    Returns:
        (B, H, N, Dv) in the dtype of q; with return_lse also (B, H, N). A query that sees nothing gives 0.

    Raises:
        ValueError: shapes that do not fit, reg <= 0 or too small to factor, unknown solver.

    Source: Local Linear Attention (2025). Differs: weights normalised first, so that reg means the same in every row;
    centred covariances; gradients once, not twice.

    >>> g = torch.Generator().manual_seed(0)
    >>> q, k = (torch.randn(1, 1, n, 4, generator=g, dtype=torch.float64) for n in (3, 50))
    >>> out = local_linear_attention(5 * q, k, 2 * k + 1, reg=1e-9)  # values affine in keys: queries far outside fit
    >>> bool((out - (10 * q + 1)).abs().max() < 1e-3)
    True
    """
    _check(q, k, v)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    for name, size in (("cg_iters", cg_iters), ("block_q", block_q), ("block_k", block_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an int >= 1, got {size!r}")
    (b, h, n, d), (kv_heads, m) = q.shape, k.shape[1:3]
    groups = h // kv_heads
    narrow = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    wide = torch.float64 if solver == "dense" else narrow
    plan = _Plan(
        n, m, (kv_heads, groups), d**-0.5 if scale is None else scale, causal,
        _mask(mask, (b, h, n, m), (kv_heads, groups)), solver, cg_iters, tol, block_q, block_k,
    )  # fmt: skip
    out, lse = cast(
        "tuple[Tensor, Tensor]",
        _LocalLinear.apply(
            q.to(wide).unflatten(1, (kv_heads, groups)),
            *(t.to(wide).unsqueeze(2) for t in (k, v)),
            _reg(reg, h, q.device).to(wide).view(kv_heads, -1, 1, 1),
            plan,
        ),
    )
    out = out.flatten(1, 2).to(q.dtype)
    return (out, lse.flatten(1, 2).to(narrow)) if return_lse else out


def global_ridge(q: Tensor, k: Tensor, v: Tensor, *, reg: float | Tensor = 1e-2) -> Tensor:
    """The affine ridge regression of all values on all keys, evaluated at the queries: the other end of the scale.

        out_i = vbar + Cov(v, k) (Cov(k, k) + reg I)^-1 (q_i - kbar)

    Args:
        q, k, v, reg: as in `local_linear_attention`, which gives the same with scale = 0, without a mask.

    >>> x = torch.arange(4.0).view(1, 1, 4, 1)
    >>> global_ridge(x + 10, x, 3 * x, reg=1e-9).flatten().tolist()
    [30.0, 33.0, 36.0, 39.0]
    """
    _check(q, k, v)
    kv_heads, d = k.shape[1], k.shape[3]
    q64 = q.double().unflatten(1, (kv_heads, -1))  # (B, Hkv, G, N, D)
    k64, v64 = k.double().unsqueeze(2), v.double().unsqueeze(2)
    kbar, vbar = k64.mean(-2, keepdim=True), v64.mean(-2, keepdim=True)
    kc = (k64 - kbar).transpose(-1, -2) / k.shape[2]
    eye = torch.eye(d, dtype=torch.float64, device=q.device)
    c = kc @ (k64 - kbar) + _reg(reg, q.shape[1], q.device).double().view(kv_heads, -1, 1, 1) * eye
    slope = torch.linalg.solve(c, kc @ (v64 - vbar))  # (B, Hkv, G, D, Dv)
    return (vbar + (q64 - kbar) @ slope).flatten(1, 2).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[:3] != v.shape[:3] or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q must be (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) with heads H a multiple of Hkv; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


def _reg(reg: float | Tensor, heads: int, device: torch.device) -> Tensor:
    """(1,) or (H,)."""
    made = reg if isinstance(reg, Tensor) else torch.tensor(float(reg), dtype=torch.float64)
    made = made.to(device)
    if made.ndim > 1 or made.numel() not in (1, heads):
        raise ValueError(f"reg must be a number or a tensor ({heads},), got shape {tuple(made.shape)}")
    if not bool((made > 0).all()):
        raise ValueError(f"reg must be > 0, got {float(made.min())}")
    return made.reshape(-1).expand(heads)


def _mask(
    mask: Tensor | Pattern | None, shape: tuple[int, int, int, int], heads: tuple[int, int]
) -> Tensor | Pattern | None:
    if mask is None:
        return None
    if isinstance(mask, Pattern):
        mask.check(Extent(*shape[2:]))
        if mask.heads not in (1, shape[1]) or mask.batch not in (1, shape[0]):
            raise ValueError(
                f"mask is a pattern of {mask.batch} rows and {mask.heads} heads; accepted: 1, or {shape[:2]}"
            )
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a Pattern or a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
    try:
        return mask.expand(shape).unflatten(1, heads)
    except RuntimeError:
        raise ValueError(f"mask must broadcast to {shape}, got {tuple(mask.shape)}") from None
