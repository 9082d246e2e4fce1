"""Exact attention without all keys at one place: streamed from the host, or passed around a ring of processes.

Both read keys and values block by block and merge partial results by their log-sum-exp,

    lse = log(exp(lse_1) + exp(lse_2)),    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2,

so that a process holds its own rows and one visiting block. After "A Unified View of Long-Sequence Models towards
Modeling Million-Scale Dependencies" (2023), whose algorithm was not at hand, and Ring Attention (2023).
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.core.attention import attention
from foveate.core.merge import merge


def _part(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) in float32 (float64) over some of the keys."""
    found = attention(q, k, v, is_causal=causal, scale=scale, return_lse=True)
    assert isinstance(found, tuple)
    wide = torch.promote_types(q.dtype, torch.float32)
    return found[0].to(wide), found[1]


@torch.no_grad()
def streamed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    device: torch.device | str = "cpu",
    *,
    block_q: int = 1024,
    block_k: int = 4096,
    causal: bool = False,
    scale: float | None = None,
    pin: bool = True,
) -> Tensor:
    """Attention on a device that never holds more than one block of queries and one of keys and values.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), on the host, where they stay.
        device: computes.
        block_q, block_k: rows that are sent at a time.
        causal: no later keys, the last query at the last key.
        scale: default D ** -0.5.
        pin: copy each block through pinned memory, so that the transfer does not wait; for CUDA devices.

    Returns:
        (B, H, N, Dv) on the host, in the dtype of q; no gradient.

    >>> import foveate as fv
    >>> q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    >>> torch.allclose(streamed_attention(q, k, v, block_q=16, block_k=7), fv.attention(q, k, v), atol=1e-6)
    True
    """
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"streamed_attention: {name} must be an int >= 1, got {size!r}")
    device = torch.device(device)

    def sent(x: Tensor) -> Tensor:
        if device.type != "cuda":
            return x.to(device)
        return (x.contiguous().pin_memory() if pin else x).to(device, non_blocking=pin)

    n, m = q.shape[2], k.shape[2]
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for i in range(0, n, block_q):
        end = min(i + block_q, n)
        rows, state = sent(q[:, :, i:end]), None
        for j in range(0, m, block_k):
            stop = min(j + block_k, m)
            # a query at row r stands at r + m - n: with causal, whole, cut, or not at all
            first, last = i + m - n, end - 1 + m - n
            if causal and j > last:
                break
            ks, vs = sent(k[:, :, j:stop]), sent(v[:, :, j:stop])
            if not causal or stop - 1 <= first:
                found = _part(rows, ks, vs, scale, False)
            else:
                found = _cut(rows, ks, vs, scale, first - j)
            state = found if state is None else merge([state, found])
        if state is not None:
            out[:, :, i:end] = state[0].to(q.dtype).cpu()
    return out


def _cut(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int) -> tuple[Tensor, Tensor]:
    """Causal attention of queries that stand at first, first + 1, ... of these keys, perhaps before or behind them."""
    n, m = q.shape[2], k.shape[2]
    none, all_ = (
        min(max(-first, 0), n),
        min(max(m - 1 - first, 0), n),
    )  # rows before all keys; first that sees all
    parts = []
    if none:
        blank = q.new_zeros(*q.shape[:2], none, v.shape[3], dtype=torch.promote_types(q.dtype, torch.float32))
        parts.append((blank, blank.new_full(blank.shape[:3], -torch.inf)))
    if all_ > none:
        stop = first + all_  # keys that the last of them sees
        parts.append(_part(q[:, :, none:all_], k[:, :, :stop], v[:, :, :stop], scale, True))
    if n > all_:
        parts.append(_part(q[:, :, all_:], k, v, scale, False))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


