"""The C++ library of the native engine, called through ctypes: structs, pointers and nothing else.

Plain C (native/foveate.h), no Python and no torch headers: one build serves every version of both. It runs on torch's
own OpenMP threads: the entry points take the pool as a function pointer, so no second pool competes for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from foveate.core.request import EngineRefusal

MAX_DIM = 512
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "bf16dot_emulated")  # order of enum fv_isa
_ABI = 2
KINDS = {"full": 0, "causal": 1, "layout": 2}
NORMALIZERS = {"softmax": 0, "sigmoid": 1, "relu": 2}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # float16: biases only
_PARALLEL = ctypes.c_void_p


def _fields(kind, *names: str) -> list[tuple]:
    return [(field, kind) for field in names]


class _Args(ctypes.Structure):
    """struct fv_args"""

    _fields_ = [
        *_fields(ctypes.c_int32, "abi", "dtype", "kind", "isa", "threads", "normalizer"),
        *_fields(ctypes.c_float, "scale", "softcap", "shift", "dropout"),
        ("seed", ctypes.c_uint64),
        *_fields(ctypes.c_int64, "batch", "heads", "kv_heads", "q_len", "k_len", "dim", "v_dim"),
        *_fields(ctypes.c_void_p, "q", "k", "v", "out", "lse", "sinks"),
        *_fields(ctypes.c_int64 * 3, "q_stride", "k_stride", "v_stride", "out_stride"),
        ("temperature", ctypes.c_void_p),
        ("temperature_stride", ctypes.c_int64 * 3),
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64 * 4),
        *_fields(ctypes.c_int32, "bias_dtype", "reserved"),
        ("table", ctypes.c_void_p),
        *_fields(ctypes.c_int64, "table_len", "table_stride"),
        *_fields(ctypes.c_void_p, "q_code", "k_code"),
        *_fields(ctypes.c_int64, "layout_batch", "layout_heads", "nnz", "bitmaps"),
        *_fields(ctypes.c_void_p, "row_ptr", "tile_idx", "tile_id", "dictionary"),
        ("parallel", _PARALLEL),
        ("dout", ctypes.c_void_p),
        ("dout_stride", ctypes.c_int64 * 3),
        *_fields(ctypes.c_void_p, "dlse", "dq", "dk", "dv", "delta", "dtemperature", "dbias"),
        ("dbias_stride", ctypes.c_int64 * 4),
        *_fields(ctypes.c_void_p, "dbias_query", "dbias_key", "dtable"),
    ]


# ---------------------------------------------------------------------------------------------------- the library
@functools.cache
def library() -> ctypes.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(__file__).with_name(f"libfoveate_native.{suffix}")
    if not path.exists():
        raise EngineRefusal(
            f"the native library is not built ({path.name} is missing); reinstall with a C++ compiler"
        )
    lib = ctypes.CDLL(str(path))
    lib.fv_sizeof_args.restype = ctypes.c_int64
    for entry in (lib.fv_forward, lib.fv_backward):
        entry.argtypes = [ctypes.POINTER(_Args), ctypes.c_char_p, ctypes.c_int64]
    if lib.fv_sizeof_args() != ctypes.sizeof(_Args):
        raise EngineRefusal("the native library and this Python code are of different versions; reinstall")
    return lib


@functools.cache
def pool() -> int | None:
    """Address of torch's GOMP_parallel, or None where torch does not use that runtime (then threads are per call)."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {
                line.split()[-1]
                for line in maps
                if "libgomp" in line or "libomp" in line or "libiomp5" in line
            }
    except OSError:
        return None
    beside_torch = str(Path(torch.__file__).parent)
    for path in sorted(paths, key=lambda p: (not p.startswith(beside_torch), p)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, _PARALLEL).value
        except (OSError, AttributeError):
            continue
    return None


@functools.cache
def available() -> tuple[str, ...]:
    """The instruction sets that this build and this CPU can run, best last."""
    lib = library()
    return tuple(isa for number, isa in enumerate(ISAS) if lib.fv_isa_available(number))


@functools.cache
def best_isa() -> str:
    """What the engine uses when nothing is asked for."""
    return [isa for isa in available() if isa != "bf16dot_emulated"][-1]


