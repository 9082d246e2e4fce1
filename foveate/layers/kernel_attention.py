"""Linear attention with a feature map as a layer: the plain baseline of everything with a state."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.linear.feature_maps import RandomFeatures, elu_plus_one
from foveate.linear.scan import LinearState, linear_attention

FEATURES = ("elu+1", "random")


class KernelAttention(nn.Module):
    """Causal multi-head linear attention: out = merge(phi(q)_t S_t / phi(q)_t . z_t) W_o.

    Args:
        dim: width of the tokens; heads: of q, k, v.
        feature: "elu+1", or "random": Performer's positive random features of q / D^(1/4) and k / D^(1/4).
        random_features: how many, for "random"; seed: which.

    Shape: (B, N, dim) -> (B, N, dim).

    Sources: Transformers are RNNs (2020); Rethinking Attention with Performers (2020).

    >>> import torch
    >>> layer = KernelAttention(32, heads=4)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-6), state.position
    (True, 20)
    """

    def __init__(
        self, dim: int, heads: int, *, feature: str = "elu+1", random_features: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"KernelAttention: dim must be a multiple of heads, got {dim} and {heads}")
        if feature not in FEATURES:
            raise ValueError(
                f"KernelAttention: feature must be one of {', '.join(FEATURES)}, got {feature!r}"
            )
        self.heads, self.feature = heads, feature
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        drawn = RandomFeatures.draw(random_features, dim // heads, seed=seed).directions
        self.register_buffer("directions", drawn if feature == "random" else None)

    def features(self, x: Tensor, *, queries: bool = False) -> Tensor:
        """phi of queries or keys (B, heads, N, D)."""
        if self.directions is None:
            return elu_plus_one(x)
        return RandomFeatures(self.directions)(x * x.shape[-1] ** -0.25, queries=queries)  # pyright: ignore

    def forward(self, x: Tensor, *, state: LinearState | None = None) -> Tensor | tuple[Tensor, LinearState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v = self._split(x)
        got = linear_attention(
            self.features(q, queries=True),
            self.features(k),
            v,
            normalize=True,
            state=state,
            return_state=True,
        )
        assert isinstance(got, tuple)
        out = self.o_proj(got[0].transpose(1, 2).flatten(2))
        return out if state is None else (out, got[1])

    def initial_state(self, x: Tensor) -> LinearState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        _, k, v = self._split(x[:, :0])
        return LinearState.empty(self.features(k), v, normalize=True)

    def _split(self, x: Tensor) -> list[Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for proj in projections
        ]  # (B, heads, N, D)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, feature={self.feature}"