# ------------------------------------------------------------------------------------------------------- the ring
def ring_bytes(
    lengths: Sequence[int], heads: int, head_dim: int, element: int = 4, batch: int = 1
) -> list[int]:
    """Bytes that each process of `distributed_attention` sends forward: its buffers are as long as the longest part.

        2 (W - 1) max(n_w) heads head_dim batch element

    >>> ring_bytes([4, 4], heads=2, head_dim=8)
    [512, 512]
    """
    one = 2 * max(lengths) * heads * head_dim * batch * element
    return [one * (len(lengths) - 1)] * len(lengths)


class _Ring:
    """Blocks (B, Hkv, longest, width) that go from each process to the next; `sent` counts bytes."""

    def __init__(self, group: Any, length: int) -> None:
        self.group = group
        alone = not (dist.is_available() and dist.is_initialized())
        self.size, self.rank = (1, 0) if alone else (dist.get_world_size(group), dist.get_rank(group))
        self.sent = 0
        self.lengths = [length]
        if self.size > 1:
            found = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(found, torch.tensor([length]), group=group)
            self.lengths = [int(t) for t in found]

    def padded(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, max(self.lengths) - x.shape[2])).contiguous()

    def turn(self, x: Tensor) -> Tensor:
        """What the process before holds, for what this one holds."""
        if self.size == 1:
            return x
        to, come = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        whole = self.group if self.group is not None else dist.group.WORLD
        received = torch.empty_like(x)
        waiting = [
            dist.isend(x, dist.get_global_rank(whole, to), group=self.group),  # pyright: ignore[reportArgumentType]
            dist.irecv(received, dist.get_global_rank(whole, come), group=self.group),  # pyright: ignore
        ]
        for work in waiting:
            if work is not None:
                work.wait()
        self.sent += x.nbytes
        return received

    def owner(self, step: int) -> int:
        """Whose block is here after so many turns."""
        return (self.rank - step) % self.size


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Any, causal: bool, scale: float, block: int
    ):
        ring, d = _Ring(group, k.shape[2]), k.shape[3]
        visiting, state = ring.padded(torch.cat([k, v], -1)), None
        for step in range(ring.size):
            who = ring.owner(step)
            if not causal or who <= ring.rank:
                here = visiting[:, :, : ring.lengths[who]]
                for j in range(0, here.shape[2], block):
                    part = here[:, :, j : j + block]
                    ks, vs = part[..., :d], part[..., d:]
                    found = (
                        _cut(q, ks, vs, scale, -j)
                        if causal and who == ring.rank
                        else _part(q, ks, vs, scale, False)
                    )
                    state = found if state is None else merge([state, found])
            if step + 1 < ring.size:
                visiting = ring.turn(visiting)
        assert state is not None
        out, lse = state
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (ring, causal, scale, block)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        ring, causal, scale, block = ctx.options
        wide, d = out.dtype, k.shape[3]
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        split = partial(torch.unflatten, dim=1, sizes=groups)
        g = split(grads[0].to(wide))  # (B, Hkv, G, n, Dv)
        qs, lses, delta = split(q.to(wide)), split(lse), (g * split(out)).sum(-1)
        dq = torch.zeros_like(qs)
        visiting = ring.padded(torch.cat([k, v], -1).to(wide))
        gathered = torch.zeros_like(visiting)  # gradients of the block that is here; they travel with it
        for step in range(ring.size):
            who = ring.owner(step)
            if not causal or who <= ring.rank:
                for j in range(0, ring.lengths[who], block):
                    cols = slice(j, min(j + block, ring.lengths[who]))
                    kb, vb = (t.unsqueeze(2) for t in (visiting[:, :, cols, :d], visiting[:, :, cols, d:]))
                    for i in range(0, q.shape[2], block):
                        rows = slice(i, min(i + block, q.shape[2]))
                        x = scale * qs[..., rows, :] @ kb.transpose(-1, -2)
                        if causal and who == ring.rank:
                            at = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
                            x = x.masked_fill(
                                torch.arange(cols.start, cols.stop, device=q.device) > at, -torch.inf
                            )
                        p = (x - lses[..., rows].unsqueeze(-1)).exp()
                        dp = g[..., rows, :] @ vb.transpose(-1, -2)
                        ds = scale * p * (dp - delta[..., rows].unsqueeze(-1))
                        dq[..., rows, :] += ds @ kb
                        gathered[:, :, cols, :d] += (ds.transpose(-1, -2) @ qs[..., rows, :]).sum(2)
                        gathered[:, :, cols, d:] += (p.transpose(-1, -2) @ g[..., rows, :]).sum(2)
            if ring.size > 1:  # the last turn brings the gradients home
                both = ring.turn(torch.cat([visiting, gathered], -1))
                visiting, gathered = both[..., : visiting.shape[3]], both[..., visiting.shape[3] :]
        own = gathered[:, :, : k.shape[2]]
        return (
            dq.flatten(1, 2).to(q.dtype),
            own[..., :d].to(k.dtype),
            own[..., d:].to(v.dtype),
            None,
            None,
            None,
            None,
        )


