"""Complex-vector attention: heads learn how much the angle between query and key counts beside their distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foveate.core.attention import attention
from foveate.core.patterns import Causal, Full, Pattern, SlidingWindow
from foveate.core.rotary import Rope, Rotary
from foveate.layers.self_attention import KeyValueState

EPS = 1e-9
STARTS = ("rope", "random")


class _Phase(torch.autograd.Function):
    """atan2(im, re) with the gradient (-im, re) / (re^2 + im^2 + eps): 0 at the origin, not infinite."""

    @staticmethod
    def forward(ctx, re: Tensor, im: Tensor) -> Tensor:
        ctx.save_for_backward(re, im)
        return torch.atan2(im, re)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        re, im = ctx.saved_tensors
        grad = grad / (re * re + im * im + EPS)
        return -im * grad, re * grad


def complex_turn(x: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Pairs (c, c + D/2) of x as |x| e^(i phi) -> |x| e^(i (delta phi + bias)), the same shape and dtype.

        |x| = sqrt(re^2 + im^2 + 1e-9),   phi = atan2(im, re) in (-pi, pi]

    With delta = 1 and bias = 0 nothing changes. Where delta is not a whole number the result jumps at phi = pi
    (`near_branch_cut` counts how many pairs are close to it).

    Args:
        x: (B, H, N, D), D even.
        delta, bias: (H, D / 2).

    Source: ComplexFormer (2025).

    >>> x = torch.tensor([[[[0.0, 2.0]]]])  # 2i: length 2, angle pi / 2
    >>> complex_turn(x, torch.tensor([[2.0]])).round(decimals=4).flatten().tolist()  # angle pi
    [-2.0, -0.0]
    """
    _check(x, delta, "delta")
    if bias is not None:
        _check(x, bias, "bias")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    re, im = x.to(wide).chunk(2, -1)  # (B, H, N, D/2)
    length = (re * re + im * im + EPS).sqrt()
    angle = _Phase.apply(re, im) * delta.to(wide)[:, None]
    if bias is not None:
        angle = angle + bias.to(wide)[:, None]
    return torch.cat([length * angle.cos(), length * angle.sin()], -1).to(x.dtype)


def complex_rotate(
    x: Tensor, delta: Tensor, positions: Tensor, bias: Tensor | None = None, *, rope: Rope | None = None
) -> Tensor:
    """What makes the plain product a complex-vector score: `complex_turn`, then the rotation by positions.

        q' = |q| e^(i (delta phi + beta + m g)),  k' = |k| e^(i (delta psi + n g)),  g_c = 10000^(-2c/D)
        q'_m . k'_n = sum_c |q_mc| |k_nc| cos(delta_c (phi_mc - psi_nc) + beta_c + (m - n) g_c)

    The adapted angle is a difference of what belongs to the query and what belongs to the key, so the score needs no
    tensor of pairs: q' and k' go into any softmax attention, k' into any cache.

    Args:
        x: queries (with bias beta) or keys (without), (B, H, N, D).
        delta, bias: (H, D / 2). positions: int (N,) or (B, N).
        rope: another rotation of (c, c + D/2); default `Rotary()`.

    >>> q = torch.randn(1, 2, 5, 8)
    >>> turned = complex_rotate(q, torch.ones(2, 4), torch.arange(5))
    >>> torch.allclose(turned, Rotary()(q, torch.arange(5)), atol=1e-4)
    True
    """
    return (Rotary() if rope is None else rope)(complex_turn(x, delta, bias), positions)


def near_branch_cut(x: Tensor, within: float = 0.1) -> Tensor:
    """Share of pairs of x whose phase is at most `within` (radians) from the cut at pi, per head.

    x (B, H, N, D) -> (H,). A uniform phase gives within / pi.

    >>> near_branch_cut(torch.tensor([[[[-1.0, 1.0, 0.01, 0.0]]]]))  # -1 + 0.01i and 1
    tensor([0.5000])
    """
    if x.ndim != 4 or x.shape[-1] % 2 or not 0 < within <= math.pi:
        raise ValueError(
            f"near_branch_cut: x (B, H, N, D) with D even and 0 < within <= pi; got {tuple(x.shape)}, {within}"
        )
    re, im = x.detach().float().chunk(2, -1)
    return (torch.atan2(im, re).abs() > math.pi - within).float().mean((0, 2, 3))


