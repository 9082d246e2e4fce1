"""Who takes part in the kernel benchmark: the engines of this library and what a user would take instead.

A peer says why it does not take a case (`refuses`), builds its mask (`prepare`, timed apart) and then runs. Every peer
is asked in the way its documentation recommends: SDPA gets `is_causal` where that says the same and never a mask then;
FlexAttention is compiled, with a `BlockMask` from its own `create_block_mask`.
"""

from __future__ import annotations

import statistics
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveate as fv
from foveate.bench.kernels_masks import TARGET_WINDOW, WINDOW, MaskMod, neighborhood_grid
from foveate.core.build import build_layout
from foveate.core.patterns import Causal, Full, Pattern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("fwd", "fwd_bwd")
BACKWARD = 3.5
"""Work of forward and backward together, in forwards: two products forward, five backward."""
MASK_ROWS = 1024  # rows of a boolean mask that are evaluated at once


@dataclass(frozen=True)
class Cell:
    """One case: a mask at one length, dtype and direction. All peers take turns on it.

    `length` counts keys, and queries too except for `decode`, which has one query.

    >>> Cell("causal", 8192).name
    'causal-fwd-float32-b1-h8-n8192-d64'
    """

    mask: str
    length: int
    dim: int = 64
    dtype: str = "float32"
    direction: str = "fwd"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8

    @property
    def q_len(self) -> int:
        return 1 if self.mask == "decode" else self.length

    @property
    def name(self) -> str:
        group = f"h{self.heads}" + (f"kv{self.kv_heads}" if self.kv_heads != self.heads else "")
        return f"{self.mask}-{self.direction}-{self.dtype}-b{self.batch}-{group}-n{self.length}-d{self.dim}"

    def gflops(self, area: int) -> float:
        """Floating point operations on `area` allowed pairs per head, in 1e9: 4 D per pair, 3.5 times with backward."""
        factor = BACKWARD if self.direction == "fwd_bwd" else 1.0
        return factor * 4 * self.dim * area * self.batch * self.heads / 1e9

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the result, of a fixed seed; with a backward q, k and v require gradients."""
        g = torch.Generator(device).manual_seed(0)
        shapes = [(self.heads, self.q_len), (self.kv_heads, self.length), (self.kv_heads, self.length)]
        made = [
            torch.randn(self.batch, heads, n, self.dim, generator=g, device=device, dtype=DTYPES[self.dtype])
            for heads, n in shapes
        ]
        if self.direction == "fwd":
            return made[0], made[1], made[2], made[0].new_empty(0)
        grad = torch.randn(made[0].shape, generator=g, device=device, dtype=made[0].dtype)
        return made[0].requires_grad_(), made[1].requires_grad_(), made[2].requires_grad_(), grad


@dataclass(frozen=True)
class Task:
    """What a peer gets: the case, its tensors, and its mask in two forms (`mask_mod` None: every pair)."""

    cell: Cell
    device: str
    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, Hkv, M, D)
    v: Tensor
    pattern: Pattern
    mask_mod: MaskMod | None

    @property
    def causal(self) -> bool:
        return isinstance(self.pattern, Causal)

    @property
    def grouped(self) -> bool:
        return self.cell.heads != self.cell.kv_heads


@dataclass(frozen=True)
class Ready:
    """A prepared peer: `call` gives the result, `dense` does so without a mask (None: not to be compared)."""

    call: Callable[[], Tensor]
    mask_time: float | None = None  # seconds
    dense: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Peer:
    """One way of computing attention.

    Attributes:
        devices: where it runs when it is not named; asked for by name it runs or its refusal is written down.
        ours: an engine of this library, whose failure is a failure of the benchmark.
        dense_work: its time follows all pairs, not the allowed ones.
        mask_bytes: memory of the mask per (query, key) pair while it is built and used.
    """

    name: str
    what: str
    prepare: Callable[[Task], Ready]
    refuses: Callable[[Cell, str], str | None] = lambda cell, device: None
    devices: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False
    dense_work: bool = False
    mask_bytes: Callable[[Cell], int] = lambda cell: 0
    package: str = "torch"
    comparable: bool = True  # its tokens stand in the order of the other peers'

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


# -------------------------------------------------------------------------------------- this library
def _foveate(engine: str, task: Task) -> Ready:
    n, m, pattern = task.q.shape[2], task.k.shape[2], task.pattern

    def call(pattern: Pattern | None = None, is_causal: bool = False) -> Tensor:
        out = fv.attention(task.q, task.k, task.v, pattern, is_causal=is_causal, engine=engine)
        assert isinstance(out, Tensor)
        return out

    if isinstance(pattern, Full):
        return Ready(call)
    if task.causal:
        return Ready(partial(call, is_causal=True), dense=call)
    build = [_seconds(lambda: build_layout(pattern, n, m)) for _ in range(5)]
    pattern.layout(n, m)  # as for a user, calls after the first find the layout in the cache
    return Ready(partial(call, pattern), statistics.median(build), call)


# ---------------------------------------------------------------------------------------------- SDPA
def _sdpa(task: Task, backend: str | None = None) -> Ready:
    q, k, v = task.q, task.k, task.v

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=task.causal, enable_gqa=task.grouped)

    if backend is None:
        return Ready(call)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = SDPBackend.__members__[backend]

    def with_backend() -> Tensor:
        with sdpa_kernel(chosen):
            return call()

    return Ready(with_backend)


def _no_mask(cell: Cell, device: str) -> str | None:
    if cell.mask in ("full", "causal", "decode"):
        return None
    return "without a mask it runs full and causal attention only; see sdpa_mask"


def _sdpa_mask(task: Task) -> Ready:
    assert task.mask_mod is not None
    q, k, v, mask_mod = task.q, task.k, task.v, task.mask_mod
    start = time.perf_counter()
    mask = boolean_mask(mask_mod, q.shape[2], k.shape[2], task.device)
    _synchronize(task.device)
    took = time.perf_counter() - start
    return Ready(
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=task.grouped), took
    )


def boolean_mask(mask_mod: MaskMod, n: int, m: int, device: str) -> Tensor:
    """Bool (N, M), evaluated by bands of rows so that index arithmetic never takes N x M integers."""
    mask = torch.empty(n, m, dtype=torch.bool, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    rows, columns = torch.arange(n, device=device), torch.arange(m, device=device)[None, :]
    for at in rows.split(MASK_ROWS):
        mask[at[0] : at[-1] + 1] = mask_mod(zero, zero, at[:, None], columns)
    return mask


def _needs_mask(cell: Cell, device: str) -> str | None:
    if cell.mask in ("full", "causal", "decode"):
        return "a mask would only hide what is_causal, or none, says; see sdpa"
    return None


# ------------------------------------------------------------------------------------- FlexAttention
def _torch_flex(task: Task) -> Ready:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = task.q, task.k, task.v
    make = partial(create_block_mask, B=None, H=None, device=task.device)
    probe = min(128, q.shape[2])
    make(_everything, Q_LEN=probe, KV_LEN=probe)  # imports and first-use costs are not the mask's
    _synchronize(task.device)
    start = time.perf_counter()
    block_mask = make(task.mask_mod or _everything, Q_LEN=q.shape[2], KV_LEN=k.shape[2])
    _synchronize(task.device)
    took = time.perf_counter() - start
    run = _compiled_flex()

    def call() -> Tensor:
        return run(q, k, v, block_mask, task.grouped)

    if task.mask_mod is None:
        return Ready(call, took)
    dense_run = _compiled_flex()
    whole = make(_everything, Q_LEN=q.shape[2], KV_LEN=k.shape[2])
    return Ready(call, took, lambda: dense_run(q, k, v, whole, task.grouped))


def _everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Every pair. Without any mask FlexAttention on CPU takes all keys as one block, which is slower (measured)."""
    return q >= 0


