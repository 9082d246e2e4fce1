"""The validated arguments of one attention call, and the one error with which an engine declines them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from foveate.core.layout import BlockLayout
from foveate.core.normalizers import Normalizer, ReLU, Sigmoid, all_sinks, as_normalizer
from foveate.core.scores import Score

if TYPE_CHECKING:
    from foveate.core.patterns.base import Pattern
    from foveate.core.selectors.base import Selector

    Who = Pattern | BlockLayout | Selector | Tensor | Callable | None
    CuSeqlens = Tensor | Sequence[int] | tuple[Tensor | Sequence[int], Tensor | Sequence[int]] | None

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class EngineRefusal(ValueError):
    """An engine that was asked for by name cannot run this request; the message says which part and why."""


@dataclass(frozen=True, eq=False)
class AttentionRequest:
    """Everything an engine needs. Built by `attention()`, which validates; engines do not check shapes again.

    `layout` is made on first use: engines that do not need tiles (dense, causal) never pay for it.
    """

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, Hkv, M, D)
    v: Tensor  # (B, Hkv, M, Dv)
    who: Pattern | BlockLayout | Selector
    is_causal: bool  # to be intersected with `who`
    kind: str  # "full", "causal" (bottom-right aligned) or "layout"
    scores: tuple[Score, ...]
    sinks: Tensor | None  # (H,)
    normalizer: Normalizer
    scale: float
    dropout_p: float
    dropout_seed: Tensor | None  # int64 (1,) on the CPU; None exactly when dropout_p is 0
    made: list[BlockLayout] = field(default_factory=list, repr=False)  # the layout, once made

    @property
    def layout(self) -> BlockLayout:
        return layout_of(self)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M)"""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2]

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def all_sinks(self) -> Tensor | None:
        """The sink logit of each head, (H,), with what the normaliser adds; None = no sink. Differentiable."""
        return all_sinks(self.normalizer, self.sinks, self.q)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that may carry a gradient."""
        tensors = [self.q, self.k, self.v] + ([] if self.sinks is None else [self.sinks])
        return tensors + [tensor for score in self.scores for tensor in score.tensors.values()]

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors)

    @property
    def has_tangents(self) -> bool:
        """Whether forward-mode derivatives (jvp) are being taken."""
        return any(forward_ad.unpack_dual(t).tangent is not None for t in self.tensors)


def make_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Who = None,
    *,
    is_causal: bool = False,
    cu_seqlens: CuSeqlens = None,
    score: Score | tuple[Score, ...] | None = None,
    sinks: Tensor | None = None,
    normalizer: Normalizer | str = "softmax",
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> AttentionRequest:
    """Validate the arguments of `attention()`; every error names the argument, what came and what is accepted."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, length, dim), got {tuple(t.shape)}")
        if t.dtype not in DTYPES:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(f"{name} has dtype {t.dtype}; accepted are {accepted}")
        if t.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one dtype; {name} is {t.dtype}, q is {q.dtype}")
        if t.device != q.device:
            raise ValueError(f"q, k and v must be on one device; {name} is on {t.device}, q on {q.device}")
    batch, heads, n, dim = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    if n < 1 or m < 1 or dim < 1 or v.shape[3] < 1:
        raise ValueError(
            f"lengths and head dims must be at least 1, got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"v {tuple(v.shape)}"
        )
    if k.shape[0] != batch or v.shape[0] != batch:
        raise ValueError(f"q, k and v must share the batch size; got {batch}, {k.shape[0]}, {v.shape[0]}")
    if k.shape[3] != dim:
        raise ValueError(f"q and k must share the head dim; got {dim} and {k.shape[3]}")
    if v.shape[1] != kv_heads or v.shape[2] != m:
        raise ValueError(f"k and v must share heads and length; got {tuple(k.shape)} and {tuple(v.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"the heads of q ({heads}) must be a multiple of the heads of k and v ({kv_heads})")
    if scale is None:
        scale = float(dim**-0.5)
    elif not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None (head_dim ** -0.5), got {scale!r}")
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p!r}")
    seed = _dropout_seed(dropout_seed, dropout_p)
    normalizer = as_normalizer(normalizer)
    if isinstance(normalizer, (Sigmoid, ReLU)):
        for name, given in (("sinks", sinks is not None), ("return_lse", return_lse)):
            if given:
                raise ValueError(
                    f"{name} belongs to a sum of exponentials; {normalizer} has none. It is accepted with Softmax and "
                    "SoftmaxPlusOne"
                )
    shape = (batch, heads, n, m)
    scores = () if score is None else score if isinstance(score, tuple) else (score,)
    for item in scores:
        if not isinstance(item, Score):
            raise TypeError(
                f"score must be one of {', '.join(kind.__name__ for kind in get_args(Score))} or a tuple of them, "
                f"got {type(item).__name__}"
            )
        item.check(shape)
        for name, tensor in item.tensors.items():
            if tensor.device != q.device:
                raise ValueError(f"{type(item).__name__}.{name} is on {tensor.device}, q is on {q.device}")
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            raise TypeError(f"sinks must be a floating point tensor, got {type(sinks).__name__}")
        if tuple(sinks.shape) != (heads,):
            raise ValueError(
                f"sinks must have shape ({heads},), one logit per head; got {tuple(sinks.shape)}"
            )
        if sinks.device != q.device:
            raise ValueError(f"sinks is on {sinks.device}, q is on {q.device}")
    if cu_seqlens is None:
        who, is_causal, kind = resolve_pattern(pattern, shape, bool(is_causal))
    else:
        who, is_causal, kind = resolve_packed(cu_seqlens, pattern, shape, bool(is_causal))
    return AttentionRequest(
        q, k, v, who, is_causal, kind, scores, sinks, normalizer, float(scale), float(dropout_p), seed
    )


