"""Attention taken apart: replacements of equal size that lack one property each, models of them, indicators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.attention import attention
from foveate.core.rotary import Rotary
from foveate.layers.language_model import GatedMLP, TransformerLM
from foveate.layers.self_attention import KeyValueState
from foveate.linear import (
    LinearState,
    TaylorFeatures,
    linear_attention,
    recurrence,
    taylor_linear_attention,
)

FIXED = ("rnd_emb_qk", "fixed_seq_qk")  # weights that do not depend on the input
VARIANTS = ("standard", "mlp", "approximate", "non_approximate", *FIXED, "static_emb_qk")
LAYOUTS = ("uniform", "hybrid", "odd", "top", "middle", "bottom", "every_4th", "first", "last", "first_last")


# -------------------------------------------------------------------------------------------- scores of keys alone
@dataclass(frozen=True, eq=False)
class PoolState:
    """What `prefix_pooling` keeps: a vector and two numbers per head, after any number of tokens. Immutable.

    Attributes:
        sums: (B, H, E + 1), sum_j exp(s_j - top) [v_j, 1].
        top: (B, H), the largest score so far.
        position: tokens seen.
    """

    sums: Tensor
    top: Tensor
    position: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.sums.nbytes + self.top.nbytes


def prefix_pooling(s: Tensor, v: Tensor, *, state: PoolState | None = None) -> tuple[Tensor, PoolState]:
    """Weighted means of all prefixes; a key's weight comes from its own score and no query.

        o_i = sum_{j <= i} exp(s_j) v_j / sum_{j <= i} exp(s_j)

    Linear in the tokens: sums relative to the largest score so far, decayed where that grows.

    Args:
        s: scores (B, H, N); v: (B, H, N, E).
        state: of the tokens before; it is not changed.

    Returns:
        (out (B, H, N, E), state after these tokens).

    Source: Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (2025).

    >>> out, _ = prefix_pooling(torch.zeros(1, 1, 3), torch.tensor([[[[1.0], [2.0], [6.0]]]]))
    >>> out.flatten().tolist()
    [1.0, 1.5, 3.0]
    """
    if s.shape != v.shape[:-1]:
        raise ValueError(
            f"prefix_pooling: s must be (B, H, N) and v (B, H, N, E), got {tuple(s.shape)} and {tuple(v.shape)}"
        )
    wide = torch.promote_types(v.dtype, torch.float32)
    s = s.to(wide)
    if state is None:
        lowest = s.new_full(s.shape[:2], -torch.inf)
        state = PoolState(s.new_zeros(*s.shape[:2], v.shape[3] + 1), lowest, 0)
    if not s.shape[2]:
        return v, state
    with torch.no_grad():  # the result does not depend on what is subtracted
        tops = torch.cat([state.top.unsqueeze(-1), s], 2).cummax(2).values  # (B, H, 1 + N)
        decay = (tops[..., :-1] - tops[..., 1:]).exp()
    weight = (s - tops[..., 1:]).exp().unsqueeze(-1)
    sums = recurrence(decay, weight * torch.cat([v.to(wide), torch.ones_like(weight)], 3), state.sums)
    out = (sums[..., :-1] / sums[..., -1:]).to(v.dtype)
    return out, PoolState(sums[:, :, -1], tops[..., -1], state.position + s.shape[2])


def per_order_taylor(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The Taylor series of exp with every order normalised by itself, as in the paper's appendix.

        o_i = mean_{j <= i} v_j + sum_j z_ij v_j / sum_j z_ij + sum_j z_ij^2 v_j / sum_j z_ij^2,   z = q . k / sqrt(d)

    The sum of the first order has any sign and may be near 0; `taylor_linear_attention` does not have that fault.

    Args:
        q, k: (B, H, N, d); v: (B, H, N, E).
        eps: added to each sum.
    """
    features = TaylorFeatures()
    query, key = features(q), features(k)
    cuts = ((0, 1), (1, 1 + q.shape[-1]), (1 + q.shape[-1], query.shape[-1]))  # orders 0, 1, 2
    orders = (linear_attention(query[..., a:b], key[..., a:b], v.to(query.dtype), normalize=True, eps=eps)
              for a, b in cuts)  # fmt: skip
    out = sum(order for order in orders if isinstance(order, Tensor))
    assert isinstance(out, Tensor)
    return out.to(v.dtype)


