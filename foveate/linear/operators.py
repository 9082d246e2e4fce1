"""Linear attention as an object of q, k and v, with its state: what layers and the common suite call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.linear.feature_maps import elu_plus_one
from foveate.linear.scan import CHUNK, LinearState, linear_attention

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": elu_plus_one,
    "relu": torch.relu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class LinearAttention:
    """Causal kernel attention: o_t = sum_{j<=t} a^(t-j) phi(q_t).phi(k_j) v_j / sum_{j<=t} a^(t-j) phi(q_t).phi(k_j).

    Args:
        feature: "elu+1", "relu" or "identity"; "relu" may leave a query without weights, then eps decides.
        log_decay: one number <= 0 for all heads; 0: no decay.
        normalize: divide by the sum of the weights; "identity" needs False.
        chunk: tokens of a chunk; no part of the result.

    Source: Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention (2020).

    >>> op = LinearAttention()
    >>> q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    >>> out, state = op(q[:, :, :30], k[:, :, :30], v[:, :, :30], state=op.initial_state(q, k, v))
    >>> torch.allclose(op(q, k, v)[:, :, :30], out, atol=1e-6)
    True
    """

    feature: str = "elu+1"
    log_decay: float = 0.0
    normalize: bool = True
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.feature not in MAPS:
            raise ValueError(
                f"LinearAttention: feature must be one of {', '.join(MAPS)}, got {self.feature!r}"
            )
        if self.log_decay > 0:
            raise ValueError(f"LinearAttention: log_decay must be <= 0, got {self.log_decay}")
        if self.normalize and self.feature == "identity":
            raise ValueError(
                "LinearAttention: feature 'identity' has weights of any sign; pass normalize=False"
            )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, state: LinearState | None = None
    ) -> Tensor | tuple[Tensor, LinearState]:
        """out (B, H, N, E); with the state of the tokens before, (out, state after these)."""
        phi = MAPS[self.feature]
        decay = torch.full((k.shape[1],), self.log_decay, device=k.device) if self.log_decay else None
        return linear_attention(
            phi(q),
            phi(k),
            v,
            log_decay=decay,
            normalize=self.normalize,
            chunk=self.chunk,
            state=state,
            return_state=state is not None,
        )

    def initial_state(self, q: Tensor, k: Tensor, v: Tensor) -> LinearState:
        """The state before the first token."""
        return LinearState.empty(k, v, normalize=self.normalize)
