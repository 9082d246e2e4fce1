"""Linear attention: one state per head instead of a cache, as a chunked scan, a recurrence or a matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ENGINES = ("chunked", "recurrent", "quadratic")
QUADRATIC_MOST = 8_192  # queries; beyond, the N x N matrix is refused
CHUNK = 64
SUB = 16  # rows of a sub-block where channels decay fast
NO_FLOW = 60.0  # e^60 is far inside float32: up to here a chunk's decay may be divided out of the keys
NEVER = -1e4  # a log decay of -inf, so that differences stay defined
WORKING = 1 << 19  # numbers that one segment may hold besides its inputs: small enough for a cache


@dataclass(frozen=True, eq=False)
class LinearState:
    """What linear attention remembers: as many numbers after a million tokens as after one. Immutable.

    Attributes:
        kv: (B, Hkv, D, E), the decayed sum of k^T v; float32, float64 for float64 inputs.
        k: (B, Hkv, D), the decayed sum of keys, where the result is normalised; else None.
        position: tokens seen.
    """

    kv: Tensor
    k: Tensor | None
    position: int

    @staticmethod
    def empty(k: Tensor, v: Tensor, *, normalize: bool = False) -> LinearState:
        """The state before the first token, for tensors like k (B, Hkv, N, D) and v (B, Hkv, N, E).

        >>> LinearState.empty(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 4)).kv.shape
        torch.Size([1, 2, 8, 4])
        """
        made = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=_wide(k), device=k.device)
        return LinearState(made, made.new_zeros(made.shape[:3]) if normalize else None, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.kv.nbytes + (0 if self.k is None else self.k.nbytes)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float = 1.0,
    chunk: int = CHUNK,
    state: LinearState | None = None,
    return_state: bool = False,
    engine: str = "chunked",
) -> Tensor | tuple[Tensor, LinearState]:
    """Causal linear attention with decay, normaliser and delta rule; work and memory grow as the number of tokens.

        S_t = a_t S_{t-1} + k_t^T u_t,    o_t = scale q_t S_t  (/ (q_t . z_t + eps),  z_t = a_t z_{t-1} + k_t)
        u_t = v_t,   or with beta:  u_t = beta_t (v_t - k_t a_t S_{t-1}),   a_t = exp(log_decay_t)

    No feature map and no 1/sqrt(D) are applied: q and k come as they are to be multiplied.

    "chunked" computes inside chunks by masked products and carries the state from chunk to chunk, all exponents
    non-positive or bounded, in segments whose intermediate results are computed again in the backward pass, so that
    memory beyond inputs and outputs is bounded. "recurrent" is the token loop above; "quadratic" forms the N x N
    weights (no beta, N up to 8,192). All three are differentiable and agree up to rounding.

    Args:
        q: (B, H, N, D); k: (B, Hkv, N, D); v: (B, Hkv, N, E), H a multiple of Hkv: grouped heads share a state.
        log_decay: <= 0; None: no decay; (Hkv,): per head; (B, Hkv, N): per token; (B, Hkv, N, D): per channel.
            -inf forgets everything before the token.
        beta: (B, Hkv, N), strength of writing by the delta rule; keys should have norm 1 and beta be within [0, 2].
        normalize: divide by the sum of the weights; for feature maps whose products are positive.
        eps: added to that sum.
        scale: of the result (without effect on the weights where they are normalised).
        chunk: tokens of a chunk.
        state: of the tokens before; None: none.
        return_state: give (out, state after these tokens).
        engine: "chunked", "recurrent" or "quadratic".

    Returns:
        out (B, H, N, E) in the dtype of q; sums and states are float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes that do not fit, a positive log_decay, an unknown engine, what "quadratic" does
            not do, both beta and normalize.

    Sources: Transformers are RNNs (2020); Retentive Network (2023, decay per head); Gated Linear Attention (2023, decay
    per channel); Mamba-2 (2024, decay per token); Parallelizing Linear Transformers with the Delta Rule (2024); Gated
    Delta Networks (2024, decay with the delta rule; here also per channel).

    >>> q, k, v = (torch.rand(1, 2, 100, 8) for _ in range(3))
    >>> out, state = linear_attention(q[:, :, :60], k[:, :, :60], v[:, :, :60], normalize=True, return_state=True)
    >>> rest = linear_attention(q[:, :, 60:], k[:, :, 60:], v[:, :, 60:], normalize=True, state=state)
    >>> whole = linear_attention(q, k, v, normalize=True)
    >>> torch.allclose(torch.cat([out, rest], 2), whole, atol=1e-5), state.nbytes
    (True, 576)
    """
    log_decay, beta = _checked(q, k, v, log_decay, beta, normalize, chunk, state, engine)
    dtype, wide = q.dtype, _wide(k)
    b, h, n, d = q.shape
    kv_heads = k.shape[1]
    q = q.reshape(b, kv_heads, h // kv_heads, n, d)  # queries of a group read one state
    value = (
        torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v
    )  # the last column sums the weights
    s = _start(state, k, value, normalize, wide)  # (B, Hkv, D, E or E + 1)
    if engine == "chunked":
        out, s = _chunked(q, k, value, log_decay, beta, s, min(chunk, max(n, 1)))
    elif engine == "recurrent":
        out, s = _recurrent(q, k, value, log_decay, beta, s)
    else:
        out, s = _quadratic(q, k, value, log_decay, s)
    out = out.reshape(b, h, n, out.shape[-1])
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
    out = (out * scale if scale != 1.0 and not normalize else out).to(dtype)
    if not return_state:
        return out
    seen = n + (0 if state is None else state.position)
    return out, LinearState(s[..., :-1], s[..., -1], seen) if normalize else LinearState(s, None, seen)


def recurrence(a: Tensor, b: Tensor, initial: Tensor | None = None, *, chunk: int = CHUNK) -> Tensor:
    """h_t = a_t h_{t-1} + b_t for every t, without a loop over tokens.

    Args:
        a: (..., N), within [0, 1]; b: (..., N, P); initial: (..., P), h_0, or None: 0.
        chunk: tokens computed by one product; the result does not depend on it.

    Returns:
        h (..., N, P), in the dtype of b. Differentiable in all of them, also where a = 0.

    >>> recurrence(torch.tensor([0.5, 0.0, 1.0]), torch.tensor([[4.0], [2.0], [1.0]]), torch.tensor([8.0])).tolist()
    [[8.0], [2.0], [3.0]]
    """
    if a.shape != b.shape[:-1] or (initial is not None and initial.shape != b.shape[:-2] + b.shape[-1:]):
        raise ValueError(
            f"recurrence: a (..., N), b (..., N, P) and initial (..., P) do not fit: {tuple(a.shape)}, "
            f"{tuple(b.shape)}, {None if initial is None else tuple(initial.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"recurrence: chunk must be >= 1, got {chunk}")
    h, found = b.new_zeros(b.shape[:-2] + b.shape[-1:]) if initial is None else initial, []
    for start in range(0, a.shape[-1], chunk):
        rates, given = a[..., start : start + chunk], b[..., start : start + chunk, :]
        size = rates.shape[-1]
        lower = torch.ones(size, size, dtype=torch.bool, device=a.device).tril(-1)
        steps = torch.where(
            lower, rates.unsqueeze(-1), torch.ones_like(rates[..., :1, None])
        )  # a_i where i > j
        weights = steps.cumprod(-2).tril()  # [i, j] = a_{j+1} ... a_i
        part = weights @ given + rates.cumprod(-1).unsqueeze(-1) * h.unsqueeze(-2)
        found.append(part)
        h = part[..., -1, :]
    return torch.cat(found, -2) if found else b


# ------------------------------------------------------------------------------------------------------- the engines
def _recurrent(q, k, v, g, beta, s) -> tuple[Tensor, Tensor]:
    """The definition, token by token. q (B, G, R, N, D), the others (B, G, N, ...), s (B, G, D, E)."""
    q, k, v = (t.to(s.dtype) for t in (q, k, v))
    found = []
    for t in range(q.shape[3]):
        if g is not None:
            s = g[:, :, t].exp().unsqueeze(-1) * s  # (B, G, D or 1, 1)
        u = v[:, :, t]
        if beta is not None:
            u = beta[:, :, t, None] * (u - torch.einsum("bgd,bgde->bge", k[:, :, t], s))
        s = s + k[:, :, t].unsqueeze(-1) * u.unsqueeze(-2)
        found.append(torch.einsum("bgrd,bgde->bgre", q[:, :, :, t], s))
    out = torch.stack(found, 3) if found else q.new_zeros(*q.shape[:4], v.shape[-1])
    return out, s


def _quadratic(q, k, v, g, s) -> tuple[Tensor, Tensor]:
    """All weights at once, as one chunk of N tokens."""
    return _segment(q, k, v, g, None, s, max(q.shape[3], 1))


def _chunked(q, k, v, g, beta, s, size: int) -> tuple[Tensor, Tensor]:
    """Segments of chunks, one after another; each is computed again in the backward pass."""
    n = q.shape[3]
    heads = q.shape[0] * q.shape[1]
    per_token = size * q.shape[2] + (SUB * k.shape[3] if g is not None and g.shape[-1] > 1 else 0)
    length = max(1, WORKING // max(1, heads * per_token * size)) * size
    given = [t for t in (q, k, v, g, beta) if t is not None]
    again = n > length and torch.is_grad_enabled() and any(t.requires_grad for t in (*given, s))

    def pieces(t: Tensor | None, axis: int) -> Sequence[Tensor | None]:
        return [None] * math.ceil(n / length) if t is None else t.split(length, axis) if n else []

    found = []
    axes = ((q, 3), (k, 2), (v, 2), (g, 2), (beta, 2))
    for part in zip(*(pieces(t, axis) for t, axis in axes), strict=True):
        if again:
            got = checkpoint(_segment, *part, s, size, use_reentrant=False, preserve_rng_state=False)
        else:
            got = _segment(*part, s, size)  # pyright: ignore
        out, s = got  # pyright: ignore
        found.append(out)
    if not found:
        return q.new_zeros(*q.shape[:4], v.shape[-1], dtype=s.dtype), s
    return torch.cat(found, 3) if len(found) > 1 else found[0], s


def _segment(q, k, v, g, beta, s, size: int) -> tuple[Tensor, Tensor]:
    """Chunks of `size` tokens: products inside all chunks at once, states from chunk to chunk.

    Args:
        q: (B, G, R, N, D); k, v: (B, G, N, ...); g: (B, G, N, D or 1) or None; beta: (B, G, N) or None.
        s: (B, G, D, E).
    """
    rows, n = q.shape[2], q.shape[3]
    short = -n % size
    q, k, v = (torch.nn.functional.pad(t.to(s.dtype), (0, 0, 0, short)) for t in (q, k, v))
    q = q.unflatten(3, (-1, size)).transpose(2, 3)  # (B, G, chunks, R, C, D)
    k, v = k.unflatten(2, (-1, size)), v.unflatten(2, (-1, size))  # (B, G, chunks, C, D)
    if g is None:
        decay = _Still(k)
    else:
        g = torch.nn.functional.pad(g, (0, 0, 0, short)).unflatten(2, (-1, size))
        decay = _Decay(g, s.dtype)
    weights = decay.pairs(q, k).tril()  # (B, G, chunks, R, C, C)
    reading = decay.since_start(
        q.flatten(3, 4), rows
    )  # (B, G, chunks, R C, D): what of the state a query sees
    writing = decay.until_end(k).transpose(-1, -2)  # (B, G, chunks, D, C): what of a key is left at the end
    kept = decay.whole()  # (B, G, chunks, D or 1, 1), or None: all
    if beta is not None:
        strength = (
            torch.nn.functional.pad(beta.to(s.dtype), (0, short)).unflatten(2, (-1, size)).unsqueeze(-1)
        )
        return _delta(q, k, v, strength, decay, weights, reading, writing, kept, s, n)
    added = writing @ v  # (B, G, chunks, D, E)
    states = []
    for new, left in zip(added.unbind(2), _each(kept, added.shape[2]), strict=True):
        states.append(s)
        s = new + (s if left is None else left * s)
    inside = weights.flatten(3, 4) @ v  # (B, G, chunks, R C, E)
    out = inside + reading @ torch.stack(states, 2)
    return _joined(out, rows, n), s


def _delta(q, k, v, strength, decay, weights, reading, writing, kept, s, n) -> tuple[Tensor, Tensor]:
    """The delta rule inside chunks: u = (I + beta tril(K K^T))^-1 beta (v - K S), by a triangular solve.

    With S the state at the start of a chunk, u_t = beta_t (v_t - k_t a_t S_{t-1}) and
    a_t S_{t-1} = e^{c_t} S + sum_{j<t} e^{c_t - c_j} k_j^T u_j, so that (I + beta A) u = beta (v - (k e^c) S), where
    A is the strictly lower part of the decayed products of keys.
    """
    rows, e = q.shape[3], v.shape[-1]
    products = decay.pairs(k.unsqueeze(3), k).squeeze(3).tril(-1)  # (B, G, chunks, C, C)
    eye = torch.eye(products.shape[-1], dtype=s.dtype, device=s.device)
    given = strength * torch.cat([v, decay.since_start(k, 1)], -1)  # (B, G, chunks, C, E + D)
    solved = torch.linalg.solve_triangular(eye + strength * products, given, upper=False, unitriangular=True)
    news, reads = solved[..., :e], solved[..., e:]  # u = news - reads S
    parts = (t.unbind(2) for t in (news, reads, reading, weights.flatten(3, 4), writing))
    found = []
    for new, read, look, inside, write, left in zip(*parts, _each(kept, v.shape[2]), strict=True):
        u = new - read @ s  # (B, G, C, E)
        found.append(look @ s + inside @ u)
        s = (s if left is None else left * s) + write @ u
    return _joined(torch.stack(found, 2), rows, n), s


def _each(kept: Tensor | None, chunks: int) -> Sequence[Tensor | None]:
    """What is kept of the state over each chunk. (Unbound, not indexed: a gradient of an index is as large as all.)"""
    return [None] * chunks if kept is None else kept.unbind(2)


def _joined(out: Tensor, rows: int, n: int) -> Tensor:
    """(B, G, chunks, R C, E) -> (B, G, R, N, E)."""
    return out.unflatten(3, (rows, -1)).transpose(2, 3).flatten(3, 4)[:, :, :, :n]


class _Still:
    """No decay."""

    def __init__(self, k: Tensor) -> None:
        self.k = k

    def pairs(self, q: Tensor, k: Tensor) -> Tensor:
        """Products of queries (..., R, C, D) with keys (..., C, D): (..., R, C, C)."""
        return (q.flatten(-3, -2) @ k.transpose(-1, -2)).unflatten(-2, q.shape[-3:-1])

    def since_start(self, q: Tensor, rows: int) -> Tensor:
        return q

    def until_end(self, k: Tensor) -> Tensor:
        return k

    def whole(self) -> None:
        return None


class _Decay(_Still):
    """Decay of chunks: g (B, G, chunks, C, D or 1), one number per token or one per channel.

    c_t = g_1 + ... + g_t inside a chunk, in float64; a pair (t, j) with t >= j decays by exp(c_t - c_j).
    """

    def __init__(self, g: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.c = g.double().clamp(min=NEVER).cumsum(-2)  # (B, G, chunks, C, D or 1)

    def pairs(self, q: Tensor, k: Tensor) -> Tensor:
        if self.c.shape[-1] == 1:
            c = self.c.squeeze(-1)
            gone = (c.unsqueeze(-1) - c.unsqueeze(-2)).clamp(max=0.0)  # above the diagonal it is not used
            return super().pairs(q, k) * gone.to(self.dtype).exp().unsqueeze(-3)
        if self.c.numel() == 0 or float((-self.c.detach()[..., -1, :]).max()) < NO_FLOW:
            ahead, back = self.c.to(self.dtype).exp().unsqueeze(-3), (-self.c).to(self.dtype).exp()
            return super().pairs(q * ahead, k * back)
        return self._sub_blocks(q, k)

    def _sub_blocks(self, q: Tensor, k: Tensor) -> Tensor:
        """Fast channels: below the diagonal sub-blocks relative to the row block's start, inside them one by one."""
        size = k.shape[-2]
        rows = []
        for start in range(0, size, SUB):
            end = min(start + SUB, size)
            own = self.c[..., start:end, :]  # (..., s, D)
            q_rows = q[..., start:end, :]  # (..., R, s, D)
            inner = (
                (own.unsqueeze(-2) - own.unsqueeze(-3)).clamp(max=0.0).to(self.dtype).exp()
            )  # (..., s, s, D)
            here = torch.einsum("...rid,...ijd,...jd->...rij", q_rows, inner, k[..., start:end, :])
            parts = [here, q.new_zeros(*here.shape[:-1], size - end)]
            if start:
                before = self.c[..., start - 1 : start, :]
                ahead = (own - before).to(self.dtype).exp().unsqueeze(-3)
                back = (before - self.c[..., :start, :]).to(self.dtype).exp()
                parts.insert(0, super().pairs(q_rows * ahead, k[..., :start, :] * back))
            rows.append(torch.cat(parts, -1))
        return torch.cat(rows, -2)

    def since_start(self, q: Tensor, rows: int) -> Tensor:
        return q * self.c.to(self.dtype).exp().repeat(1, 1, 1, rows, 1)

    def until_end(self, k: Tensor) -> Tensor:
        return k * (self.c[..., -1:, :] - self.c).to(self.dtype).exp()

    def whole(self) -> Tensor:
        return self.c[..., -1, :].to(self.dtype).exp().unsqueeze(-1)


