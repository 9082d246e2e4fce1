"""The native engine: block-sparse flash attention in C++ for the CPU, work proportional to the mask's area.

The library is plain C behind ctypes (native/foveate.h), chosen by what the CPU reports: AVX-512 with bfloat16 dot
products, AVX-512, AVX2, or portable vector code. It runs on torch's own OpenMP threads: its entry point takes the pool
as a function pointer, so no second pool competes for the cores.

The op is a `torch.library` custom op with a fake rule; `torch.compile(fullgraph=True)` passes through it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from foveate.core.normalizers import Softmax
from foveate.core.request import AttentionRequest, EngineRefusal, layout_arrays
from foveate.core.scores import SoftCap

name = "native"
MAX_DIM = 512
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "bf16dot_emulated")  # order of enum fv_isa
_ABI = 1
_KINDS = {"full": 0, "causal": 1, "layout": 2}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_PARALLEL = ctypes.c_void_p


class _Args(ctypes.Structure):
    """struct fv_forward_args"""

    _fields_ = [
        *((field, ctypes.c_int32) for field in ("abi", "dtype", "kind", "isa", "threads")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("reserved", ctypes.c_int32),
        *(
            (field, ctypes.c_int64)
            for field in ("batch", "heads", "kv_heads", "q_len", "k_len", "dim", "v_dim")
        ),
        *((field, ctypes.c_void_p) for field in ("q", "k", "v", "out", "lse", "sinks")),
        *((field, ctypes.c_int64 * 3) for field in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((field, ctypes.c_int64) for field in ("layout_batch", "layout_heads", "nnz", "bitmaps")),
        *((field, ctypes.c_void_p) for field in ("row_ptr", "tile_idx", "tile_id", "dictionary")),
        ("parallel", _PARALLEL),
    ]


# ---------------------------------------------------------------------------------------------------- the library
@functools.cache
def _library() -> ctypes.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(__file__).with_name(f"libfoveate_native.{suffix}")
    if not path.exists():
        raise EngineRefusal(
            f"the native library is not built ({path.name} is missing); reinstall with a C++ compiler"
        )
    lib = ctypes.CDLL(str(path))
    lib.fv_sizeof_forward_args.restype = ctypes.c_int64
    lib.fv_forward.argtypes = [ctypes.POINTER(_Args), ctypes.c_char_p, ctypes.c_int64]
    if lib.fv_sizeof_forward_args() != ctypes.sizeof(_Args):
        raise EngineRefusal("the native library and this Python code are of different versions; reinstall")
    return lib


@functools.cache
def _pool() -> int | None:
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
    lib = _library()
    return tuple(isa for number, isa in enumerate(ISAS) if lib.fv_isa_available(number))


def best_isa() -> str:
    """What the engine uses when nothing is asked for."""
    return [isa for isa in available() if isa != "bf16dot_emulated"][-1]


def describe() -> str:
    """One line about how the engine runs here."""
    pool = "torch's OpenMP pool" if _pool() else "threads of its own"
    bf16 = "bfloat16 dot products" if best_isa() == "avx512_bf16" else "bfloat16 widened to float32"
    return f"{best_isa()} on {torch.get_num_threads()} threads of {pool}; {bf16}; float16 computed in float32"


# ------------------------------------------------------------------------------------------------------ the engine
def why_not(request: AttentionRequest) -> str | None:
    """The reason why this engine declines, or None."""
    q = request.q
    if q.device.type != "cpu":
        return f"it runs on the CPU; q is on {q.device}"
    if q.dtype == torch.float64:
        return "it computes in float32; float64 runs on the reference engine"
    if request.needs_grad:
        return "it has no backward yet; training on a CPU runs on the reference engine"
    if max(q.shape[3], request.v.shape[3]) > MAX_DIM:
        return f"head dims must be at most {MAX_DIM}, got {q.shape[3]} and {request.v.shape[3]}"
    if any(not isinstance(score, SoftCap) for score in request.scores) or len(request.scores) > 1:
        return "of the scores it takes a single SoftCap"
    if not isinstance(request.normalizer, Softmax):
        return f"it normalises with Softmax, not with {request.normalizer}"
    if request.dropout_p:
        return "it has no dropout"
    if torch.compiler.is_compiling():
        return None
    try:
        _library()
    except EngineRefusal as error:
        return str(error)
    return None


def run(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    softcap = next((score.cap for score in request.scores if isinstance(score, SoftCap)), 0.0)
    arrays = [None] * 4
    batch = heads = 1
    if request.kind == "layout":
        *arrays, batch, heads = layout_arrays(request)
    q, k, v = request.q, request.k, request.v
    dtype = q.dtype
    if dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    out, lse = forward(
        q, k, v, *arrays, batch, heads, _KINDS[request.kind], request.scale, float(softcap), request.sinks
    )
    return out.to(dtype), lse


# Arguments as in `struct fv_forward_args`; returns out (B, H, N, Dv) and lse (B, H, N). Defined by its schema: the
# decorator torch.library.custom_op imports the compiler at the first call, which takes over a second.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? row_ptr, Tensor? tile_idx, Tensor? tile_id, Tensor? dictionary, "
    "int layout_batch, int layout_heads, int kind, float scale, float softcap, Tensor? sinks) -> (Tensor, Tensor)"
)
_OP = "foveate::native_forward"


def _run_op(
    q, k, v, row_ptr, tile_idx, tile_id, dictionary, layout_batch, layout_heads, kind, scale, softcap, sinks
):
    return call(
        q, k, v, row_ptr, tile_idx, tile_id, dictionary, layout_batch, layout_heads, kind, scale, softcap, sinks
    )  # fmt: skip


def _fake_op(
    q, k, v, row_ptr, tile_idx, tile_id, dictionary, layout_batch, layout_heads, kind, scale, softcap, sinks
):
    return _empty_out(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _no_backward(ctx, *grads):
    raise EngineRefusal("the native engine has no backward yet; use engine='reference'")


torch.library.define(_OP, _SCHEMA)
torch.library.impl(_OP, "CPU", _run_op)
torch.library.register_fake(_OP, _fake_op)
torch.library.register_autograd(_OP, _no_backward)
forward = torch.ops.foveate.native_forward.default


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    """Room for out in the memory order of q: (B, N, H, D) storage stays (B, N, H, Dv), which transformers want back."""
    if q.shape[1] > 1 and q.stride(1) < q.stride(2):
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
    return q.new_empty((*q.shape[:3], v.shape[3]))


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor | None,
    tile_idx: Tensor | None,
    tile_id: Tensor | None,
    dictionary: Tensor | None,
    layout_batch: int,
    layout_heads: int,
    kind: int,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One call of the C library; `isa` and `threads` are for tests and benchmarks (default: best, torch's)."""
    lib = _library()
    q, k, v = (t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous() for t in (q, k, v))
    out = _empty_out(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    args = _Args(
        abi=_ABI,
        dtype=_DTYPES[q.dtype],
        kind=kind,
        isa=ISAS.index(isa or best_isa()),
        threads=threads or torch.get_num_threads(),
        scale=scale,
        softcap=softcap,
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
        lse=lse.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        q_stride=q.stride()[:3],
        k_stride=k.stride()[:3],
        v_stride=v.stride()[:3],
        out_stride=out.stride()[:3],
        layout_batch=layout_batch,
        layout_heads=layout_heads,
        parallel=_pool(),
    )
    if row_ptr is not None and tile_idx is not None and tile_id is not None and dictionary is not None:
        args.nnz, args.bitmaps = tile_idx.shape[0], dictionary.shape[0]
        args.row_ptr, args.tile_idx = row_ptr.data_ptr(), tile_idx.data_ptr()
        args.tile_id, args.dictionary = tile_id.data_ptr(), dictionary.data_ptr()
    message = ctypes.create_string_buffer(256)
    if lib.fv_forward(ctypes.byref(args), message, len(message)):
        raise RuntimeError(f"native attention failed: {message.value.decode(errors='replace')}")
    return out, lse
