"""Neural memory: a small network whose weights learn while a text is read, by steps with momentum and decay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]  # one (B, H, out, in) per linear layer of the memory


def _silu_slope(x: Tensor) -> Tensor:
    gate = x.sigmoid()
    return gate * (1 + x * (1 - gate))


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + (x * 0.5**0.5).erf()) + x * (-0.5 * x.square()).exp() * (2 * torch.pi) ** -0.5


# name -> (function, its derivative)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
}


@dataclass(frozen=True, eq=False)
class MemoryState:
    """What a neural memory carries from token to token; immutable, at least float32.

    Attributes:
        weights: Theta, after the last token; one (B, H, out, in) per linear layer.
        momentum: S, after the last token; the same shapes.
        base: Theta at the start of the chunk that is being read: what gradients are taken at.
        position: tokens read.
    """

    weights: Weights
    momentum: Weights
    base: Weights
    position: int

    @staticmethod
    def start(weights: Sequence[Tensor], batch: int | None = None) -> MemoryState:
        """The state before the first token: Theta_0 = weights, S_0 = 0.

        Args:
            weights: one (B, H, out, in) per linear layer, or with batch one (H, out, in), the same for all rows.
        """
        wide = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights]
        first = tuple(w if batch is None else w.expand(batch, *w.shape) for w in wide)
        if not first or any(w.dim() != 4 for w in first):
            raise ValueError(
                "MemoryState: weights must be (B, H, out, in), or (H, out, in) with a batch; "
                f"got {[tuple(w.shape) for w in weights]} with batch {batch}"
            )
        if any(b.shape[3] != a.shape[2] for a, b in itertools.pairwise(first)):
            raise ValueError(
                f"MemoryState: each layer must take what the one before gives, got {[tuple(w.shape) for w in weights]}"
            )
        return MemoryState(first, tuple(torch.zeros_like(w) for w in first), first, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, momentum and base."""
        return sum(t.nbytes for part in (self.weights, self.momentum, self.base) for t in part)


def memory_read(weights: Sequence[Tensor], q: Tensor, *, activation: str = "silu") -> Tensor:
    """M_Theta(q) = W_L act(... act(W_1 q)): reading without learning.

    Args:
        weights: Theta, one (B, H, out, in) per linear layer.
        q: (B, H, N, D).
        activation: "silu" or "gelu", between the linear layers.

    Returns:
        (B, H, N, E), in q's dtype.

    >>> memory_read([torch.eye(3)[None, None]], torch.ones(1, 1, 2, 3)).shape
    torch.Size([1, 1, 2, 3])
    """
    act, _ = _activation(activation)
    z = q.to(weights[0].dtype)
    for number, w in enumerate(weights):
        z = (z if number == 0 else act(z)) @ w.transpose(-1, -2)
    return z.to(q.dtype)


def surprise(
    weights: Sequence[Tensor], k: Tensor, v: Tensor, *, activation: str = "silu"
) -> list[tuple[Tensor, Tensor]]:
    """Gradient of ||M_Theta(k_t) - v_t||^2 with respect to Theta, of every token by itself, written by hand.

        z_1 = k,  z_{l+1} = act(W_l z_l),   u_L = 2 (W_L z_L - v),  u_{l-1} = (W_l^T u_l) * act'(W_{l-1} z_{l-1})
        d loss / d W_l = u_l z_l^T

    Args:
        weights: Theta, one (B, H, out, in) per linear layer.
        k: (B, H, N, D); v: (B, H, N, E), in the dtype of the weights.

    Returns:
        for each linear layer (u (B, H, N, out), z (B, H, N, in)): the gradient of a token is their outer product.

    >>> u, z = surprise([torch.zeros(1, 1, 2, 3)], torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1, 2))[0]
    >>> u.tolist(), z.tolist()
    ([[[[-2.0, -2.0]]]], [[[[1.0, 1.0, 1.0]]]])
    """
    act, slope = _activation(activation)
    inputs, before = [k], []  # z_l, and what the activations were given
    for w in weights[:-1]:
        before.append(inputs[-1] @ w.transpose(-1, -2))
        inputs.append(act(before[-1]))
    u = 2 * (inputs[-1] @ weights[-1].transpose(-1, -2) - v)
    found = [(u, inputs[-1])]
    for number in range(len(weights) - 1, 0, -1):
        u = (u @ weights[number]) * slope(before[number - 1])
        found.append((u, inputs[number - 1]))
    return found[::-1]