def distributed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Any = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    block: int = 1024,
) -> Tensor:
    """This process's rows of attention over the rows of all processes of a group.

    Process w has n_w rows of q, k and v, a piece of the sequence in the order of the ranks; n_w may differ. Keys and
    values go once around the ring, 2 n d (W - 1) / W numbers from each process where the pieces are equal; backward
    they go around with their gradients. With `causal` the first processes have less to do than the last.

    Args:
        q: (B, H, n_w, D); k: (B, Hkv, n_w, D); v: (B, Hkv, n_w, Dv), n_w >= 1.
        group: of torch.distributed (gloo); None: the default one, or this process alone where there is none.
        causal: no later keys, in the order of the whole sequence.
        scale: default D ** -0.5.
        block: keys that are attended to at a time; backward tiles are block x block.

    Returns:
        (B, H, n_w, Dv), with gradients: every process of the group must call backward.

    >>> import foveate as fv
    >>> q, k, v = (torch.randn(1, 2, 50, 8) for _ in range(3))
    >>> alone = distributed_attention(q, k, v, causal=True, block=16)
    >>> torch.allclose(alone, fv.attention(q, k, v, is_causal=True), atol=1e-6)
    True
    """
    if q.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "distributed_attention: q must be (B, H, n, D), k and v (B, Hkv, n, ..) with heads H a multiple of Hkv; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"distributed_attention: block must be an int >= 1, got {block!r}")
    found = _RingAttention.apply(
        q, k, v, group, causal, q.shape[3] ** -0.5 if scale is None else scale, block
    )
    assert isinstance(found, Tensor)
    return found


# -------------------------------------------------------------------------------------------- processes to try it
def _worker(
    function: Callable[..., Any], rank: int, size: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        result = function(rank, size, *arguments)
        torch.save(result, Path(folder) / f"{rank}.writing")
        (Path(folder) / f"{rank}.writing").rename(Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_workers(
    function: Callable[..., Any], workers: int, *arguments: Any, timeout: float = 120.0
) -> list[Any]:
    """[function(rank, workers, *arguments) for every rank], each in a process of its own that gloo connects.

    Args:
        function: of a module that can be imported; its result is saved with torch.
        timeout: seconds, after which all are ended.

    Raises:
        RuntimeError: a process failed (its traceback is on stderr), or none finished in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foveate.dist"])  # torch is imported once
    with tempfile.TemporaryDirectory() as folder:
        made = [
            context.Process(target=_worker, args=(function, rank, workers, folder, arguments), daemon=True)
            for rank in range(workers)
        ]
        for process in made:
            process.start()
        until = time.monotonic() + timeout
        while (
            any(p.is_alive() for p in made) and time.monotonic() < until and not any(p.exitcode for p in made)
        ):
            time.sleep(0.01)
        failed = [(rank, p.exitcode) for rank, p in enumerate(made) if p.exitcode != 0]
        for process in made:
            if process.is_alive():
                process.terminate()
            process.join()
        if failed:
            raise RuntimeError(f"run_workers: (rank, exit code) {failed} of {workers} processes")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(workers)]
