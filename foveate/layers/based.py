"""Based: linear attention with Taylor features, short gated convolutions and small windows, and models made of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from foveate.layers.language_model import TransformerLM
from foveate.layers.self_attention import SelfAttention
from foveate.layers.short_conv import ShortConv
from foveate.linear import LinearState, TaylorFeatures, taylor_linear_attention

KINDS = ("linear", "window", "conv")


class BasedLinearAttention(nn.Module):
    """Causal linear attention whose weights are the Taylor series of exp to its second order, with narrow q and k.

        o_t = sum_{j <= t} w_tj v_j / sum_{j <= t} w_tj,   w_tj = 1 + z + z^2 / 2,   z = q_t . k_j / sqrt(f)

    No positions: order comes from other layers. Without biases.

    Args:
        dim: width of the tokens.
        heads, kv_heads: query heads, and key/value heads that they share; kv_heads None: as many as heads.
        feature_dim: f, width of a query or key; the state has 1 + f + f (f + 1) / 2 rows of head_dim + 1 numbers.
        head_dim: width of a value; default dim / heads.
        eps, chunk: see `taylor_linear_attention`.

    Shape: (B, N, dim) -> (B, N, dim).

    Source: Simple linear attention language models balance the recall-throughput tradeoff (2024).

    >>> import torch
    >>> layer = BasedLinearAttention(32, heads=2, feature_dim=4)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-5), state.kv.shape
    (True, torch.Size([1, 2, 15, 16]))
    """

    def __init__(
        self,
        dim: int,
        heads: int = 16,
        kv_heads: int | None = None,
        *,
        feature_dim: int = 16,
        head_dim: int | None = None,
        eps: float = 1e-12,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or (head_dim is None and dim % heads):
            raise ValueError(
                "BasedLinearAttention: dim must be a multiple of heads, and heads of kv_heads; "
                f"got dim={dim}, heads={heads}, kv_heads={kv_heads}"
            )
        if feature_dim < 1:
            raise ValueError(f"BasedLinearAttention: feature_dim must be >= 1, got {feature_dim}")
        self.heads, self.kv_heads, self.feature_dim = heads, kv_heads, feature_dim
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.eps, self.chunk = eps, chunk
        self.q_proj = nn.Linear(dim, heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, *, state: LinearState | None = None) -> Tensor | tuple[Tensor, LinearState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v = self._heads(x)
        found = taylor_linear_attention(q, k, v, eps=self.eps, chunk=self.chunk, state=state)
        out, after = (found, None) if isinstance(found, Tensor) else found
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return out if after is None else (out, after)

    def initial_state(self, x: Tensor) -> LinearState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        _, k, v = self._heads(x[:, :0])
        return LinearState.empty(TaylorFeatures()(k), v, normalize=True)

    def _heads(self, x: Tensor) -> list[Tensor]:
        """q (B, H, N, f), k (B, Hkv, N, f), v (B, Hkv, N, E)."""
        widths = (self.feature_dim, self.feature_dim, self.head_dim)
        maps = (self.q_proj, self.k_proj, self.v_proj)
        return [proj(x).unflatten(2, (-1, d)).transpose(1, 2) for proj, d in zip(maps, widths, strict=True)]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, feature_dim={self.feature_dim}"


class GatedShortConv(nn.Module):
    """A causal convolution over a few tokens, channel by channel, times a gate: comparisons between neighbours.

        [u_1, u_2] = x W_in + b_in,   out = (silu(conv(u_1)) * u_2) W_out + b_out,
        conv(u)_t = sum_{i < kernel} c_i * u_{t - kernel + 1 + i}

    Args:
        dim: width of the tokens.
        kernel: tokens that the convolution sees, including its own.
        expand: width inside in units of dim.
        bias: of the two maps.

    Shape: (B, N, dim) -> (B, N, dim). State: the last kernel - 1 tokens of u_1, (B, kernel - 1, expand dim).

    Source: Simple linear attention language models balance the recall-throughput tradeoff (2024), where it is called
    BaseConv, as the one without these maps (`BaseConv`) is in the MQAR studies.

    >>> import torch
    >>> layer = GatedShortConv(8)
    >>> x = torch.randn(1, 20, 8)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> torch.allclose(layer(x)[:, 19:], layer(x[:, 19:], state=state)[0], atol=1e-6), state.shape
    (True, torch.Size([1, 2, 16]))
    """

    def __init__(self, dim: int, *, kernel: int = 3, expand: int = 2, bias: bool = True) -> None:
        super().__init__()
        if kernel < 1 or expand < 1:
            raise ValueError(
                f"GatedShortConv: kernel and expand must be >= 1, got kernel={kernel}, expand={expand}"
            )
        self.in_proj = nn.Linear(dim, 2 * expand * dim, bias=bias)
        self.conv = ShortConv(expand * dim, kernel, activation="silu")
        self.out_proj = nn.Linear(expand * dim, dim, bias=bias)

    def forward(self, x: Tensor, *, state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        u, gate = self.in_proj(x).chunk(2, -1)  # (B, N, expand dim)
        mixed, after = self.conv(u, state=self.initial_state(x) if state is None else state)
        out = self.out_proj(mixed * gate)
        return out if state is None else (out, after)

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros (B, kernel - 1, expand dim), for inputs like x (B, N, dim)."""
        return x.new_zeros(x.shape[0], self.conv.kernel - 1, self.conv.weight.shape[0])