# ------------------------------------------------------------------------------------------------------- the layer
class AttentionVariant(nn.Module):
    """A causal attention layer, or one of six replacements of the same size that lack one of its properties.

    ================= ==================================== ===============================================
    variant           what it computes                     what it lacks
    ================= ==================================== ===============================================
    "standard"        softmax(q k^T / sqrt(d)) v           nothing
    "mlp"             (silu(h W_g) * (h W_u)) W_d          mixing of tokens
    "approximate"     weights 1 + z + z^2 / 2, z the logit the exponential
    "non_approximate" weights exp(silu(q_j) . k_j / sqrt(d)) queries: a key's weight is the same for all
    "rnd_emb_qk"      q, k from a noise stream             weights that depend on the input
    "fixed_seq_qk"    q, k from one fixed sequence's stream weights that depend on the input
    "static_emb_qk"   q, k from the tokens' embeddings     weights that depend on the layers before
    ================= ==================================== ===============================================

    Args:
        dim: width of the tokens.
        heads: heads of d = dim / heads channels.
        variant: one of the table.
        normalize: of "approximate": "joint" (over the sum of the weights) or "per_order" (`per_order_taylor`).
        rotary: rotate queries and keys (not in "mlp" and "non_approximate", which have no pairs).

    Shape: (B, N, dim) -> (B, N, dim).

    Source: Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (2025).

    >>> layer = AttentionVariant(64, 4, "non_approximate")
    >>> x = torch.randn(1, 20, 64)
    >>> out, state = layer(x, state=layer.initial_state(x))
    >>> torch.allclose(layer(x), out, atol=1e-6), state.sums.shape
    (True, torch.Size([1, 4, 17]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        variant: str = "standard",
        *,
        normalize: str = "joint",
        rotary: bool = True,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(
                f"AttentionVariant: variant must be one of {', '.join(VARIANTS)}, got {variant!r}"
            )
        if heads < 1 or dim % heads:
            raise ValueError(
                f"AttentionVariant: dim must be a multiple of heads, got dim={dim}, heads={heads}"
            )
        if normalize not in ("joint", "per_order"):
            raise ValueError(f"AttentionVariant: normalize must be joint or per_order, got {normalize!r}")
        self.dim, self.heads, self.variant, self.normalize = dim, heads, variant, normalize
        self.rotary = Rotary() if rotary else None
        if variant == "mlp":
            self.mlp = GatedMLP(dim, round(4 * dim / 3))  # as many parameters as four maps dim x dim
            return
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(4)
        )

    def forward(
        self,
        h: Tensor,
        *,
        emb: Tensor | None = None,
        reference: Tensor | None = None,
        state: Any = None,
    ) -> Any:
        """out (B, N, dim); with the state of the tokens before, (out, state after these).

        Args:
            h: (B, N, dim), the next tokens.
            emb: (B, N, dim), their embeddings, for "static_emb_qk" alone.
            reference: (L, dim), what "rnd_emb_qk" and "fixed_seq_qk" take queries and keys from, for all positions from
                0, so that L >= tokens before + N.
            state: of the tokens before (`initial_state`, or what the last call returned); it is not changed.
        """
        if self.variant == "mlp":
            return self.mlp(h) if state is None else (self.mlp(h), state)
        position = 0 if state is None else state.position
        v = self._split(self.v_proj(h))
        out, after = self._mix(*self._queries(h, emb, reference, position), v, state)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return out if state is None else (out, after)

    def weights(self, h: Tensor, *, emb: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
        """Weights (B, H, N, N) of every token, for probes; it holds all pairs.

        Raises:
            ValueError: variant "mlp", which mixes no tokens.
        """
        if self.variant == "mlp":
            raise ValueError("AttentionVariant.weights: variant 'mlp' has no weights")
        q, k = self._queries(h, emb, reference, 0)
        eye = torch.eye(h.shape[1]).to(h).expand(h.shape[0], self.heads, -1, -1)
        return self._mix(q, k, eye, None)[0]

    def initial_state(self, x: Tensor) -> Any:
        """The state before the first token, for inputs like x (B, N, dim)."""
        if self.variant == "mlp":
            return x.new_zeros(x.shape[0], 0)
        none = self._split(self.v_proj(x[:, :0]))
        if self.variant == "non_approximate":
            return prefix_pooling(none[..., 0], none)[1]
        if self.variant == "approximate":
            return LinearState.empty(TaylorFeatures()(none), none, normalize=True)
        return KeyValueState(none, none, 0)

    def _queries(
        self, h: Tensor, emb: Tensor | None, reference: Tensor | None, position: int
    ) -> tuple[Tensor, Tensor]:
        """q, k (B or 1, H, N, d), rotated where pairs are compared."""
        n, source = h.shape[1], h
        if self.variant == "static_emb_qk":
            if emb is None or emb.shape != h.shape:
                raise ValueError(
                    f"AttentionVariant: emb must have shape {tuple(h.shape)} for {self.variant}, "
                    f"got {None if emb is None else tuple(emb.shape)}"
                )
            source = emb
        if self.variant in FIXED:
            if reference is None or reference.ndim != 2 or reference.shape[0] < position + n:
                raise ValueError(
                    f"AttentionVariant: reference must be (L, dim) with L >= {position + n} for {self.variant}, "
                    f"got {None if reference is None else tuple(reference.shape)}"
                )
            source = reference[None, position : position + n]
        q, k = self._split(self.q_proj(source)), self._split(self.k_proj(source))
        if self.rotary is not None and self.variant != "non_approximate":
            at = torch.arange(position, position + n, device=h.device)
            q, k = self.rotary(q, at), self.rotary(k, at)
        return q, k

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(out (B, H, N, E), state after) for v (B, H, N, E)."""
        if self.variant == "non_approximate":
            s = (nn.functional.silu(q) * k).sum(-1) * q.shape[-1] ** -0.5  # (B, H, N)
            return prefix_pooling(s, v, state=state)
        if self.variant == "approximate" and self.normalize == "per_order":
            if state is not None:
                raise ValueError("AttentionVariant: normalize='per_order' carries no state")
            return per_order_taylor(q, k, v), None
        if self.variant == "approximate":
            found = taylor_linear_attention(q, k, v, state=state)
            return (found, None) if isinstance(found, Tensor) else found
        q, k = (t.expand(v.shape[0], -1, -1, -1) for t in (q, k))
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        out = attention(q, k, v, is_causal=True)
        assert isinstance(out, Tensor)
        return out, None if state is None else KeyValueState(k, v, k.shape[2])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, d)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, variant={self.variant}"


