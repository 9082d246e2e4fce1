"""TransNormerLLM: a language model without softmax, around decayed linear attention with an output norm and a gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.layers.norms import RMSNorm
from foveate.linear.lightning import FORMS, alibi_decay, lightning_attention


@dataclass(frozen=True, eq=False)
class TNLState:
    """What a TNL layer remembers: the decayed sum of key-value products, (B, H, D, D), and how many tokens it has read.

    >>> TNLState(torch.zeros(1, 4, 8, 8), 0).nbytes
    1024
    """

    kv: Tensor
    position: int

    @property
    def nbytes(self) -> int:
        """Bytes of the state, whatever the position."""
        return self.kv.nbytes


class TNLAttention(nn.Module):
    """Linear attention with a decay per head, a norm in place of the denominator, and an output gate.

        Q, K, V = silu(x W_q), silu(x W_k), silu(x W_v),   o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j,
        out = (norm(merge(o)) * sigmoid(x W_1 W_2)) W_o

    Args:
        dim: width of the tokens.
        heads: H, a divisor of dim.
        layer, layers: its index in the model, for the decays (`alibi_decay`) and the rotation.
        gate_rank: inner width of the gate; None: dim / heads.
        rotation: rotate queries and keys by learnt angles per head and pair of channels, which start as those of rotary
            positions with base 10,000; None: in layer 0 alone.
        decay: "slopes" or "text", the forms of `alibi_decay`; "none".
        block, variant: of `lightning_attention`.

    Shape: (B, N, dim) -> (B, N, dim).

    Source: Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (2024). Differs from
    the released code: the rotation turns pairs of channels (there twice as many channels hold cosine and sine).

    >>> layer = TNLAttention(32, heads=4)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-5), state.kv.shape
    (True, torch.Size([1, 4, 8, 8]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        *,
        gate_rank: int | None = None,
        rotation: bool | None = None,
        decay: str = "slopes",
        block: int = 64,
        variant: str = "chunk_loop",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"TNLAttention: dim must be a multiple of heads, got dim={dim}, heads={heads}")
        if decay not in (*FORMS, "none"):
            raise ValueError(f"TNLAttention: decay must be one of {', '.join(FORMS)}, none; got {decay!r}")
        self.heads, self.head_dim, self.block, self.variant = heads, dim // heads, block, variant
        rotation = layer == 0 if rotation is None else rotation
        if rotation and self.head_dim % 2:
            raise ValueError(f"TNLAttention: the rotation needs an even dim / heads, got {dim} / {heads}")
        rates = alibi_decay(heads, layer, layers, form="slopes" if decay == "none" else decay)
        self.rates = None if decay == "none" else rates.tolist()  # no buffer: bfloat16 would round them
        pairs = torch.arange(self.head_dim // 2) / max(1, self.head_dim // 2)
        self.angles = nn.Parameter((10_000.0**-pairs).repeat(heads, 1)) if rotation else None  # (H, D/2)
        rank = self.head_dim if gate_rank is None else gate_rank
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False))
        self.norm = RMSNorm(dim, scale=False)

    def forward(self, x: Tensor, *, state: TNLState | None = None) -> Tensor | tuple[Tensor, TNLState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v = (
            F.silu(proj(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = 0 if state is None else state.position
        if self.angles is not None:
            q, k = self._rotated(q, seen), self._rotated(k, seen)
        out, kv = lightning_attention(
            q,
            k,
            v,
            None if self.rates is None else torch.tensor(self.rates, device=x.device),
            block=self.block,
            variant=self.variant,
            initial_state=None if state is None else state.kv,
            return_state=True,
        )
        out = self.norm(out.transpose(1, 2).flatten(2)) * torch.sigmoid(self.gate(x))
        out = self.o_proj(out)
        return out if state is None else (out, TNLState(kv, seen + x.shape[1]))

    def initial_state(self, x: Tensor) -> TNLState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = (x.shape[0], self.heads, self.head_dim, self.head_dim)
        return TNLState(torch.zeros(shape, dtype=wide, device=x.device), 0)

    def _rotated(self, x: Tensor, seen: int) -> Tensor:
        """x (B, H, N, D) with its pairs (a, b), halves of a head, turned by position times angle."""
        assert self.angles is not None
        at = torch.arange(seen, seen + x.shape[2], device=x.device, dtype=torch.float64)
        turn = at[:, None] * self.angles[:, None].double()  # (H, N, D/2)
        cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, block={self.block}, rotation={self.angles is not None}"


class SimpleGLU(nn.Module):
    """out = ((x W_v) * (x W_u)) W_o: a gated linear unit without an activation and without biases.

    Args:
        dim: width of the tokens; inner: width inside.

    Shape: (..., dim) -> (..., dim).

    Source: as `TNLAttention`, where it is called SGLU.

    >>> SimpleGLU(8, 16)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.value, self.up = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.value(x) * self.up(x))


class TNLBlock(nn.Module):
    """x += mixer(norm(x)); x += glu(norm(x)), with norms that learn nothing."""

    def __init__(self, dim: int, mixer: nn.Module, inner: int) -> None:
        super().__init__()
        self.norm, self.mixer, self.glu = RMSNorm(dim, scale=False), mixer, SimpleGLU(dim, inner)

    def forward(self, x: Tensor, state: TNLState | None = None) -> tuple[Tensor, TNLState | None]:
        mixed, state = (
            (self.mixer(self.norm(x)), None) if state is None else self.mixer(self.norm(x), state=state)
        )
        x = x + mixed
        return x + self.glu(self.norm(x)), state


class TransNormerLLM(nn.Module):
    """A small complete model: ids (B, N) -> logits (B, N, vocab).

        x = E[ids],   x += TNLAttention(norm(x)),   x += SGLU(norm(x)),   logits = norm(x) W,   W not tied to E

    Args:
        vocab: number of tokens.
        dim, depth, heads: width, blocks, heads of a block.
        inner: width of the gated linear units; None: 8/3 dim, rounded.
        gate_rank, decay, block, variant: of `TNLAttention`.

    Embedding and head start normal with std 0.02, the rest as torch makes it.

    Source: Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (2024).

    >>> model = TransNormerLLM(100, 32, depth=2, heads=4)
    >>> ids = torch.randint(100, (1, 30))
    >>> state = model.initial_state(ids)
    >>> for t in range(30):
    ...     logits, state = model.step(ids[:, t : t + 1], state)
    >>> torch.allclose(logits, model(ids)[:, 29:], atol=1e-4), sum(s.nbytes for s in state)
    (True, 2048)
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        inner: int | None = None,
        gate_rank: int | None = None,
        decay: str = "slopes",
        block: int = 64,
        variant: str = "chunk_loop",
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"TransNormerLLM: depth must be >= 1, got {depth}")
        inner = round(8 / 3 * dim) if inner is None else inner
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab, bias=False)
        self.norm = RMSNorm(dim, scale=False)
        self.blocks = nn.ModuleList(
            TNLBlock(
                dim,
                TNLAttention(
                    dim,
                    heads,
                    layer,
                    depth,
                    gate_rank=gate_rank,
                    decay=decay,
                    block=block,
                    variant=variant,
                ),
                inner,
            )
            for layer in range(depth)
        )
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)  # (B, N, dim)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x))

    def initial_state(self, ids: Tensor) -> list[TNLState]:
        """One state per block before the first token, for ids like (B, N)."""
        x = self.embed(ids[:, :0])
        return [block.mixer.initial_state(x) for block in self.blocks]  # pyright: ignore

    def step(self, ids: Tensor, state: list[TNLState]) -> tuple[Tensor, list[TNLState]]:
        """(logits of these tokens, states after them): the next ids (B, n) after those that the states have seen."""
        x, after = self.embed(ids), []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block(x, before)
            after.append(new)
        return self.head(self.norm(x)), after
