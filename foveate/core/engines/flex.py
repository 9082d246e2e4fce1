"""FlexAttention (torch.nn.attention.flex_attention), executed through `BlockLayout.to_flex()`.

The mask of a layout becomes block lists plus one `mask_mod` that reads the tile dictionary:

    allowed(b, h, q, k) = bit k % 64 of words[ids[b, h, q // 64, k // 64], q % 64]

It closes over tensors only, so one compilation serves every mask of the same shapes. The price of this path,
besides the compilation (4 to 9 s on CPU, where it needs a C++ compiler at run time), is FlexAttention's own
storage: three int32 tensors of (batch, heads, q_tiles, k_tiles) - partial lists, full lists, and the tile ids
of the mask_mod.

FlexAttention runs dense and unfused, without an error, when it is not compiled. Here it is traced as one
graph and the traced function raises as soon as it is executed eagerly, so that never happens unnoticed.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout, pack_bits, tiles
from foveate.core.normalizers import Softmax, SoftmaxPlusOne
from foveate.core.request import AttentionRequest, EngineRefusal
from foveate.core.scores import Bias, SoftCap

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

name = "flex"
CHUNK = 1 << 7  # tiles whose elements are evaluated at once by from_flex
_SHIFT = TILE.bit_length() - 1  # q // 64 == q >> 6


# -------------------------------------------------------------------------------- layout -> BlockMask
def to_flex(layout: BlockLayout, *, block: int | None = None, backward: bool = True) -> BlockMask:
    """A torch `BlockMask` with the same pairs; axes of size 1 stay 1 and broadcast.

    Args:
        layout: any layout; the mask lives on its device.
        block: side of the mask's blocks, a multiple of 64. Default: 64 on CPU, 128 on CUDA, where
            FlexAttention's own blocks have to divide it.
        backward: also list the query blocks of each key block, which FlexAttention's backward reads.

    Its `mask_mod` is exact on its own: False in blocks that are not listed, True in full ones.

    >>> import torch
    >>> layout = BlockLayout.from_mask(torch.ones(100, 100, dtype=torch.bool).tril())
    >>> layout.to_flex().shape
    (1, 1, 100, 100)
    >>> BlockLayout.from_flex(layout.to_flex()) == layout
    True
    """
    from torch.nn.attention.flex_attention import BlockMask

    block = (TILE if layout.device.type == "cpu" else 2 * TILE) if block is None else block
    if block < TILE or block % TILE:
        raise ValueError(f"block must be a positive multiple of {TILE}, got {block}")
    nq, nk = layout.q_tiles, layout.k_tiles
    lead = (layout.batch, layout.heads)
    rows, cols, ids = layout.rows, layout.tile_idx.long(), layout.tile_id
    absent = len(layout.dictionary) + 1
    table = torch.full((lead[0] * lead[1] * nq, nk), absent, dtype=torch.int32, device=layout.device)
    table[rows, cols] = ids
    ends = layout.dictionary.new_tensor([[-1] * TILE, [0] * TILE])
    words = torch.cat([ends[:1], layout.dictionary, ends[1:]])  # (n + 2, 64): full, the dictionary, empty
    torch._dynamo.maybe_mark_dynamic(words, 0)  # dictionaries of any size share one compilation
    # blocks that hold a listed tile; full ones hold as many full tiles as the plane has there
    side = block // TILE
    nqb, nkb = -(-nq // side), -(-nk // side)
    keys = ((rows // nq) * nqb + rows % nq // side) * nkb + cols // side
    keys, member = torch.unique(keys, return_inverse=True)
    plane, i, j = keys // (nqb * nkb), keys // nkb % nqb, keys % nkb
    whole = (nq - i * side).clamp(max=side) * (nk - j * side).clamp(max=side)
    full = torch.bincount(member[ids == 0], minlength=len(keys)) == whole
    lists: dict[str, Any] = {}
    for kind, chosen in (("", ~full), ("full_", full)):
        p, r, c = plane[chosen], i[chosen], j[chosen]
        lists[f"{kind}kv_num_blocks"], lists[f"{kind}kv_indices"] = _lists(p * nqb + r, c, (*lead, nqb, nkb))
        if not backward:
            lists[f"{kind}q_num_blocks"] = lists[f"{kind}q_indices"] = None
            continue
        by_key, order = torch.sort(p * nkb + c, stable=True)  # rows stay ascending within a key block
        lists[f"{kind}q_num_blocks"], lists[f"{kind}q_indices"] = _lists(by_key, r[order], (*lead, nkb, nqb))
    return BlockMask(
        seq_lengths=(layout.q_len, layout.k_len),
        BLOCK_SIZE=(block, block),
        mask_mod=_dictionary_mask(table.view(*lead, nq, nk), words),
        **lists,
    )


def _lists(rows: Tensor, cols: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Sorted (row, column) pairs -> int32 counts (B, H, rows) and columns (B, H, rows, cols), then zeros."""
    total, width = shape[0] * shape[1] * shape[2], shape[3]
    counts = torch.bincount(rows, minlength=total)
    first = counts.cumsum(0) - counts
    slot = torch.arange(len(rows), device=rows.device) - first[rows]
    indices = torch.zeros((total, width), dtype=torch.int32, device=rows.device)
    indices[rows, slot] = cols.to(torch.int32)
    return counts.to(torch.int32).view(shape[:3]), indices.view(shape)