def _check(x: Tensor, value: Tensor, name: str) -> None:
    if x.ndim != 4 or x.shape[-1] % 2 or value.shape != (x.shape[1], x.shape[-1] // 2):
        raise ValueError(
            f"complex_turn: x must be (B, H, N, D) with D even and {name} (H, D / 2); "
            f"got {tuple(x.shape)} and {tuple(value.shape)}"
        )


class ComplexAttention(nn.Module):
    """Multi-head attention whose heads weigh the angle between query and key beside their distance.

        x_mn = scale sum_c |q_mc| |k_nc| cos(delta_c (phi_mc - psi_nc) + beta_c + (m - n) g_c)

    delta = 1 and beta = 0 is rotary attention; D / 2 numbers of each per head are learnt.

    Args:
        dim: width of the tokens.
        heads, kv_heads: query heads, and key/value heads that they share (then also delta); None: as many as heads.
        start: of delta: "rope" (ones), or "random", normal with variance 2 / D as released.
        scale: of the logits, default 1 / sqrt(D); 1.0 as released.
        base: of the rotation.
        window, causal: each query sees the last `window` keys; with causal=False all keys.
        bias: of the four maps.

    Shape: (B, N, dim) -> (B, N, dim).

    Source: ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector
    Attention (2025). Differs from the release: no tensor of pairs (the angle is factorised), the scale, the start.

    >>> layer = ComplexAttention(32, heads=4)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-5), state.k.shape
    (True, torch.Size([1, 4, 20, 8]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        start: str = "rope",
        scale: float | None = None,
        base: float = 10_000.0,
        window: int | None = None,
        causal: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or dim % (2 * heads):
            raise ValueError(
                "ComplexAttention: dim must be a multiple of 2 * heads, and heads of kv_heads; "
                f"got dim={dim}, heads={heads}, kv_heads={kv_heads}"
            )
        if start not in STARTS:
            raise ValueError(f"ComplexAttention: start must be one of {', '.join(STARTS)}, got {start!r}")
        if window is not None and not causal:
            raise ValueError(f"ComplexAttention: window={window} needs causal=True")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.window, self.causal, self.scale = window, causal, scale
        self.rotary = Rotary(base)
        self.pattern: Pattern = Causal() if causal else Full()
        if window is not None:
            self.pattern = Causal() & SlidingWindow(window)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(proj.weight)
        self.delta = nn.Parameter(torch.ones(kv_heads, self.head_dim // 2))
        self.angle = nn.Parameter(torch.zeros(heads, self.head_dim // 2))  # beta
        if start == "random":
            nn.init.normal_(self.delta, std=(2 / self.head_dim) ** 0.5)

    def forward(
        self, x: Tensor, *, state: KeyValueState | None = None
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v = (
            proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = 0 if state is None else state.position
        at = torch.arange(seen, seen + x.shape[1], device=x.device)
        shared = self.delta.repeat_interleave(self.heads // self.kv_heads, 0)
        q = complex_rotate(q, shared, at, self.angle, rope=self.rotary)
        k = complex_rotate(k, self.delta, at, rope=self.rotary)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        out = attention(q, k, v, self.pattern, scale=self.scale)
        assert isinstance(out, Tensor)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if state is None:
            return out
        if not self.causal:
            raise ValueError("ComplexAttention: a state needs causal=True")
        keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
        return out, KeyValueState(
            k[:, :, k.shape[2] - keep :], v[:, :, v.shape[2] - keep :], seen + x.shape[1]
        )

    def initial_state(self, x: Tensor) -> KeyValueState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        none = self.k_proj(x[:, :0]).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return KeyValueState(none, none, 0)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, window={self.window}, causal={self.causal}"