def memorise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    theta: Tensor,
    alpha: Tensor,
    state: MemoryState,
    *,
    chunk: int = 64,
    activation: str = "silu",
    clip: float | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write (k_t, v_t) into a memory by one gradient step per token, and read it at q_t after the step.

        S_t = eta_t S_{t-1} - theta_t grad ||M_base(k_t) - v_t||^2        Theta_t = (1 - alpha_t) Theta_{t-1} + S_t
        y_t = M_{Theta_t}(q_t),                                           base: Theta at the start of t's chunk

    With chunk 1 this is the exact recursion; a larger chunk is a coarser model, not only a faster one. Within a chunk
    no Theta_t is ever written out. With the gradient u_j z_j^T of each linear layer (`surprise`) the two nested
    recurrences give

        Theta_t = A_t Theta_0 + c_t S_0 - sum_{j <= t} w_tj theta_j u_j z_j^T,     w = L(1 - alpha) L(eta),
        L(a)_tj = prod_{j < m <= t} a_m,     A_t = prod_{m <= t} (1 - alpha_m),    c = L(1 - alpha) cumprod(eta)

    so that a read is a masked product of queries and inputs, as in linear attention, layer by layer of M.

    Args:
        q, k: (B, H, N, D); v: (B, H, N, E).
        eta, theta, alpha: (B, H, N): momentum in [0, 1], step size >= 0, forgetting in [0, 1].
        state: `MemoryState.start(weights)`, or what the last call returned; it is not changed. Pieces of a text need
            not end with chunks: the state remembers how far into a chunk it is.
        chunk: tokens whose gradients are taken at the same weights.
        activation: "silu" or "gelu", between the linear layers of M.
        clip: the gradient of a token is scaled to at most this norm over all weights; None: as it is.

    Returns:
        (y (B, H, N, E) in q's dtype, the state after these tokens). Gradients of everything, through the inner steps.

    Raises:
        ValueError: shapes that do not fit, chunk < 1, clip <= 0, an unknown activation.

    Source: Titans: Learning to Memorize at Test Time (2024). No code was released with it.

    >>> k = torch.nn.functional.normalize(torch.randn(1, 1, 8, 16), dim=-1)
    >>> v, one = torch.randn(1, 1, 8, 16), torch.ones(1, 1, 8)
    >>> start = MemoryState.start([torch.zeros(1, 1, 16, 16)])
    >>> y, state = memorise(k, k, v, 0 * one, 0.5 * one, 0 * one, start, chunk=1)
    >>> torch.allclose(y, v, atol=1e-5)  # a step of 1/2 on a unit key writes its value
    True
    """
    _check(q, k, v, (eta, theta, alpha), state, chunk, clip)
    wide = state.weights[0].dtype
    parts = [t.to(wide) for t in (q, k, v, eta, theta, alpha)]
    n, out = q.shape[2], []
    start = min(n, -state.position % chunk)  # tokens of the chunk that is being read
    whole = start + (n - start) // chunk * chunk
    for begin, end, size in ((0, start, start), (start, whole, chunk), (whole, n, n - whole)):
        if begin == end:
            continue
        q_, k_, v_, eta_, theta_, alpha_ = (t[:, :, begin:end].unflatten(2, (-1, size)) for t in parts)
        decays = _decays(1 - alpha_, eta_)  # of all chunks at once: (B, H, chunks, size, ...)
        pieces = zip(*(t.unbind(2) for t in (q_, k_, v_, theta_, *decays)), strict=True)
        for queries, keys, values, steps, *factors in pieces:
            if state.position % chunk == 0:
                state = MemoryState(state.weights, state.momentum, state.weights, state.position)
            y, state = _piece(queries, keys, values, steps, factors, state, activation, clip)
            out.append(y)
    return (torch.cat(out, 2) if out else parts[2]).to(q.dtype), state


def _decays(keep: Tensor, eta: Tensor) -> tuple[Tensor, ...]:
    """L(1 - alpha) L(eta), the last row of L(eta), A, c and cumprod(eta), from the factors (..., n) of a chunk."""
    fade, push = _products(keep), _products(eta)  # (..., n, n)
    once = eta.cumprod(-1)  # the share of S_0 in S_t
    return fade @ push, push[..., -1, :], keep.cumprod(-1), (fade @ once.unsqueeze(-1)).squeeze(-1), once


def _piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    decays: Sequence[Tensor],
    state: MemoryState,
    activation: str,
    clip: float | None,
) -> tuple[Tensor, MemoryState]:
    """Tokens of one chunk (or a part of it)."""
    act, _ = _activation(activation)
    both, push, first, second, once = decays
    found = surprise(state.base, k, v, activation=activation)
    if clip is not None:
        square = sum(u.square().sum(-1) * z.square().sum(-1) for u, z in found)  # |u z^T|^2 = |u|^2 |z|^2
        theta = theta * (clip * torch.rsqrt(torch.as_tensor(square).clamp_min(clip * clip)))
    written = both * theta.unsqueeze(-2)  # w_tj theta_j
    moved = push * theta  # what is left of each step in S_n
    y, weights, momentum = q, [], []
    for number, (u, z) in enumerate(found):
        w0, s0 = state.weights[number], state.momentum[number]
        y = y if number == 0 else act(y)
        y = (
            first.unsqueeze(-1) * (y @ w0.transpose(-1, -2))
            + second.unsqueeze(-1) * (y @ s0.transpose(-1, -2))
            - (written * (y @ z.transpose(-1, -2))) @ u
        )
        back = u.transpose(-1, -2)  # (B, H, out, n)
        weights.append(
            first[..., -1, None, None] * w0
            + second[..., -1, None, None] * s0
            - (back * written[..., -1:, :]) @ z
        )
        momentum.append(once[..., -1, None, None] * s0 - (back * moved.unsqueeze(-2)) @ z)
    return y, MemoryState(tuple(weights), tuple(momentum), state.base, state.position + q.shape[2])


def _products(a: Tensor) -> Tensor:
    """L (..., n, n): the product of a_m over j < m <= t at (t, j), 0 above the diagonal. Exact for factors of 0.

    >>> _products(torch.tensor([0.5, 0.5, 0.0, 2.0])).tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 2.0, 1.0]]
    """
    n = a.shape[-1]
    below = torch.ones(n, n, dtype=torch.bool, device=a.device).tril(-1)
    factors = torch.where(below, a.unsqueeze(-1), 1.0)  # row t holds a_t left of the diagonal
    return factors.cumprod(-2).tril()


def _activation(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: tuple[Tensor, ...],
    state: MemoryState,
    chunk: int,
    clip: float | None,
) -> None:
    b, h, _, d = state.weights[0].shape
    e = state.weights[-1].shape[2]
    n = q.shape[-2]
    if q.shape != (b, h, n, d) or k.shape != q.shape or v.shape != (b, h, n, e):
        raise ValueError(
            f"q, k must be (B, H, N, D) and v (B, H, N, E) with B={b}, H={h}, D={d}, E={e} of the memory; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, t in zip(("eta", "theta", "alpha"), rates, strict=True):
        if t.shape != (b, h, n):
            raise ValueError(f"{name} must be (B, H, N) = {(b, h, n)}, got {tuple(t.shape)}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be an int >= 1, got {chunk!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0 or None, got {clip!r}")