def _dictionary_mask(ids: Tensor, words: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    per_batch, per_head = ids.shape[0] > 1, ids.shape[1] > 1

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        tile = ids[b if per_batch else 0, h if per_head else 0, q_idx >> _SHIFT, kv_idx >> _SHIFT]
        return ((words[tile, q_idx & (TILE - 1)] >> (kv_idx & (TILE - 1))) & 1) != 0

    return mask_mod


# -------------------------------------------------------------------------------- BlockMask -> layout
def from_flex(block_mask: BlockMask) -> BlockLayout:
    """The exact layout of a torch `BlockMask`: its full blocks, and its mask_mod inside the partial ones.

    Any block size is accepted. The mask_mod is evaluated element by element on the 64 x 64 tiles that are
    neither empty nor covered by full blocks, a bounded number at a time.

    Raises:
        TypeError: not a BlockMask.
        ValueError: its mask_mod cannot be evaluated, as in a sliced mask (slicing drops it).

    >>> import torch
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 300, 300, device="cpu")
    >>> from_flex(mask).area == 300 * 301 // 2
    True
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a torch BlockMask, got {type(block_mask).__name__}")
    n, m = (int(length) for length in block_mask.seq_lengths)
    q_block, k_block = (int(size) for size in block_mask.BLOCK_SIZE)
    partial = _grid(block_mask.kv_num_blocks, block_mask.kv_indices, n, m, q_block, k_block)
    state = partial.astype(np.int8)  # (B, H, q blocks, k blocks): 0 empty, 1 partial, 2 full
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _grid(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, n, m, q_block, k_block)
        state[full] = 2
    low, high = _covering(_covering(state, n, q_block, 2), m, k_block, 3)  # (B, H, nq, nk) each
    batch, heads, nq, _ = low.shape
    b, h, i, j = np.nonzero(high)
    mixed = np.flatnonzero(low[b, h, i, j] != 2)
    which = np.full(len(b), -1)
    which[mixed] = np.arange(len(mixed))
    words = np.zeros((len(mixed), TILE), np.int64)
    lane = np.arange(TILE)
    for start in range(0, len(mixed), CHUNK):
        at = mixed[start : start + CHUNK]
        q = np.minimum(i[at, None] * TILE + lane, n - 1)  # (T, 64)
        k = np.minimum(j[at, None] * TILE + lane, m - 1)
        inside = state[
            b[at, None, None], h[at, None, None], q[:, :, None] // q_block, k[:, None, :] // k_block
        ]
        seen = _evaluate(block_mask, b[at], h[at], q, k)  # (T, 64, 64)
        words[start : start + len(at)] = pack_bits((inside == 2) | ((inside == 1) & seen))
    rows = (b * heads + h) * nq + i
    layout = BlockLayout.from_tiles(n, m, rows, j, words, batch=batch, heads=heads, which=which)
    return layout.to(block_mask.kv_num_blocks.device)


def _grid(count: Tensor, index: Tensor, n: int, m: int, q_block: int, k_block: int) -> np.ndarray:
    """Block lists -> bool (B, H, q blocks, k blocks)."""
    count = count.reshape((1,) * (3 - count.ndim) + tuple(count.shape))
    index = index.reshape((1,) * (4 - index.ndim) + tuple(index.shape))
    rows, cols = -(-n // q_block), -(-m // k_block)
    listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
    b, h, i, slot = (axis.cpu().numpy() for axis in listed[:, :, :rows].nonzero(as_tuple=True))
    j = index.cpu().numpy()[b, h, i, slot]
    grid = np.zeros((*index.shape[:2], rows, cols), bool)
    inside = j < cols
    grid[b[inside], h[inside], i[inside], j[inside]] = True
    return grid


def _covering(state, length: int, block: int, axis: int):
    """(lowest, highest) state of the blocks that each 64-tile overlaps along `axis`."""
    low, high = state if isinstance(state, tuple) else (state, state)
    start = np.arange(tiles(length)) * TILE
    first, last = start // block, (np.minimum(start + TILE, length) - 1) // block
    lows, highs = low.take(first, axis), high.take(first, axis)
    for step in range(1, int((last - first).max()) + 1):
        at = np.minimum(first + step, last)
        lows = np.minimum(lows, low.take(at, axis))
        highs = np.maximum(highs, high.take(at, axis))
    return lows, highs


def _evaluate(
    block_mask: BlockMask, b: np.ndarray, h: np.ndarray, q: np.ndarray, k: np.ndarray
) -> np.ndarray:
    """mask_mod on T tiles -> bool (T, 64, 64); called on scalars under vmap, as FlexAttention does."""
    device = block_mask.kv_num_blocks.device
    rule = torch.vmap(block_mask.mask_mod, in_dims=(None, None, None, 0))
    rule = torch.vmap(rule, in_dims=(None, None, 0, None))
    rule = torch.vmap(rule, in_dims=(0, 0, 0, 0))
    try:
        seen = rule(*(torch.from_numpy(np.ascontiguousarray(t)).to(device) for t in (b, h, q, k)))
    except (RuntimeError, IndexError, TypeError) as error:
        raise ValueError(f"the mask_mod of block_mask cannot be evaluated: {error}") from error
    return seen.to(torch.bool).cpu().numpy()


# -------------------------------------------------------------------------------- the engine
def why_not(request: AttentionRequest) -> str | None:
    """The reason why this engine declines, or None."""
    q, v = request.q, request.v
    device = q.device.type
    if device not in ("cpu", "cuda"):
        return f"it runs on cpu and cuda, not on {device}"
    if q.dtype == torch.float64:
        return "compiled FlexAttention takes float32, bfloat16 and float16, not float64"
    if request.dropout_p:
        return "FlexAttention has no dropout"
    if not isinstance(request.normalizer, (Softmax, SoftmaxPlusOne)):
        return f"FlexAttention normalises with softmax, not with {request.normalizer}"
    if any(not isinstance(score, (SoftCap, Bias)) for score in request.scores):
        return "of the scores it takes SoftCap and Bias"
    if device == "cpu":
        if request.needs_grad:
            return "FlexAttention has no backward on CPU; use torch.no_grad() or another engine"
        if request.all_sinks is not None:
            return "sinks need the log-sum-exp, which compiled FlexAttention does not return on CPU"
        return _cpu_obstacle()
    if min(q.shape[3], v.shape[3]) < 16:
        return f"FlexAttention on CUDA needs head dims of at least 16, got {q.shape[3]} and {v.shape[3]}"
    if (
        any(isinstance(s, Bias) and s.tensor.requires_grad for s in request.scores)
        and torch.is_grad_enabled()
    ):
        return "it does not train a Bias"
    if find_spec("triton") is None:
        return "FlexAttention on CUDA is compiled with Triton, which is not installed"
    return None


def why_not_lse(request: AttentionRequest) -> str | None:
    """The reason why this engine cannot return lse for a request that it otherwise runs, or None."""
    if request.q.device.type == "cpu":
        return "compiled FlexAttention does not return the log-sum-exp on CPU"
    return None


@lru_cache(maxsize=1)
def _cpu_obstacle() -> str | None:
    if sys.platform == "darwin" or os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        return "compiled FlexAttention on CPU needs Linux or Windows with AVX2 enabled"
    if not torch.cpu._is_avx2_supported():
        return "compiled FlexAttention on CPU needs AVX2"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "compiled FlexAttention on CPU needs a C++ compiler at run time (g++ or clang++, or CXX)"
    return None


class _Variant(NamedTuple):
    """Whatever is compiled into a kernel; each variant has its own cache of compiled code."""

    device: str
    lengths: tuple[int, int, int] | None  # batch, N, M; None where the kernel takes any
    dtype: torch.dtype
    dims: tuple[int, int, int, int]  # heads, kv heads, head dim, value dim
    scale: float
    mask: tuple[bool, bool] | None  # whether the mask differs per batch row and per head; None = no mask
    scores: tuple[str, ...]
    grad: bool


def run(request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
    """Run a request for which `why_not` is None.

    Differs from the other engines in one place: a row whose query, or any of whose allowed keys and values,
    is not finite is NaN in every output dim.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit

    q, k, v = request.q, request.k, request.v
    grad = request.needs_grad
    if not grad:
        q, k, v = q.detach(), k.detach(), v.detach()  # FlexAttention checks requires_grad even under no_grad
    mask = None if request.kind == "full" else _block_mask(request.layout, grad)
    kinds, buffers = [], []
    for score in request.scores:
        if isinstance(score, SoftCap):
            kinds.append("softcap")
            buffers.append(torch.tensor(float(score.cap), dtype=torch.float32, device=q.device))
        elif isinstance(score, Bias):
            kinds.append("bias" + "".join("01"[size > 1] for size in _four(score.tensor).shape))
            buffers.append(_four(score.tensor.detach()))
    finite = _finite(q, k, v)
    if (
        not finite
    ):  # 0 * NaN is NaN, so what is masked must be clean; who sees something broken is settled below
        broken_rows = _broken_rows(request)
        q, k, v = (torch.where(torch.isfinite(t), t, 0) for t in (q, k, v))
    on_cpu = q.device.type == "cpu"
    if on_cpu:  # other strides would be other code
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    variant = _Variant(
        q.device.type,
        (q.shape[0], q.shape[2], k.shape[2]) if on_cpu else None,
        q.dtype,
        (q.shape[1], k.shape[1], q.shape[3], v.shape[3]),
        request.scale,
        None if mask is None else (request.layout.batch > 1, request.layout.heads > 1),
        tuple(kinds),
        grad,
    )
    try:
        with torch.set_grad_enabled(grad):
            out, lse = _compiled(variant)(variant, q, k, v, mask, tuple(buffers))
    except FailOnRecompileLimitHit as error:
        raise EngineRefusal(
            f"engine 'flex' cannot run this: torch.compile refuses another recompilation of {variant}. Raise "
            "torch._dynamo.config.recompile_limit or call torch.compiler.reset()"
        ) from error
    sinks = request.all_sinks
    if sinks is not None and lse is not None:
        sink = sinks.to(lse.dtype).view(1, -1, 1)
        out = out * torch.sigmoid(lse - sink).unsqueeze(-1).to(out.dtype)
        lse = torch.logaddexp(lse, sink)
    if not finite:
        out = out.masked_fill(broken_rows.unsqueeze(-1), torch.nan)
        lse = None if lse is None else lse.masked_fill(broken_rows, torch.nan)
    return out, lse


_MASKS: WeakKeyDictionary[BlockLayout, dict[bool, BlockMask]] = WeakKeyDictionary()


def _block_mask(layout: BlockLayout, backward: bool) -> BlockMask:
    """`to_flex`, remembered as long as the layout lives."""
    known = _MASKS.setdefault(layout, {})
    if backward not in known:
        known[backward] = to_flex(layout, backward=backward)
    return known[backward]


def _four(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))