# ------------------------------------------------------------------------------------------------ calls of the library
@dataclass(frozen=True)
class Scores:
    """What acts between q k^T and the result, as the library takes it.

    Args:
        softcap: 0 = none. shift: added to every logit.
        sinks: (H,) float32. temperature: broadcastable (B, H, N) float32. bias: 4-D, 1 where broadcast.
        table: (1 or H, L) float32 with q_code (N,), k_code (M,) int32: entry q_code - k_code is added.
        seed: of the dropout, one int64.
    """

    normalizer: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    shift: float = 0.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    sinks: Tensor | None = None
    temperature: Tensor | None = None
    bias: Tensor | None = None
    table: Tensor | None = None
    q_code: Tensor | None = None
    k_code: Tensor | None = None


@dataclass(frozen=True)
class Where:
    """Which pairs: the kind of request, and the arrays of a layout."""

    kind: int = 0
    row_ptr: Tensor | None = None
    tile_idx: Tensor | None = None
    tile_id: Tensor | None = None
    dictionary: Tensor | None = None
    batch: int = 1
    heads: int = 1


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _broadcast_strides(t: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, where: Where, scores: Scores,
    isa: str | None, threads: int | None,
) -> _Args:  # fmt: skip
    args = _Args(
        abi=_ABI,
        dtype=_DTYPES[q.dtype],
        kind=where.kind,
        isa=ISAS.index(isa or best_isa()),
        threads=threads or torch.get_num_threads(),
        normalizer=scores.normalizer,
        scale=scores.scale,
        softcap=scores.softcap,
        shift=scores.shift,
        dropout=scores.dropout_p,
        seed=0 if scores.seed is None else int(scores.seed.item()) & 0xFFFFFFFFFFFFFFFF,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q.shape[2],
        k_len=k.shape[2],
        dim=q.shape[3],
        v_dim=v.shape[3],
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=_pointer(lse),
        sinks=_pointer(scores.sinks),
        q_stride=q.stride()[:3],
        k_stride=k.stride()[:3],
        v_stride=v.stride()[:3],
        out_stride=out.stride()[:3],
        layout_batch=where.batch,
        layout_heads=where.heads,
        parallel=pool(),
    )
    if where.tile_idx is not None and where.dictionary is not None:
        args.nnz, args.bitmaps = where.tile_idx.shape[0], where.dictionary.shape[0]
        args.row_ptr, args.tile_idx = _pointer(where.row_ptr), _pointer(where.tile_idx)
        args.tile_id, args.dictionary = _pointer(where.tile_id), _pointer(where.dictionary)
    if scores.temperature is not None:
        args.temperature = scores.temperature.data_ptr()
        args.temperature_stride = _broadcast_strides(scores.temperature)
    if scores.bias is not None:
        args.bias, args.bias_dtype = scores.bias.data_ptr(), _DTYPES[scores.bias.dtype]
        args.bias_stride = _broadcast_strides(scores.bias)
    if scores.table is not None:
        args.table, args.table_len = scores.table.data_ptr(), scores.table.shape[1]
        args.table_stride = scores.table.shape[1] if scores.table.shape[0] > 1 else 0
        args.q_code, args.k_code = _pointer(scores.q_code), _pointer(scores.k_code)
    return args


def _ready(scores: Scores) -> Scores:
    """Tensors in the dtype and memory order that the library reads."""
    changed = {}
    for field in ("sinks", "table"):
        t = getattr(scores, field)
        if t is not None:
            changed[field] = t.to(torch.float32).contiguous()
    if scores.temperature is not None:
        changed["temperature"] = scores.temperature.to(torch.float32)
    if scores.bias is not None and scores.bias.dtype not in _DTYPES:
        changed["bias"] = scores.bias.to(torch.float32)
    for field in ("q_code", "k_code"):
        if getattr(scores, field) is not None:
            changed[field] = getattr(scores, field).to(torch.int32).contiguous()
    return replace(scores, **changed) if changed else scores