def based_layout(depth: int) -> tuple[str, ...]:
    """The layers of the released models: every fifth one linear from the second on, a window after each, else "conv".

    A model of 36 layers breaks the rhythm after its 22nd, as released.

    >>> based_layout(7)
    ('conv', 'linear', 'window', 'conv', 'conv', 'conv', 'linear')
    >>> [i for i, kind in enumerate(based_layout(36)) if kind == "linear"]
    [1, 6, 11, 16, 21, 27, 33]
    """
    linear = (1, 6, 11, 16, 21, 27, 33) if depth == 36 else range(1, depth, 5)
    kinds = dict.fromkeys(range(depth), "conv")
    for layer in linear:
        kinds[layer] = "linear"
        if layer + 1 < depth:
            kinds[layer + 1] = "window"
    return tuple(kinds.values())


class BasedLM(TransformerLM):
    """A language model of Taylor linear attention, small windows and short convolutions: ids (B, N) -> logits.

    Two dials trade recall for state: `feature_dim` and `window`. Pre-norm RMSNorm, gated MLP, no absolute positions
    (windows rotate queries and keys), tied head.

    Args:
        vocab, dim, depth: see `TransformerLM`.
        heads: of the linear and window layers.
        layout: "auto" (`based_layout`), or the kind of every layer, "linear", "window" or "conv".
        window: tokens before its own that a query of a window layer sees, so that it sees window + 1.
        feature_dim: width of queries and keys in the linear layers.
        mlp: width of the MLP in units of dim.

    Raises:
        ValueError: a layout of another depth or with other kinds.

    Source: Simple linear attention language models balance the recall-throughput tradeoff (2024).

    >>> import torch
    >>> model = BasedLM(100, 32, 3, heads=2, window=4, feature_dim=8)
    >>> ids = torch.randint(100, (1, 50))
    >>> logits, state = model.step(ids, model.initial_state(ids))
    >>> logits.shape, state_bytes(state) == model.state_bytes(tokens=50)
    (torch.Size([1, 50, 100]), True)
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        *,
        heads: int = 16,
        layout: str | Sequence[str] = "auto",
        window: int = 128,
        feature_dim: int = 16,
        mlp: float = 2,
    ) -> None:
        kinds = based_layout(depth) if layout == "auto" else layout
        if isinstance(kinds, str) or len(kinds) != depth or any(kind not in KINDS for kind in kinds):
            raise ValueError(
                f'BasedLM: layout must be "auto" or {depth} of {", ".join(KINDS)}, got {layout!r}'
            )
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"BasedLM: window must be an int >= 1, got {window!r}")

        def mixer(layer: int) -> nn.Module:
            if kinds[layer] == "conv":
                return GatedShortConv(dim)
            if kinds[layer] == "linear":
                return BasedLinearAttention(dim, heads, feature_dim=feature_dim)
            return SelfAttention(dim, heads, window=window + 1)

        super().__init__(vocab, dim, depth, mixer, mlp=mlp)
        self.layout, self.dim, self.heads, self.window, self.feature_dim = (
            tuple(kinds),
            dim,
            heads,
            window,
            feature_dim,
        )

    def state_bytes(self, tokens: int, *, batch: int = 1) -> int:
        """Bytes of the decoding state after some tokens; from `window` tokens on it does not grow."""
        size, f = self.embed.weight.element_size(), self.feature_dim
        each = {
            "linear": (1 + f + f * (f + 1) // 2) * (self.dim + self.heads) * max(size, 4),
            "window": 2 * min(tokens, self.window) * self.dim * size,
            "conv": 2 * 2 * self.dim * size,
        }
        return batch * sum(each[kind] for kind in self.layout)


def state_bytes(state: tuple[int, list[object]]) -> int:
    """Bytes that a model's state holds: the sum of `nbytes` over its layers (tensors, or states that have it).

    Args:
        state: of `TransformerLM.initial_state` or `TransformerLM.step`.
    """
    return sum(layer.nbytes for layer in state[1])  # pyright: ignore[reportAttributeAccessIssue]
