"""One card per mixer of tokens: what kind it is, what it costs, what one layer sees; and a measurement of the last.

A layer is Y = N(A(X)) V(X) and a map per token: A mixes n x n tokens, N normalises, V maps. After "A Unified View of
Long-Sequence Models towards Modeling Million-Scale Dependencies" (2023); the words of the cards are this library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from foveate.compress import CCAAttention
from foveate.core.attention import attention
from foveate.core.patterns import Causal, Pattern, SlidingWindow
from foveate.layers import (
    BaseConv,
    DeltaNet,
    DynamicMaskAttention,
    GatedLinearAttention,
    HierarchicalSelfAttention,
    KernelAttention,
    LocalLinearAttention,
    RoutingAttention,
    SelfAttention,
    ShortConv,
)

MIXING = ("input-dependent", "learned", "fixed")
STRUCTURES = ("dense", "sparse", "low-rank", "recurrence", "Toeplitz", "hierarchical", "hybrid")
NORMALIZERS = ("softmax", "linear sum", "none")
FIELDS = ("all", "causal", "window", "content", "pattern")
WINDOW = 5  # of the small instances


@dataclass(frozen=True)
class MixerCard:
    """What a mixer is.

    Args:
        name: of the mixer.
        mixing: where A comes from: "input-dependent", "learned" or "fixed".
        structure: of A, one of `STRUCTURES`.
        normalizer: "softmax", "linear sum" or "none".
        causal: has a form that never reads a later token.
        time, memory: of a layer on N tokens, as powers of N (W window, K kept keys, D head width left as factors).
        decode_state: numbers kept per layer while decoding, in N tokens, C channels, H heads, D = C / H; "" without.
        one_layer_receptive_field: "all", "causal", "window" (causal), "content" (chosen among the causal ones, or all,
            by the tokens themselves) or "pattern" (a `Pattern`'s).
        make: (dim, heads) -> a small instance: a callable (B, N, dim) -> (B, N, dim), windows of `WINDOW` tokens.
        pattern: of the pairs, where they are fixed.
    """

    name: str
    mixing: str
    structure: str
    normalizer: str
    causal: bool
    time: str
    memory: str
    decode_state: str
    one_layer_receptive_field: str
    make: Callable[[int, int], Callable[[Tensor], Tensor]]
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        for name, given, accepted in (
            ("mixing", self.mixing, MIXING),
            ("structure", self.structure, STRUCTURES),
            ("normalizer", self.normalizer, NORMALIZERS),
            ("one_layer_receptive_field", self.one_layer_receptive_field, FIELDS),
        ):
            if given not in accepted:
                raise ValueError(
                    f"MixerCard {self.name!r}: {name} must be one of {', '.join(accepted)}, got {given!r}"
                )

    def field(self, tokens: int) -> Tensor:
        """Bool (tokens, tokens): which tokens (columns) each result may depend on; with "content" the most possible."""
        full = torch.ones(tokens, tokens, dtype=torch.bool)
        if self.pattern is not None:
            return self.pattern.layout(tokens).to_dense()[0].any(0)
        return full.tril() if self.causal else full

    def agrees(self, measured: Tensor) -> bool:
        """Whether a measured field is the card's: equal, or for "content" within it and not the whole of it."""
        told = self.field(len(measured))
        if self.one_layer_receptive_field == "content":
            return bool((measured <= told).all()) and not torch.equal(measured, told)
        return torch.equal(measured, told)


def _window(width: int) -> Pattern:
    return Causal() & SlidingWindow(width)


def _card(
    name: str, kind: tuple[str, str, str], cost: tuple[str, str, str], field: str, make: Any, **more: Any
):
    return MixerCard(name, *kind, more.pop("causal", True), *cost, field, make, **more)


CARDS: dict[str, MixerCard] = {
    card.name: card
    for card in (
        _card("attention", ("input-dependent", "dense", "softmax"), ("N^2", "N", "2*N*C"), "causal", SelfAttention),
        _card("sliding window", ("input-dependent", "sparse", "softmax"), ("N*W", "N", "2*W*C"), "window",
              lambda dim, heads: SelfAttention(dim, heads, window=WINDOW), pattern=_window(WINDOW)),
        _card("local linear", ("input-dependent", "dense", "softmax"), ("N^2*D", "N", "2*N*C"), "causal",
              LocalLinearAttention),
        _card("kernel attention", ("input-dependent", "low-rank", "linear sum"), ("N", "N", "C*D + C"), "causal",
              KernelAttention),
        _card("gated linear", ("input-dependent", "recurrence", "none"), ("N", "N", "C*D/2"), "causal",
              GatedLinearAttention),
        _card("delta rule", ("input-dependent", "recurrence", "none"), ("N", "N", "C*D"), "causal",
              lambda dim, heads: DeltaNet(dim, heads, conv=0)),
        _card("dynamic mask", ("input-dependent", "sparse", "softmax"), ("N*K", "N", "2*K*C"), "content",
              lambda dim, heads: _strong(DynamicMaskAttention(dim, heads, keep_window=WINDOW))),
        _card("routing", ("input-dependent", "sparse", "softmax"), ("N^1.5", "N", ""), "content",
              lambda dim, heads: RoutingAttention(dim, 0, heads, n_clusters=4, causal=False), causal=False),
        _card("core tokens", ("input-dependent", "hierarchical", "softmax"), ("N^2/W", "N", "2*(N/W + W)*C"), "causal",
              lambda dim, heads: CCAAttention(dim, heads, group=4, local=WINDOW)),
        _card("hierarchical", ("input-dependent", "hierarchical", "softmax"), ("N log N", "N", ""), "all",
              lambda dim, heads: HierarchicalSelfAttention(dim, heads, branching=3), causal=False),
        _card("short convolution", ("learned", "Toeplitz", "none"), ("N*W", "N", "(W - 1)*C"), "window",
              lambda dim, heads: ShortConv(dim, WINDOW), pattern=_window(WINDOW)),
        _card("gated convolution", ("input-dependent", "Toeplitz", "none"), ("N*W", "N", "(W - 1)*C"), "window",
              lambda dim, heads: BaseConv(dim, WINDOW), pattern=_window(WINDOW)),
    )
}  # fmt: skip
TYPES = {
    LocalLinearAttention: "local linear",
    KernelAttention: "kernel attention",
    GatedLinearAttention: "gated linear",
    DeltaNet: "delta rule",
    DynamicMaskAttention: "dynamic mask",
    RoutingAttention: "routing",
    CCAAttention: "core tokens",
    HierarchicalSelfAttention: "hierarchical",
    ShortConv: "short convolution",
    BaseConv: "gated convolution",
}


def _strong(layer: DynamicMaskAttention) -> DynamicMaskAttention:
    """Biases that decide: untrained ones are equal and keep the newest keys."""
    nn.init.constant_(layer.A, 4.0)
    return layer


def mixer_card(mixer: str | nn.Module | Pattern, tokens: int = 64) -> MixerCard:
    """The card of a mixer: by name, of a layer, or of a pattern, which is softmax attention over its pairs.

    A pattern is looked at on `tokens` tokens.

    Raises:
        KeyError: no such name, or a layer without a card.

    >>> mixer_card("gated linear").decode_state, mixer_card(SelfAttention(8, 2, window=3)).structure
    ('C*D/2', 'sparse')
    """
    if isinstance(mixer, Pattern):
        return _of_pattern(mixer, tokens)
    if isinstance(mixer, SelfAttention):
        name = "attention" if mixer.window is None else "sliding window"
    else:
        name = mixer if isinstance(mixer, str) else TYPES.get(type(mixer), type(mixer).__name__)
    if name not in CARDS:
        raise KeyError(f"mixer_card: no card for {name!r}; accepted: {', '.join(CARDS)}, or a Pattern")
    return CARDS[name]


def _of_pattern(pattern: Pattern, tokens: int) -> MixerCard:
    seen = pattern.layout(tokens).to_dense()[0].any(0)
    causal = not bool(seen.triu(1).any())
    whole = torch.equal(seen, torch.ones_like(seen).tril() if causal else torch.ones_like(seen))

    class Mixer:
        def __init__(self, dim: int, heads: int) -> None:
            g = torch.Generator().manual_seed(0)
            self.maps = torch.randn(3, dim, dim, generator=g, dtype=torch.float64) / dim**0.5
            self.heads = heads

        def __call__(self, x: Tensor) -> Tensor:
            q, k, v = (
                (x @ m.to(x)).unflatten(2, (self.heads, -1)).transpose(1, 2) for m in self.maps
            )  # (B, H, N, D)
            out = attention(q, k, v, pattern)
            assert isinstance(out, Tensor)
            return out.transpose(1, 2).flatten(2)

    return MixerCard(
        repr(pattern), "input-dependent", "dense" if whole else "sparse", "softmax", causal,
        "N^2" if whole else "pairs", "N", "2*N*C" if causal else "", "pattern", Mixer, pattern,
    )  # fmt: skip


def receptive_field(mixer: Callable[[Tensor], Tensor], tokens: int, dim: int, *, seed: int = 0) -> Tensor:
    """Bool (tokens, tokens): entry (i, j) says whether result i has a gradient at token j, for one random input.

    Args:
        mixer: (1, tokens, dim) -> the same shape, in float64.

    >>> receptive_field(lambda x: x.cumsum(1), 3, 2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, dim, generator=g, dtype=torch.float64).requires_grad_()
    mark = torch.randn(tokens, dim, generator=g, dtype=torch.float64)
    rows = (mixer(x)[0] * mark).sum(-1)  # (tokens,)
    found = [torch.autograd.grad(rows[i], x, retain_graph=True)[0][0] for i in range(tokens)]
    return (torch.stack(found) != 0).any(-1)


def small_instance(card: MixerCard, dim: int, heads: int, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """`card.make` under a seed, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = card.make(dim, heads)
    return made.double().eval() if isinstance(made, nn.Module) else made


def mixer_table(markdown: bool = True) -> str:
    """All cards as a table, one row each; tab-separated without `markdown`.

    >>> mixer_table().splitlines()[0][:27]
    '| name | mixing | structure'
    """
    names = [f.name for f in fields(MixerCard) if f.name not in ("make", "pattern")]
    told = [[name.replace("_", " ") for name in names]]
    for card in CARDS.values():
        values = [getattr(card, name) for name in names]
        told.append([("yes" if v else "no") if isinstance(v, bool) else v or "-" for v in values])
    if not markdown:
        return "\n".join("\t".join(row) for row in told)
    rows = ["| " + " | ".join(row) + " |" for row in told]
    return "\n".join([rows[0], "| " + " | ".join("---" for _ in names) + " |", *rows[1:]])