def _check(status: int, message: ctypes.Array) -> None:
    if status:
        raise RuntimeError(f"native attention failed: {message.value.decode(errors='replace')}")


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Room for out in the memory order of q: (B, N, H, D) storage stays (B, N, H, Dv), which transformers want back."""
    if q.shape[1] > 1 and q.stride(1) < q.stride(2):
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
    return q.new_empty((*q.shape[:3], v.shape[3]))


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Where,
    scores: Scores,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One forward of the C library; `isa` and `threads` are for tests and benchmarks (default: best, torch's).

    Returns:
        out (B, H, N, Dv) and lse (B, H, N) float32; lse is empty where the normaliser has none.
    """
    lib = library()
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    scores = _ready(scores)
    out = empty_out(q, v)
    lse = q.new_empty(q.shape[:3] if scores.normalizer == 0 else (0,), dtype=torch.float32)
    args = _arguments(q, k, v, out, lse if scores.normalizer == 0 else None, where, scores, isa, threads)
    message = ctypes.create_string_buffer(256)
    _check(lib.fv_forward(ctypes.byref(args), message, len(message)), message)
    return out, lse


@dataclass(frozen=True)
class Gradients:
    """What one backward found; None where it was not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    temperature: Tensor | None = None
    bias: Tensor | None = None
    table: Tensor | None = None


def call_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    where: Where,
    scores: Scores,
    wanted: Sequence[str] = (),
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> Gradients:
    """One backward of the C library.

    Args:
        dout, dlse: gradients of out and of lse (None: zero).
        wanted: which of "sinks", "temperature", "bias", "table" to find besides q, k and v.
    """
    lib = library()
    q, k, v, out, dout = (_dense_rows(t) for t in (q, k, v, out, dout))
    ready = _ready(scores)
    (batch, heads, n, _), m = q.shape, k.shape[2]
    softmax = scores.normalizer == 0
    args = _arguments(q, k, v, out, lse if softmax else None, where, ready, isa, threads)
    empty = functools.partial(q.new_empty, dtype=torch.float32)
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype) for t in (q, k, v))
    delta = empty((batch, heads, n)) if softmax else None
    dlse = None if dlse is None or not softmax else dlse.to(torch.float32).contiguous()
    args.dout, args.dout_stride, args.dlse = dout.data_ptr(), dout.stride()[:3], _pointer(dlse)
    args.dq, args.dk, args.dv, args.delta = dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), _pointer(delta)
    dtemperature = dtable = dbias = None
    if "temperature" in wanted and ready.temperature is not None:
        dtemperature = empty((batch, heads, n))
        args.dtemperature = dtemperature.data_ptr()
    if "table" in wanted and ready.table is not None:
        dtable = empty((batch, heads, ready.table.shape[1]))
        args.dtable = dtable.data_ptr()
    if "bias" in wanted and ready.bias is not None:
        rows, columns = ready.bias.shape[2] == n, ready.bias.shape[3] == m
        if rows and columns:
            dbias = torch.zeros(ready.bias.shape, dtype=torch.float32)
            args.dbias = dbias.data_ptr()
            args.dbias_stride = (*_broadcast_strides(dbias)[:2], m, 1)
        elif columns:
            dbias = empty((batch, heads, 1, m))
            args.dbias_key = dbias.data_ptr()
        else:
            dbias = torch.zeros((batch, heads, n, 1), dtype=torch.float32)
            args.dbias_query = dbias.data_ptr()
    message = ctypes.create_string_buffer(256)
    _check(lib.fv_backward(ctypes.byref(args), message, len(message)), message)
    dsinks = None
    if "sinks" in wanted and ready.sinks is not None and delta is not None:
        share = torch.where(torch.isneginf(lse), 0.0, (ready.sinks.view(1, heads, 1) - lse).exp())
        dsinks = _as(-(share * delta).sum((0, 2)), scores.sinks)
    return Gradients(
        dq,
        dk,
        dv,
        dsinks,
        _as(dtemperature, scores.temperature),
        _as(dbias, scores.bias),
        _as(None if dtable is None else dtable.sum(0), scores.table),
    )


def _as(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    """`grad` summed to the shape and in the dtype of `like`."""
    return None if grad is None or like is None else grad.sum_to_size(like.shape).to(like.dtype)
