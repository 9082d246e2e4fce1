"""A causal language model of a few dozen lines around any mixer: to compare mixers, and to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from foveate.layers.norms import RMSNorm

NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm}
Mixer = Callable[[int], nn.Module]  # index of the layer -> a module (B, N, dim) -> (B, N, dim)


class GatedMLP(nn.Module):
    """out = (silu(x W_g) * (x W_u)) W_o, without biases (GLU Variants Improve Transformer, 2020).

    Args:
        dim: width of the tokens; inner: width inside.

    Shape: (..., dim) -> (..., dim).

    >>> import torch
    >>> GatedMLP(8, 16)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)), the second only where there is an mlp."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module | None, norm: str) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = NORMS[norm](dim), mixer
        self.mlp_norm, self.mlp = (NORMS[norm](dim), mlp) if mlp is not None else (None, None)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        mixed = (
            self.mixer(self.mixer_norm(x)) if state is None else self.mixer(self.mixer_norm(x), state=state)
        )
        mixed, state = (mixed, None) if state is None else mixed
        x = x + mixed
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class TransformerLM(nn.Module):
    """Embedding, pre-norm blocks around any mixer, a tied head: ids (B, N) -> logits (B, N, vocab).

        x_0 = E[ids] (+ P[0 .. N-1]),   x += mixer(norm(x)),   x += mlp(norm(x)),   logits = norm(x) E^T

    Args:
        vocab: number of tokens.
        dim: width.
        depth: number of blocks.
        mixer: what makes the mixer of a layer from its index: a module (B, N, dim) -> (B, N, dim), causal. Modules with
            a state have `initial_state(x)` and are called as `mixer(x, state=state) -> (out, state)`.
        mlp: width of the `GatedMLP` in units of dim; 0: none (the identity, as in MQAR's published models).
        norm: "layer" or "rms".
        positions: learned absolute positions of this many tokens at most; 0: none, for mixers that bring their own.

    Embeddings and MLPs start normal with std 0.02; mixers start as they were made.

    Raises:
        ValueError: an unknown norm, depth < 1, more ids than positions.

    >>> import torch
    >>> from foveate.layers import SelfAttention, TransformerLM
    >>> model = TransformerLM(100, 32, 2, lambda layer: SelfAttention(32, heads=4))
    >>> model(torch.randint(100, (2, 17))).shape
    torch.Size([2, 17, 100])
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        mixer: Mixer | Sequence[nn.Module],
        *,
        mlp: float = 8 / 3,
        norm: str = "rms",
        positions: int = 0,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"TransformerLM: norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if depth < 1:
            raise ValueError(f"TransformerLM: depth must be >= 1, got {depth}")
        mixers = [mixer(layer) for layer in range(depth)] if callable(mixer) else list(mixer)
        if len(mixers) != depth:
            raise ValueError(f"TransformerLM: {len(mixers)} mixers for a depth of {depth}")
        self.embed = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(positions, dim) if positions else None
        inner = round(mlp * dim)
        self.blocks = nn.ModuleList(
            Block(dim, m, GatedMLP(dim, inner) if inner else None, norm) for m in mixers
        )
        self.norm = NORMS[norm](dim)
        for embedding in (self.embed, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        for name, weight in self.named_parameters():
            if ".mlp." in name:
                nn.init.normal_(weight, std=0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads, (B, N, dim): for losses at a few positions of a large vocabulary."""
        x = self._embedded(ids, 0)
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(ids) @ self.embed.weight.T

    def initial_state(self, ids: Tensor) -> tuple[int, list[Any]]:
        """The state before the first token, for ids like (B, N): position, and one state per mixer.

        Raises:
            TypeError: a mixer without a state.
        """
        x = self._embedded(ids[:, :0], 0)
        for block in self.blocks:
            if not hasattr(block.mixer, "initial_state"):
                raise TypeError(f"TransformerLM: {type(block.mixer).__name__} carries no state")
        return 0, [block.mixer.initial_state(x) for block in self.blocks]  # pyright: ignore

    def step(self, ids: Tensor, state: tuple[int, list[Any]]) -> tuple[Tensor, tuple[int, list[Any]]]:
        """(logits of these tokens, state after them): the next ids (B, n) after those that the state has seen."""
        start, states = state
        x, after = self._embedded(ids, start), []
        for block, before in zip(self.blocks, states, strict=True):
            x, new = block(x, before)
            after.append(new)
        return self.norm(x) @ self.embed.weight.T, (start + ids.shape[1], after)

    def _embedded(self, ids: Tensor, start: int) -> Tensor:
        x = self.embed(ids)  # (B, N, dim)
        if self.positions is None:
            return x
        if start + ids.shape[1] > self.positions.num_embeddings:
            raise ValueError(
                f"TransformerLM: {start + ids.shape[1]} tokens, but positions={self.positions.num_embeddings}"
            )
        return x + self.positions.weight[start : start + ids.shape[1]]