# ------------------------------------------------------------------------------------------------------- the model
def build_layout(depth: int, variant: str, layout: str = "hybrid") -> list[str]:
    """Which layers are standard attention and which the variant.

    "uniform": none standard; "hybrid": the even ones (0, 2, ..); "odd": the odd ones; "top", "middle", "bottom": that
    half of the layers (bottom: the first ones); "every_4th": 0, 4, ..; "first", "last", "first_last": those.

    >>> build_layout(4, "mlp"), build_layout(4, "mlp", "top")
    (['standard', 'mlp', 'standard', 'mlp'], ['mlp', 'mlp', 'standard', 'standard'])
    """
    if variant not in VARIANTS or layout not in LAYOUTS:
        raise ValueError(
            f"build_layout: variant must be one of {', '.join(VARIANTS)} and layout of {', '.join(LAYOUTS)}, "
            f"got {variant!r} and {layout!r}"
        )
    half = depth // 2
    quarter = (depth - half) // 2
    standard = {
        "uniform": range(0),
        "hybrid": range(0, depth, 2),
        "odd": range(1, depth, 2),
        "top": range(depth - half, depth),
        "middle": range(quarter, quarter + half),
        "bottom": range(half),
        "every_4th": range(0, depth, 4),
        "first": range(min(1, depth)),
        "last": range(depth - 1, depth),
        "first_last": (0, depth - 1),
    }[layout]
    return ["standard" if layer in standard else variant for layer in range(depth)]