def _finite(*tensors: Tensor) -> bool:
    """Whether all elements are finite; a sum that overflows says no, which costs time and not correctness."""
    return all(bool(torch.isfinite(t.detach().sum(dtype=torch.float32))) for t in tensors)


def _broken_rows(request: AttentionRequest) -> Tensor:
    """bool (B, H, N): rows that see a broken key or value, or that see anything with a broken query."""
    batch, heads, n, m = request.shape
    bad_q = ~torch.isfinite(request.q).all(-1)  # (B, H, N)
    bad_k = ~(torch.isfinite(request.k).all(-1) & torch.isfinite(request.v).all(-1))  # (B, Hkv, M)
    bad_k = bad_k.repeat_interleave(request.groups, 1)
    if request.kind == "full":
        return bad_q | bad_k.any(-1, keepdim=True)
    layout = request.layout.expand(batch, heads)
    nq, nk = layout.q_tiles, layout.k_tiles
    padded = torch.nn.functional.pad(bad_k, (0, nk * TILE - m)).cpu().numpy()
    bad_words = torch.from_numpy(pack_bits(padded.reshape(-1, TILE))).to(layout.device)  # (B * H * nk,)
    words = torch.cat([layout.dictionary.new_full((1, TILE), -1), layout.dictionary])
    sees_bad = torch.zeros(batch * heads * nq, TILE, dtype=torch.bool, device=layout.device)
    sees_any = torch.zeros_like(sees_bad)
    rows, cols = layout.rows, layout.tile_idx.long()
    for at in torch.arange(layout.nnz, device=layout.device).split(1 << 16):
        word = words[layout.tile_id[at]]  # (T, 64)
        key = bad_words[rows[at] // nq * nk + cols[at]].unsqueeze(-1)
        sees_any.index_put_((rows[at],), word != 0, accumulate=True)
        sees_bad.index_put_((rows[at],), (word & key) != 0, accumulate=True)
    sees_bad, sees_any = (t.view(batch, heads, nq * TILE)[:, :, :n] for t in (sees_bad, sees_any))
    return sees_bad | (sees_any & bad_q)


@lru_cache(maxsize=256)
def _compiled(variant: _Variant) -> Callable:
    """The compiled function of a variant. Variants have their own code object, hence recompile limit."""
    own = types.FunctionType(
        _attend.__code__.replace(),
        _attend.__globals__,
        _attend.__name__,
        _attend.__defaults__,
        _attend.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False if variant.lengths else None)


def _attend(
    variant: _Variant, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, buffers: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    if not torch.compiler.is_compiling():
        raise EngineRefusal(
            "engine 'flex' cannot run this: torch.compile is disabled here; without it FlexAttention is dense"
        )
    on_cuda = variant.device == "cuda"
    arguments: dict[str, Any] = {
        "score_mod": _score_mod(variant.scores, buffers) if variant.scores else None,
        "block_mask": mask,
        "scale": variant.scale,
        "enable_gqa": variant.dims[0] != variant.dims[1],
        "kernel_options": _CUDA_OPTIONS if on_cuda else _CPU_OPTIONS,
        "return_aux": AuxRequest(lse=True) if on_cuda else None,
    }
    result = flex_attention(q, k, v, **arguments)
    return (result[0], result[1].lse) if on_cuda else (result, None)


# A partition size that is no multiple of 64 keeps FlexAttention from its decoding kernel, which takes a part
# of the keys that is masked out altogether as if its largest logit were 0: a row whose allowed logits lie far
# below 0 would lose its result.
_CPU_OPTIONS = {"PARTITION_SIZE": 96}
# On CUDA one kernel serves every length: the decoding kernel takes fewer shapes.
_CUDA_OPTIONS = {"BACKEND": "TRITON"}


def _score_mod(kinds: tuple[str, ...], buffers: tuple[Tensor, ...]) -> Callable:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for kind, buffer in zip(kinds, buffers, strict=True):
            if kind == "softcap":
                score = torch.tanh(score / buffer) * buffer
            else:  # "bias" and which of its axes do not broadcast
                at = [
                    i if wide == "1" else 0 for i, wide in zip((b, h, q_idx, kv_idx), kind[4:], strict=True)
                ]
                score = score + buffer[at[0], at[1], at[2], at[3]]
        return score

    return score_mod