def _compiled_flex() -> Callable[..., Tensor]:
    """A compiled FlexAttention with a code object of its own.

    torch counts recompilations per code object; past its limit FlexAttention would run dense and unfused.
    """
    own = types.FunctionType(_flex.__code__.replace(), _flex.__globals__, _flex.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, grouped: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


def _flex_forward_only(cell: Cell, device: str) -> str | None:
    if device == "cpu" and cell.direction == "fwd_bwd":
        return "FlexAttention has no backward on CPU"
    return None


# ------------------------------------------------------------------------------------ other packages
def _flash_attn(task: Task) -> Ready:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    q, k, v = (t.transpose(1, 2).contiguous() for t in (task.q, task.k, task.v))  # (B, N, H, D)
    causal, window = _FLASH_MASKS[task.cell.mask]
    return Ready(lambda: flash_attn_func(q, k, v, causal=causal, window_size=window).transpose(1, 2))


_FLASH_MASKS = {
    "full": (False, (-1, -1)),
    "decode": (False, (-1, -1)),
    "causal": (True, (-1, -1)),
    "sliding_window": (False, (WINDOW - 1, WINDOW - 1)),
    "sliding_window_causal": (True, (WINDOW - 1, 0)),
    "sliding_window_causal_512": (True, (TARGET_WINDOW - 1, 0)),
}


def _flash_attn_refuses(cell: Cell, device: str) -> str | None:
    if device != "cuda" or cell.dtype == "float32":
        return "flash_attn runs bfloat16 and float16 on CUDA"
    return None if cell.mask in _FLASH_MASKS else "flash_attn has no such mask"


def _natten(task: Task) -> Ready:
    import natten  # pyright: ignore[reportMissingImports]

    shape, window, order = neighborhood_grid(task.cell.mask, task.cell.length)
    attend = natten.na2d if len(shape) == 2 else natten.na3d
    tensors = []
    for t in (task.q, task.k, task.v):  # row-major grids, heads after them
        grid = order.undo(t, 2).transpose(1, 2)
        tensors.append(grid.reshape(t.shape[0], *shape, t.shape[1], t.shape[3]).contiguous())
    return Ready(lambda: attend(*tensors, kernel_size=window))


def _natten_refuses(cell: Cell, device: str) -> str | None:
    if cell.mask not in ("neighborhood_2d", "neighborhood_3d"):
        return "natten runs neighbourhoods only"
    return None


def _xformers(task: Task) -> Ready:
    from xformers.ops import (  # pyright: ignore[reportMissingImports]
        LowerTriangularMask,
        memory_efficient_attention,
    )

    q, k, v = (t.transpose(1, 2).contiguous() for t in (task.q, task.k, task.v))  # (B, N, H, D)
    bias = LowerTriangularMask() if task.causal else None
    return Ready(lambda: memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2))