def _dropout_seed(seed: int | Tensor | None, dropout_p: float) -> Tensor | None:
    """The seed as an int64 tensor (1,) on the CPU; drawn from torch's default generator where None is given."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"dropout_seed must be an int or an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}"
            )
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(
                f"dropout_seed must be an int or an int64 tensor of one element, got {type(seed).__name__}"
            )
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"dropout_seed must lie in [0, 2 ** 63), got {seed}")
    if not dropout_p:
        return None
    if isinstance(seed, Tensor):
        return seed.detach().reshape(1).cpu()
    if seed is None:
        return torch.randint((1 << 63) - 1, (1,), dtype=torch.int64)
    return torch.tensor([seed], dtype=torch.int64)


def resolve_pattern(
    pattern: Who, shape: tuple[int, int, int, int], is_causal: bool
) -> tuple[Pattern | BlockLayout | Selector, bool, str]:
    """(what gives the layout, whether causality comes on top, the kind of request), whatever form the pattern has."""
    from foveate.core.patterns import Causal, Full, MaskMod
    from foveate.core.patterns.base import Pattern, as_pattern
    from foveate.core.selectors.base import Selector

    batch, heads, n, m = shape
    if isinstance(pattern, tuple):
        pattern = as_pattern(pattern)
    if pattern is None or isinstance(pattern, Full):
        return (Causal(), False, "causal") if is_causal else (Full(), False, "full")
    if isinstance(pattern, Causal):
        return pattern, False, "causal"
    if isinstance(pattern, (Pattern, BlockLayout, Selector)):
        if isinstance(pattern, BlockLayout):
            _fit(pattern, shape)
        return pattern, is_causal, "layout"
    if isinstance(pattern, Tensor):
        if pattern.dtype != torch.bool or not 2 <= pattern.ndim <= 4:
            raise TypeError(
                "a pattern tensor must be boolean (True = may attend) with 2 to 4 dimensions; "
                f"got {pattern.dtype} {tuple(pattern.shape)}. An additive mask goes to score=Bias(...)."
            )
        want = shape[4 - pattern.ndim :]
        if any(a not in (1, b) for a, b in zip(pattern.shape, want, strict=True)):
            raise ValueError(f"a pattern tensor of shape {tuple(pattern.shape)} does not broadcast to {want}")
        return BlockLayout.from_mask(pattern.expand(*pattern.shape[:-2], n, m)), is_causal, "layout"
    from torch.nn.attention.flex_attention import BlockMask

    if isinstance(pattern, BlockMask):
        return _fit(BlockLayout.from_flex(pattern), shape), is_causal, "layout"
    if callable(pattern):
        # a bare function may read tensors that change: evaluated anew at each call (MaskMod(f) or its layout is kept)
        return MaskMod(pattern, batch=batch, heads=heads, cache=False), is_causal, "layout"
    raise TypeError(
        "pattern must be a Pattern, a BlockLayout, a Selector, a torch BlockMask, a boolean tensor or a "
        f"mask_mod function f(b, h, q_idx, kv_idx); got {type(pattern).__name__}"
    )


def resolve_packed(
    cu_seqlens: CuSeqlens, pattern: Who, shape: tuple[int, int, int, int], is_causal: bool
) -> tuple[Pattern | BlockLayout, bool, str]:
    """`resolve_pattern` inside each of the sequences that lie one after another."""
    from foveate.core.patterns import Extent, Packed
    from foveate.core.selectors.base import Selector

    if torch.compiler.is_compiling():
        raise ValueError(
            "cu_seqlens cannot be read under torch.compile; make foveate.patterns.Packed(cu_seqlens) outside the "
            "compiled function and pass it as the pattern"
        )
    ends = cu_seqlens
    pair = isinstance(ends, tuple) and len(ends) == 2 and not any(isinstance(x, int) for x in ends)
    packed = Packed(*(ends if pair else (ends,)), is_causal=is_causal)  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    batch, _, n, m = shape
    if batch != 1:
        raise ValueError(f"cu_seqlens needs batch 1, the sequences one after another; got batch {batch}")
    packed.check(Extent(n, m))
    if packed.sequences == 1:
        return resolve_pattern(pattern, shape, is_causal)  # pyright: ignore[reportReturnType]
    who, _, kind = resolve_pattern(pattern, shape, False)
    if isinstance(who, Selector):
        raise ValueError(
            f"cu_seqlens does not combine with the selector {type(who).__name__}, which would select across sequences"
        )
    if kind == "full":
        return packed, False, "layout"
    return (who & packed.layout(n, m) if isinstance(who, BlockLayout) else who & packed), False, "layout"


def layout_of(request: AttentionRequest) -> BlockLayout:
    """The layout of a request, made once."""
    from foveate.core.selectors.base import Selector

    if not request.made:
        who, (_, _, n, m) = request.who, request.shape
        if isinstance(who, Selector):
            layout = who.layout(request.q, request.k, scale=request.scale, is_causal=request.is_causal)
        elif isinstance(who, BlockLayout):
            layout = who & static_layout(None, True, n, m) if request.is_causal else who
        else:
            layout = static_layout(who, request.is_causal, n, m)
        request.made.append(_fit(layout, request.shape).to(request.q.device))
    return request.made[0]


def static_layout(pattern: Pattern | None, is_causal: bool, n: int, m: int) -> BlockLayout:
    """The layout of `pattern` (None: everything) and, where asked for, causality; cached by value."""
    from foveate.core.patterns import Causal

    if pattern is None:
        return Causal().layout(n, m)
    return (Causal() & pattern if is_causal else pattern).layout(n, m)


Arrays = tuple[Tensor, Tensor, Tensor, Tensor, int, int]


def layout_arrays(request: AttentionRequest) -> Arrays:
    """row_ptr, tile_idx, tile_id, dictionary, batch and heads of the layout; `torch.compile` can trace this call.

    Under `torch.compile` a pattern is a constant for given lengths: the layout is made while tracing and becomes part
    of the graph, and other lengths trace again. The pattern object must be made outside the compiled function.
    """
    from foveate.core.patterns.base import Pattern

    if torch.compiler.is_compiling():
        if isinstance(request.who, Pattern):
            n, m = operator.index(request.q.shape[2]), operator.index(request.k.shape[2])
            return _constant_arrays(request.who, request.is_causal, n, m)
        if isinstance(request.who, BlockLayout) and not request.is_causal:
            return _arrays(request.who)
        raise EngineRefusal(
            "under torch.compile the pattern must be a Pattern made outside the compiled function, or a BlockLayout "
            "that already holds causality; make the layout first: pattern.layout(q_len, k_len)"
        )
    return _arrays(layout_of(request))


def _arrays(layout: BlockLayout) -> Arrays:
    return (
        layout.row_ptr, layout.tile_idx, layout.tile_id, layout.dictionary, layout.batch, layout.heads
    )  # fmt: skip


def _constant_arrays(pattern: Pattern, is_causal: bool, n: int, m: int) -> Arrays:
    return _arrays(static_layout(pattern, is_causal, n, m))


# what torch.compiler.assume_constant_result sets, without its import of the compiler, which takes over a second
_constant_arrays._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _fit(layout: BlockLayout, shape: tuple[int, int, int, int]) -> BlockLayout:
    """The layout itself, or ValueError when it is for other lengths, heads or batch sizes."""
    batch, heads, n, m = shape
    if (layout.q_len, layout.k_len) != (n, m):
        raise ValueError(
            f"the pattern's layout is for {layout.q_len} queries and {layout.k_len} keys; q and k have {n} and {m}"
        )
    if layout.batch not in (1, batch) or layout.heads not in (1, heads):
        raise ValueError(
            f"the pattern's layout is for batch {layout.batch} and {layout.heads} heads; "
            f"q has batch {batch} and {heads} heads (1 broadcasts)"
        )
    return layout