class VariantLM(TransformerLM):
    """A language model of `AttentionVariant` layers: ids (B, N) -> logits (B, N, vocab).

    Layers with fixed weights take queries and keys from a reference stream: noise, or the embeddings of a fixed
    sequence, that passes through the same layers. Embeddings and the stream pass each layer's norm, as its tokens do.

    Args:
        vocab, dim, depth, mlp: see `TransformerLM`.
        heads: see `AttentionVariant`.
        variant: one name; layout: of `build_layout`, or the variant of every layer.
        tokens: length of the reference stream, the longest input of a model with fixed weights.
        seed, sigma: of the noise (std sigma) and of the fixed sequence (tokens drawn uniformly).

    Source: Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (2025).

    >>> model = VariantLM(50, 32, 4, heads=2, variant="rnd_emb_qk", tokens=20)
    >>> ids = torch.randint(50, (2, 17))
    >>> model(ids).shape, model.layout
    (torch.Size([2, 17, 50]), ('standard', 'rnd_emb_qk', 'standard', 'rnd_emb_qk'))
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        depth: int,
        *,
        heads: int,
        variant: str = "standard",
        layout: str | Sequence[str] = "hybrid",
        tokens: int = 2048,
        mlp: float = 8 / 3,
        seed: int = 0,
        sigma: float = 0.02,
    ) -> None:
        kinds = build_layout(depth, variant, layout) if isinstance(layout, str) else list(layout)
        super().__init__(vocab, dim, depth, [AttentionVariant(dim, heads, kind) for kind in kinds], mlp=mlp)
        self.layout = tuple(kinds)
        self.skip = (
            False  # leave out all layers but the standard ones: tells what a trained model needs of them
        )
        fixed = sorted(set(kinds) & set(FIXED))
        if len(fixed) > 1:
            raise ValueError(f"VariantLM: one reference stream, but the layout has {' and '.join(fixed)}")
        g = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "noise", sigma * torch.randn(tokens, dim, generator=g) if fixed == [FIXED[0]] else None
        )
        self.register_buffer(
            "sequence", torch.randint(vocab, (tokens,), generator=g) if fixed == [FIXED[1]] else None
        )

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads, (B, N, dim)."""
        return self.norm(self._run(ids, None))

    @torch.no_grad()
    def weights(self, ids: Tensor) -> list[Tensor | None]:
        """Weights (B, H, N, N) of every layer; None where nothing mixes."""
        found: list[Tensor | None] = []
        self._run(ids, found)
        return found

    def _run(self, ids: Tensor, found: list[Tensor | None] | None) -> Tensor:
        x = emb = self.embed(ids)  # (B, N, dim)
        stream = self._stream(ids.shape[1])  # (1, N, dim) or None
        last = max((layer for layer, kind in enumerate(self.layout) if kind in FIXED), default=-1)
        blocks: list[Any] = list(self.blocks)
        for layer, (kind, block) in enumerate(zip(self.layout, blocks, strict=True)):
            norm, mixer, mlp_norm, mlp = block.mixer_norm, block.mixer, block.mlp_norm, block.mlp
            given = {"emb": norm(emb) if kind == "static_emb_qk" else None,
                     "reference": norm(stream)[0] if kind in FIXED and stream is not None else None}  # fmt: skip
            skipped = self.skip and kind != "standard"
            if found is not None:
                found.append(None if kind == "mlp" else mixer.weights(norm(x), **given))
            x = x if skipped else x + mixer(norm(x), **given)
            x = x if mlp is None else x + mlp(mlp_norm(x))
            if stream is not None and layer < last:
                own = norm(stream)
                stream = stream if skipped else stream + mixer(own, emb=own, reference=own[0])
                stream = stream if mlp is None else stream + mlp(mlp_norm(stream))
        return x

    def _stream(self, n: int) -> Tensor | None:
        """The first n tokens of the reference, (1, n, dim); None where no layer reads one."""
        start = self.noise if self.noise is not None else self.sequence
        if not isinstance(start, Tensor):
            return None
        if n > len(start):
            raise ValueError(f"VariantLM: {n} tokens, but a reference stream of tokens={len(start)}")
        return (self.embed(start[:n]) if start.ndim == 1 else start[:n])[None]


# -------------------------------------------------------------------------------------------------- the indicators
def attention_indicators(attn: Tensor) -> dict[str, Any]:
    """What a layer's weights look like, as means over batch, heads and rows.

        entropy -sum_j a_ij log a_ij;   concentration: Frobenius norm of a head's map;   head_diversity: std over the
        heads of an entry, mean of the causal entries;   sink: weight of token 0;   local_focus[m]: weight of the token
        m places before, m = 0 .. 3

    Args:
        attn: (B, H, N, N), causal, rows that sum to 1.

    Returns:
        floats, and a list of (up to) four for "local_focus".

    Source: Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (2025).

    >>> found = attention_indicators(torch.eye(5).expand(1, 2, 5, 5))
    >>> found["entropy"], round(found["sink"], 6), found["local_focus"]
    (0.0, 0.2, [1.0, 0.0, 0.0, 0.0])
    """
    if attn.ndim != 4 or attn.shape[2] != attn.shape[3]:
        raise ValueError(f"attention_indicators: attn must be (B, H, N, N), got {tuple(attn.shape)}")
    n = attn.shape[2]
    a = attn.to(torch.promote_types(attn.dtype, torch.float32))
    causal = torch.ones(n, n, dtype=torch.bool, device=a.device).tril()
    return {
        "entropy": float(torch.special.entr(a).sum(-1).mean()) + 0.0,
        "concentration": float(a.square().sum((-2, -1)).sqrt().mean()),
        "head_diversity": float(a.std(1, correction=0)[:, causal].mean()),
        "sink": float(a[..., 0].mean()),
        "local_focus": [float(a.diagonal(-m, -2, -1).mean()) for m in range(min(4, n))],
    }