def _xformers_refuses(cell: Cell, device: str) -> str | None:
    if device != "cuda" or cell.heads != cell.kv_heads:
        return "xformers is asked for CUDA and ungrouped heads only"
    return None if cell.mask in ("full", "causal", "decode") else "xformers is asked for full and causal only"


# ----------------------------------------------------------------------------------------- the table
def _per_pair(width: int) -> Callable[[Cell], int]:
    return lambda cell: width


def _mask_and_bias(cell: Cell) -> int:
    return 1 + DTYPES[cell.dtype].itemsize  # SDPA turns the boolean mask into one of the inputs' dtype


PEERS = {
    peer.name: peer
    for peer in (
        Peer("native", "this library's C++ engine", partial(_foveate, "native"), devices=("cpu",), ours=True),
        Peer("flex", "this library's layouts through FlexAttention", partial(_foveate, "flex"), devices=("cuda",),
             ours=True),
        Peer("sdpa", "scaled_dot_product_attention, is_causal where it applies", _sdpa, _no_mask, dense_work=True),
        *(
            Peer(f"sdpa_{short}", f"scaled_dot_product_attention on its {backend} back end",
                 partial(_sdpa, backend=backend), _no_mask, devices=("cuda",), dense_work=True)
            for short, backend in (("flash", "FLASH_ATTENTION"), ("efficient", "EFFICIENT_ATTENTION"),
                                   ("cudnn", "CUDNN_ATTENTION"), ("math", "MATH"))
        ),
        Peer("sdpa_mask", "scaled_dot_product_attention with a boolean mask", _sdpa_mask, _needs_mask,
             dense_work=True, mask_bytes=_mask_and_bias),
        # create_block_mask holds a number or two of 8 bytes per pair, as the mask_mod computes them
        Peer("torch_flex", "compiled FlexAttention with its create_block_mask", _torch_flex, _flex_forward_only,
             mask_bytes=_per_pair(17)),
        Peer("flash_attn", "the package flash_attn", _flash_attn, _flash_attn_refuses, devices=("cuda",),
             package="flash_attn"),
        Peer("natten", "the package natten", _natten, _natten_refuses, devices=("cuda",), package="natten",
             comparable=False),
        Peer("xformers", "the package xformers", _xformers, _xformers_refuses, devices=("cuda",),
             package="xformers"),
    )
}  # fmt: skip


def defaults(device: str) -> tuple[str, ...]:
    """The peers that take part on a device when none is named: those that are installed.

    >>> defaults("cpu")
    ('native', 'sdpa', 'sdpa_mask', 'torch_flex')
    """
    return tuple(peer.name for peer in PEERS.values() if device in peer.devices and peer.installed)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
