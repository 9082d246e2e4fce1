"""The native engine: block-sparse flash attention in C++ for the CPU, work proportional to the mask's area.

Forward and backward, float32 and bfloat16, compiled for several instruction sets and chosen by what the CPU reports:
AMX, AVX-512, AVX2, or portable vector code (native_library.py calls it, native_ops.py makes it differentiable).
`torch.compile(fullgraph=True)` passes through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.engines import native_ops
from foveate.core.engines.native_library import (
    KINDS,
    MAX_DIM,
    NORMALIZERS,
    Scores,
    Where,
    best_isa,
    library,
    pool,
)
from foveate.core.normalizers import ReLU, Sigmoid, Softmax, SoftmaxPlusOne
from foveate.core.request import AttentionRequest, EngineRefusal, layout_arrays
from foveate.core.scores import Bias, Relative, SoftCap, Temperature

name = "native"


def describe() -> str:
    """One line about how the engine runs here."""
    threads = "torch's OpenMP pool" if pool() else "threads of its own"
    isa = best_isa()
    how = {
        "amx": "float32 on AVX-512, bfloat16 on AMX tiles",
        "avx512_bf16": "float32 on AVX-512, bfloat16 forward by its dot products, backward widened to float32",
    }.get(isa, f"{isa}, bfloat16 widened to float32")
    return f"{how}, float16 computed in float32; {torch.get_num_threads()} threads of {threads}"


def why_not(request: AttentionRequest) -> str | None:
    """The reason why this engine declines, or None."""
    q = request.q
    if q.device.type != "cpu":
        return f"it runs on the CPU; q is on {q.device}"
    if q.dtype == torch.float64:
        return "it computes in float32; float64 runs on the reference engine"
    if max(q.shape[3], request.v.shape[3]) > MAX_DIM:
        return f"head dims must be at most {MAX_DIM}, got {q.shape[3]} and {request.v.shape[3]}"
    if not isinstance(request.normalizer, (Softmax, SoftmaxPlusOne, Sigmoid, ReLU)):
        return f"it does not know the normaliser {type(request.normalizer).__name__}"
    reason = _why_not_scores(request.scores)
    if reason is not None:
        return reason
    if torch.compiler.is_compiling():
        return None
    if request.has_tangents:
        return "it has no forward-mode derivatives (jvp); they run on the reference engine"
    try:
        library()
    except EngineRefusal as error:
        return str(error)
    return None


# The kernel applies scores in this order; sums of biases commute, so the additive ones may come in any.
_ORDER = {Temperature: 0, SoftCap: 1, Bias: 2}


def _stage(score: object) -> int | None:
    return 2 if isinstance(score, Relative) else _ORDER.get(type(score))


def _why_not_scores(scores: tuple) -> str | None:
    names = ", ".join(type(score).__name__ for score in scores)
    stages = []
    for score in scores:
        stage = _stage(score)
        if stage is None:
            return f"it does not know the score {type(score).__name__}"
        stages.append(stage)
    if stages != sorted(stages):
        return f"it applies Temperature, then SoftCap, then biases; got {names}"
    kinds = ["relative bias" if isinstance(score, Relative) else type(score).__name__ for score in scores]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    return None if twice is None else f"it takes one {twice} at a time; got {names}"


def run(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    q, k, v = request.q, request.k, request.v
    dtype = q.dtype
    if dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    where = Where(KINDS[request.kind])
    if request.kind == "layout":
        where = Where(KINDS["layout"], *layout_arrays(request))
    out, lse = native_ops.forward(q, k, v, where, _scores(request))
    return out.to(dtype), lse


def _scores(request: AttentionRequest) -> Scores:
    _, heads, n, m = request.shape
    normalizer, sinks, shift = request.normalizer, request.sinks, 0.0
    kind = NORMALIZERS["softmax"]
    if isinstance(normalizer, SoftmaxPlusOne):  # one more logit of 0
        zero = torch.zeros(heads) if sinks is None else sinks.new_zeros(())
        sinks = zero if sinks is None else torch.logaddexp(sinks, zero)
    elif isinstance(normalizer, Sigmoid):
        kind, shift = NORMALIZERS["sigmoid"], float(normalizer.bias)
    elif isinstance(normalizer, ReLU):
        kind = NORMALIZERS["relu"]
    softcap, temperature, bias, table, q_code, k_code = 0.0, None, None, None, None, None
    for score in request.scores:
        if isinstance(score, SoftCap):
            softcap = float(score.cap)
        elif isinstance(score, Temperature):
            temperature = score.tensor[(None,) * (3 - score.tensor.ndim)]  # (B or 1, H or 1, N or 1)
        elif isinstance(score, Bias):
            bias = score.tensor[(None,) * (4 - score.tensor.ndim)]
        else:
            table, q_code, k_code = score.codes(n, m, request.q.device)
    return Scores(
        kind, request.scale, softcap, shift, request.dropout_p, request.dropout_seed,
        sinks, temperature, bias, table, q_code, k_code,
    )  # fmt: skip
