"""`attention`: one function for every mask, on every engine. `explain`: which engine runs it, and why not others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from foveate.core.request import make_request

if TYPE_CHECKING:
    from foveate.core.normalizers import Normalizer
    from foveate.core.request import CuSeqlens, Who
    from foveate.core.scores import Score


def attention(
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
    engine: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the pairs that `pattern` allows.

        out_i = sum_j p_ij v_j,   p_ij = exp(s_ij) / (exp(sink) + sum_j' exp(s_ij')),   s = score(scale q k^T)

    with other weights p for other normalisers.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv). H is a multiple of Hkv and query head h reads key/value
            head h // (H / Hkv); grouped heads are never copied. float32, bfloat16, float16 or float64; any strides.
        pattern: who may look at whom: a `Pattern`, a `BlockLayout`, a `Selector`, a torch `BlockMask`, a boolean tensor
            broadcastable to (B, H, N, M) with True = may attend, or a function `mask_mod(b, h, q_idx, kv_idx)`. A bare
            function is evaluated at every call, as it may read tensors that change; `MaskMod(f)` keeps its layout.
        is_causal: also require key position <= query position. For N != M the last query is aligned with the last key
            (bottom-right), unlike SDPA, which aligns the first ones.
        cu_seqlens: for sequences of different lengths one after another, with batch 1: their cumulative lengths [0, n1,
            n1 + n2, ..., N], or a pair of them for queries and keys. Attention stays inside each sequence and
            `is_causal` holds in each by itself, its last query aligned with its last key. A relative `pattern` sees
            global positions, which is the same where queries and keys have equal lengths (`foveate.patterns.Packed`).
        score: changes to the scaled logits, applied in order: `SoftCap`, `Bias`, `Temperature`, `RelativeBias`,
            `ALiBi`, `T5Bias`, or a tuple of them. Their tensors get gradients.
        sinks: (H,) one extra logit per head that takes weight but has no value.
        normalizer: how logits become weights: "softmax", "softmax_plus_one" (a sink of 0 besides), "sigmoid", "relu",
            or an instance such as `Sigmoid(bias)`. The last two take no sinks and have no lse.
        scale: factor on q k^T; default D ** -0.5.
        dropout_p: dropout on the weights, in [0, 1); kept ones are multiplied by 1 / (1 - dropout_p). Not on the lse.
        dropout_seed: decides which weights are kept, the same ones on every engine (`foveate.core.dropout`): an int, an
            int64 tensor of one element, or None to draw one from torch's default generator.
        return_lse: also return log sum exp of the logits of each row (natural logarithm, sink included).
        engine: "auto", "native", "flex", "sdpa" or "reference". A named engine runs or raises; it never falls back.

    Returns:
        out (B, H, N, Dv) in q's dtype; with return_lse also lse (B, H, N) in float32 (float64 for float64).
        A row that may attend to nothing gives 0 and lse = -inf (with sinks, the sink), and its gradient is 0. NaN or
        Inf in keys and values that are masked for a row never reach it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        EngineRefusal: the engine asked for declines; the message says what every engine says.

    Source: Attention Is All You Need (2017); block-sparse evaluation after FlashAttention (2022).

    >>> import torch, foveate as fv
    >>> from foveate.patterns import Causal, SlidingWindow, Sinks
    >>> q = torch.randn(1, 8, 300, 64); k = v = torch.randn(1, 2, 300, 64)
    >>> fv.attention(q, k, v, Causal() & (SlidingWindow(128) | Sinks(4))).shape
    torch.Size([1, 8, 300, 64])
    """
    from foveate.core import engines

    request = make_request(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        cu_seqlens=cu_seqlens,
        score=score,
        sinks=sinks,
        normalizer=normalizer,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    out, lse = engines.choose(request, engine, return_lse=return_lse).run(request)
    return (out, lse) if return_lse else out


def explain(
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
    engine: str = "auto",
) -> str:
    """What `attention` would do with the same arguments: the engine it picks and what every engine says, as text.

    >>> import torch, foveate as fv
    >>> x = torch.randn(1, 2, 16, 8)
    >>> print(fv.explain(x, x, x, is_causal=True).splitlines()[0])
    auto -> native
    """
    from foveate.core import engines

    request = make_request(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        cu_seqlens=cu_seqlens,
        score=score,
        sinks=sinks,
        normalizer=normalizer,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    try:
        picked = engines.choose(request, engine, return_lse=return_lse).name
    except engines.EngineRefusal:
        picked = "none"
    lines = [f"{engine} -> {picked}", engines.describe(request, return_lse)]
    native = engines.ENGINES["native"]
    if picked == "native":
        lines.append(f"  native runs {native.describe()}")
    if request.kind == "layout":
        layout = request.layout
        lines.append(
            f"  layout: {layout.nnz} tiles, {len(layout.dictionary)} bitmaps, density {layout.density:.4f}, "
            f"{layout.nbytes} bytes"
        )
    return "\n".join(lines)