# ------------------------------------------------------------------------------------------------------ the arguments
def _wide(k: Tensor) -> torch.dtype:
    return torch.float64 if k.dtype == torch.float64 else torch.float32


def _start(state: LinearState | None, k: Tensor, value: Tensor, normalize: bool, wide: torch.dtype) -> Tensor:
    if state is None:
        return torch.zeros(*k.shape[:2], k.shape[3], value.shape[3], dtype=wide, device=k.device)
    return torch.cat([state.kv, state.k.unsqueeze(-1)], -1) if normalize and state.k is not None else state.kv


def _checked(
    q, k, v, log_decay, beta, normalize, chunk, state: LinearState | None, engine
) -> tuple[Tensor | None, Tensor | None]:
    """The log decay as (B, Hkv, N, D or 1) and beta, after all arguments were looked at."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"linear_attention: {name} must be a floating-point tensor, got {_said(t)}")
        if t.ndim != 4:
            raise ValueError(
                f"linear_attention: {name} must be (batch, heads, tokens, dim), got {tuple(t.shape)}"
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise TypeError(f"linear_attention: {name} is {t.dtype} on {t.device}, q {q.dtype} on {q.device}")
    b, g, n, d = k.shape
    if (q.shape[0], *q.shape[2:]) != (b, n, d) or v.shape[:3] != (b, g, n) or q.shape[1] % max(g, 1) or g < 1:
        raise ValueError(
            "linear_attention: q must be (B, H, N, D), k (B, Hkv, N, D) and v (B, Hkv, N, E) with H a multiple of Hkv; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if engine not in ENGINES:
        raise ValueError(f"linear_attention: engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"linear_attention: chunk must be an int >= 1, got {chunk!r}")
    if beta is not None and normalize:
        raise ValueError(
            "linear_attention: normalize does not go with beta: the delta rule's weights have any sign"
        )
    if engine == "quadratic" and (beta is not None or n > QUADRATIC_MOST):
        raise ValueError(
            f"linear_attention: engine='quadratic' takes no beta and at most {QUADRATIC_MOST} tokens, got {n} tokens"
            f"{' and beta' if beta is not None else ''}; 'chunked' does both"
        )
    if beta is not None:
        _fits("beta", beta, [(b, g, n)])
    if log_decay is not None:
        _fits("log_decay", log_decay, [(g,), (b, g, n), (b, g, n, d)])
        if bool((log_decay.detach() > 0).any()):
            raise ValueError(
                f"linear_attention: log_decay must be <= 0, got up to {float(log_decay.detach().max()):g}"
            )
        if log_decay.ndim == 1:
            log_decay = log_decay.view(1, g, 1).expand(b, g, n)
        log_decay = log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay
    if state is not None:
        want = (b, g, d, v.shape[3])
        if not isinstance(state, LinearState):
            raise TypeError(f"linear_attention: state must be a LinearState, got {_said(state)}")
        if state.kv.shape != want or (state.k is not None) != normalize:
            raise ValueError(
                f"linear_attention: state must hold kv {want}{' and k' if normalize else ' and no k'}; got kv "
                f"{tuple(state.kv.shape)}{'' if state.k is None else ' and k'}"
            )
    return log_decay, beta


def _fits(name: str, t: object, shapes: Sequence[tuple[int, ...]]) -> None:
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"linear_attention: {name} must be a floating-point tensor, got {_said(t)}")
    if tuple(t.shape) not in shapes:
        raise ValueError(
            f"linear_attention: {name} must have shape {' or '.join(map(str, shapes))}, got {tuple(t.shape)}"
        )


def _said(t: object) -> str:
    return f"a {t.dtype} tensor" if isinstance(t, Tensor) else type(t).__name__
