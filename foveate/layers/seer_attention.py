"""SeerAttention: a small gate beside frozen attention learns which blocks of its map matter, and chooses them.

    G = softmax_J(rho(W_q P_q)_I . rho(W_k P_k)_J / sqrt(d_g))           the gate, from pooled q and k before RoPE
    T_IJ = max_{i in I, j in J} A_ij / sum_J' max A                       its target, the map of the frozen model
    loss = KL(T || G), and attention then keeps block (I, J) where G_IJ is large

rho is a rotary embedding at the first token of each block. A gate takes queries and keys *before* their rotary
embedding, and its target comes from the rotated ones. `foveate.hf.distill_gates` trains gates beside a transformers
model, and `SeerAttention` is the selector that runs them in `foveate.hf.apply`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.layout import TILE, BlockLayout
from foveate.core.selectors.base import Selector
from foveate.core.statistics import block_causal, block_map, block_pool

POOLS = {"max": "max", "min": "min", "avg": "mean"}
METHODS = ("threshold", "ratio", "mass")
Rotary = Callable[
    [Tensor, Tensor], tuple[Tensor, Tensor]
]  # (like, positions (1, N)) -> cos, sin (1, N, <= D)


class BlockGate(nn.Module):
    """Predicts the block map of one layer's attention from pooled queries and keys.

    Of each block of c tokens the queries are averaged and the keys are pooled in three ways (the last block over its
    real tokens); one matrix per head maps the pooled keys to d_g numbers, and another the queries, unless they have one
    pooling and d_g = D: then they stay as they are and every query head has its own matrix of keys.

    Args:
        heads, kv_heads, head_dim: H, Hkv and D of the layer; query head h reads key head h // (H / Hkv).
        block: c, tokens per block. width: d_g, even unless theta is None.
        q_pool, k_pool: names out of "max", "min", "avg"; their order is that of the features.
        theta: base of the rotary embedding of the blocks' positions (of the layer's own model); None for none.
        std: standard deviation of the initial weights.

    Raises:
        ValueError: sizes that do not fit, an unknown or repeated pooling.

    Source: SeerAttention (2024); initialised as in its released code. The matrices have the release's names and shapes:
    mask_linear_k.weight (heads, D * poolings, d_g), no bias.

    >>> gate = BlockGate(4, 2, 16, block=64, width=16)
    >>> q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    >>> gate(q, k).shape, sum(p.numel() for p in gate.parameters()) == 4 * 3 * 16 * 16
    (torch.Size([1, 4, 4, 4]), True)
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block: int = 64,
        width: int = 128,
        q_pool: Sequence[str] = ("avg",),
        k_pool: Sequence[str] = ("max", "min", "avg"),
        theta: float | None = 10_000.0,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, size in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim), ("block", block),
                           ("width", width)):  # fmt: skip
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"BlockGate: {name} must be an int >= 1, got {size!r}")
        if heads % kv_heads:
            raise ValueError(f"BlockGate: heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if theta is not None and (not theta > 0 or width % 2):
            raise ValueError(
                f"BlockGate: theta must be positive and width even for it, got {theta!r} and {width}; None for no "
                "rotary embedding"
            )
        for name, pools in (("q_pool", q_pool), ("k_pool", k_pool)):
            if (
                isinstance(pools, str)
                or not pools
                or not set(pools) <= set(POOLS)
                or len(set(pools)) < len(pools)
            ):
                raise ValueError(
                    f"BlockGate: {name} must be different names out of {', '.join(POOLS)}; got {pools!r}"
                )
        self.heads, self.kv_heads, self.head_dim, self.block, self.width = (
            heads,
            kv_heads,
            head_dim,
            block,
            width,
        )
        self.q_pool, self.k_pool, self.theta = tuple(q_pool), tuple(k_pool), theta
        both = len(q_pool) > 1 or width != head_dim
        self.mask_linear_q = _HeadLinear(heads, head_dim * len(q_pool), width, std) if both else None
        self.mask_linear_k = _HeadLinear(kv_heads if both else heads, head_dim * len(k_pool), width, std)

    def settings(self) -> dict[str, Any]:
        """The arguments that make an equal gate (apart from its weights)."""
        names = ("heads", "kv_heads", "head_dim", "block", "width", "q_pool", "k_pool", "theta")
        return {name: getattr(self, name) for name in names}

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Logits of the block map.

        Args:
            q: (B, H, N, D) and k: (B, Hkv, M, D), before their rotary embedding; the last query sits at the last key,
                and M - N is a multiple of the block.

        Returns:
            (B, H, ceil(N / c), ceil(M / c)); -inf where the query block sees nothing of the key block.
        """
        return self.score(*self.pool(q, k), q.shape[2], k.shape[2])

    def pool(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, ceil(N / c), poolings of q * D) and (B, Hkv, ceil(M / c), poolings of k * D)."""
        dtype = self.mask_linear_k.weight.dtype
        for name, t, heads in (("q", q, self.heads), ("k", k, self.kv_heads)):
            if t.ndim != 4 or t.shape[1] != heads or t.shape[3] != self.head_dim or not t.shape[2]:
                raise ValueError(
                    f"BlockGate: {name} must have shape (batch, {heads}, tokens, {self.head_dim}), got {tuple(t.shape)}"
                )
        if k.shape[2] < q.shape[2] or (k.shape[2] - q.shape[2]) % self.block:
            raise ValueError(
                f"BlockGate: {q.shape[2]} queries and {k.shape[2]} keys; accepted: equal lengths, or more keys by a "
                f"multiple of the block, {self.block}"
            )
        pooled = [
            torch.cat([block_pool(t.to(dtype), self.block, POOLS[how]) for how in pools], -1)
            for t, pools in ((q, self.q_pool), (k, self.k_pool))
        ]
        return pooled[0], pooled[1]

    def score(self, q: Tensor, k: Tensor, n: int, m: int) -> Tensor:
        """Logits from what `pool` made of n queries and m keys."""
        groups, first = self.heads // self.kv_heads, (m - n) // self.block
        if self.mask_linear_q is None:
            weight = self.mask_linear_k.weight.unflatten(0, (-1, groups))  # (Hkv, G, 3 D, d_g)
            keys = torch.einsum("bhnc,hgcd->bhgnd", k, weight)
        else:
            q = self.mask_linear_q(q)
            keys = self.mask_linear_k(k).unsqueeze(2)  # (B, Hkv, 1, blocks, d_g)
        queries = self._rotated(q, first).unflatten(1, (self.kv_heads, groups))
        logits = queries @ self._rotated(keys, 0).transpose(-1, -2) * self.width**-0.5  # (B, Hkv, G, nq, nk)
        hidden = ~block_causal(n, m, self.block, logits.device)
        return logits.masked_fill(hidden, -torch.inf).flatten(1, 2)

    def _rotated(self, x: Tensor, first: int) -> Tensor:
        """Rotary embedding of (.., blocks, d_g) at the first token of block `first`, `first` + 1, ..."""
        if self.theta is None:
            return x
        rates = self.theta ** (
            -torch.arange(0, self.width, 2, dtype=torch.float64, device=x.device) / self.width
        )
        place = torch.arange(first, first + x.shape[-2], dtype=torch.float64, device=x.device) * self.block
        angle = (place[:, None] * rates).repeat(1, 2)  # (blocks, d_g)
        return x * angle.cos().to(x) + turned(x) * angle.sin().to(x)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class _HeadLinear(nn.Module):
    """(B, heads, blocks, features) -> (B, heads, blocks, width), one matrix per head."""

    def __init__(self, heads: int, features: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, features, width) * std)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


# -------------------------------------------------------------------------------------------------------- training
def pooled_attention_target(
    q: Tensor,
    k: Tensor,
    block: int,
    *,
    reduce: str = "max",
    normalize: bool = True,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """What a gate learns: the causal attention map reduced to blocks, each row of blocks divided by its sum.

    Streamed (`foveate.statistics.block_map`): no N x N map.

    Args:
        q: (B, H, N, D) and k: (B, Hkv, M, D), with their rotary embedding, as attention takes them.
        block, reduce ("max" or "sum"), scale, lse: as in `block_map`.

    Returns:
        (B, H, ceil(N / block), ceil(M / block)) in float32 (float64 for float64); rows that see nothing are 0.

    >>> x = torch.randn(1, 2, 100, 8)
    >>> target = pooled_attention_target(x, x, 64)
    >>> target.shape, torch.allclose(target.sum(-1), torch.ones(1, 2, 2)), target[0, 0, 0, 1].item()
    (torch.Size([1, 2, 2, 2]), True, 0.0)
    """
    target = block_map(q, k, block, reduce=reduce, scale=scale, lse=lse)
    return (
        target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        if normalize
        else target
    )


def gate_loss(logits: Tensor, target: Tensor, drop_first: float = 0.25) -> Tensor:
    """KL(target || softmax(logits)), averaged over all elements of the block map, as the paper does; 0 iff they agree.

    Args:
        logits: (.., nq, nk), -inf where nothing is seen; target: the same shape, rows that sum to 1.
        drop_first: share of the query blocks, the first ones, that are left out, in [0, 1).

    >>> gate_loss(torch.zeros(4, 4), torch.full((4, 4), 0.25)).item()
    0.0
    """
    if logits.shape != target.shape or logits.ndim < 2:
        raise ValueError(
            f"gate_loss: logits and target must have one shape (.., nq, nk), got {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    if not 0 <= drop_first < 1:
        raise ValueError(f"gate_loss: drop_first must lie in [0, 1), got {drop_first!r}")
    first = int(drop_first * logits.shape[-2])
    logits, target = logits[..., first:, :], target[..., first:, :].to(logits.dtype)
    hidden = torch.isneginf(logits)
    # an unseen block has target 0: its term is 0, and log softmax is -inf
    log_gate = torch.log_softmax(logits, -1).masked_fill(hidden, 0.0)
    return (torch.xlogy(target, target) - target * log_gate).mean()


# ------------------------------------------------------------------------------------------------------- inference
@torch.no_grad()
def gate_blocks(
    logits: Tensor, q_len: int, k_len: int, block: int, method: str, value: float, dense_last: int
) -> Tensor:
    """The block map of `gate_layout`, bool like logits; the block may have any size."""
    if method not in METHODS:
        raise ValueError(f"gate_layout: method must be one of {', '.join(METHODS)}; got {method!r}")
    if not math.isfinite(value) or (method != "threshold" and not 0 < value <= 1):
        accepted = "a finite number" if method == "threshold" else "0 < value <= 1"
        raise ValueError(f"gate_layout: value {value!r} of {method}; accepted: {accepted}")
    if isinstance(dense_last, bool) or not isinstance(dense_last, int) or dense_last < 0:
        raise ValueError(f"gate_layout: dense_last must be an int >= 0, got {dense_last!r}")
    nq, nk = -(-q_len // block), -(-k_len // block)
    if logits.ndim != 4 or tuple(logits.shape[2:]) != (nq, nk):
        raise ValueError(
            f"gate_layout: logits must have shape (batch, heads, {nq}, {nk}), got {tuple(logits.shape)}"
        )
    visible = block_causal(q_len, k_len, block, logits.device)
    place = torch.arange(nk, device=logits.device)
    always = place == place[:nq, None] + nk - nq
    always[:, 0] = True
    gate = torch.softmax(logits.float().masked_fill(~visible, -torch.inf), -1)
    if method == "threshold":
        kept = gate > value
    else:
        strength = gate.masked_fill(always, 2.0) if method == "ratio" else gate
        ranked, order = strength.masked_fill(~visible, -1.0).sort(stable=True, dim=-1, descending=True)
        if method == "ratio":
            best = (place < round((1 - math.sqrt(1 - value)) * nk)).expand_as(order)
        else:
            best = (ranked.cumsum(-1) - ranked < value) | (value == 1)
        kept = torch.zeros_like(best).scatter(-1, order, best)
    kept = (kept | always) & visible
    if dense_last:
        kept[:, :, -dense_last:] = visible[-dense_last:]
    return kept


def gate_layout(
    logits: Tensor,
    q_len: int,
    k_len: int,
    *,
    block: int = TILE,
    method: str = "threshold",
    value: float = 2e-3,
    dense_last: int = 2,
) -> BlockLayout:
    """The layout of the blocks that a gate keeps; causal within them.

    The diagonal block and block 0 are always kept, and everything for the last `dense_last` query blocks, where the
    question stands.

    Args:
        logits: (B, H, ceil(q_len / block), ceil(k_len / block)), as `BlockGate` returns them.
        block: a multiple of 64; q_len <= k_len.
        method: "threshold": G_IJ > value (the paper: 5e-4 to 5e-3; below 0 keeps everything). A fixed threshold keeps
            less of longer inputs, whose scores are about 1 / blocks each.
            "ratio": the best round((1 - sqrt(1 - value)) nk) blocks of every row, which is a share `value` of the
            causal map, the diagonal and block 0 counted in, `dense_last` not.
            "mass": the best blocks of every row until their G_IJ sum to `value`.

    Raises:
        ValueError: another method, a value out of range, shapes that do not fit.

    >>> layout = gate_layout(torch.zeros(1, 1, 64, 64), 4096, 4096, method="ratio", value=0.25, dense_last=0)
    >>> round(layout.area / (4096 * 4097 / 2), 2)
    0.25
    """
    if block % TILE or block < 1 or q_len > k_len:
        raise ValueError(
            f"gate_layout: block {block} for {q_len} queries and {k_len} keys; accepted: a multiple of {TILE}, and no "
            "more queries than keys"
        )
    kept = gate_blocks(logits, q_len, k_len, block, method, value, dense_last)
    return BlockLayout.from_blocks(kept, q_len, k_len, block=block, causal=True)


@dataclass(frozen=True, eq=False, repr=False)
class SeerAttention(Selector):
    """Causal block-sparse prefill over the blocks that trained gates keep; a single query (decoding) sees everything.

    Args:
        gates: one `BlockGate`, or {layer: gate} for a model, whose layers without one stay dense.
        method, value, dense_last: as in `gate_layout`.
        rotary: how q and k were rotated, to undo it before the gate: `rotary(x, positions (1, N)) -> cos, sin`, each
            (1, N, <= D) with the halves of D paired; the `rotary_emb` module of a transformers model is one
            (`model.model.rotary_emb`). None when q and k come un-rotated. Keys are taken to sit at 0, 1, 2, ..., as
            `generate` numbers the real tokens also behind left padding.
        layer: the layer that `layout` is asked about; `foveate.hf.apply` sets it (`at_layer`).

    Fewer queries than keys (a chunk of a longer prompt) need a difference that is a multiple of the block.

    Source: SeerAttention (2024). Differs: diagonal and block 0 always on; a cumulative rule ("mass") besides; the gate
    gets q and k by undoing the rotation, so no layer of the model is changed.

    >>> q, k = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16)
    >>> seer = SeerAttention(BlockGate(4, 2, 16, width=16), method="ratio", value=0.5, dense_last=1)
    >>> seer.layout(q, k)
    BlockLayout(300 x 300, heads=4, 48 tiles, 2 bitmaps, density 0.3651)
    """

    gates: BlockGate | Mapping[int, BlockGate]
    method: str = "threshold"
    value: float = 2e-3
    dense_last: int = 2
    rotary: Rotary | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        gates = [self.gates] if isinstance(self.gates, BlockGate) else list(dict(self.gates).values())
        if not gates or not all(isinstance(gate, BlockGate) for gate in gates):
            raise TypeError(
                f"SeerAttention.gates must be a BlockGate or a mapping layer -> BlockGate, got {self.gates!r}"
            )
        for gate in gates:
            if gate.block % TILE:
                raise ValueError(
                    f"SeerAttention needs gates whose block is a multiple of {TILE}, got {gate.block}"
                )
        if self.method not in METHODS:
            raise ValueError(f"SeerAttention.method must be one of {', '.join(METHODS)}; got {self.method!r}")

    def at_layer(self, layer: int) -> SeerAttention:
        return replace(self, layer=layer)

    @torch.no_grad()
    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        """The layout for q (B, H, N, D) and k (B, Hkv, M, D); `scale` does not matter to a gate."""
        if not is_causal:
            raise ValueError(
                "SeerAttention is defined for causal attention; got is_causal=False, accepted is True"
            )
        n, m = q.shape[2], k.shape[2]
        gate = self._gate()
        if n == 1 or gate is None:
            everything = torch.ones(-(-n // TILE), -(-m // TILE), dtype=torch.bool, device=q.device)
            return BlockLayout.from_blocks(everything, n, m, causal=True)
        if self.rotary is not None:
            q, k = unrotated(q, self.rotary, m - n), unrotated(k, self.rotary, 0)
        return gate_layout(
            gate(q, k),
            n,
            m,
            block=gate.block,
            method=self.method,
            value=self.value,
            dense_last=self.dense_last,
        )

    def _gate(self) -> BlockGate | None:
        if isinstance(self.gates, BlockGate):
            return self.gates
        if self.layer is None:
            raise ValueError(
                f"SeerAttention has gates of layers {sorted(self.gates)}; say which with .at_layer(...), as "
                "foveate.hf.apply does"
            )
        return self.gates.get(self.layer)

    def __repr__(self) -> str:
        return f"SeerAttention(method={self.method!r}, value={self.value}, dense_last={self.dense_last})"


def turned(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the halves of the last axis."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def unrotated(x: Tensor, rotary: Rotary, first: int) -> Tensor:
    """x (B, H, N, D) before a rotary embedding at positions `first`, `first` + 1, ... was applied to it.

        y = x cos + turned(x) sin   =>   x = (y cos - turned(y) sin) / (cos^2 + sin^2)

    Features beyond the width of cos were not rotated.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide) for t in rotary(x, torch.arange(first, first + x.shape[2], device=x.device)[None]))
    y, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :].to(wide)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (1, 1, N, width)
    return torch.cat([(y * cos - turned(y) * sin) / (cos.square() + sin.square()), rest], -1)


# ----------------------------------------------------------------------------------------------------------- files
_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.attn_gate\.(mask_linear_[qk]\.weight)")
_FORMAT = "foveate.BlockGate/1"


def save_gates(gates: Mapping[int, BlockGate], path: str | os.PathLike[str]) -> None:
    """Write the gates of a model, and nothing else of it, as safetensors under the names of the published ones:
    model.layers.0.self_attn.attn_gate.mask_linear_k.weight and so on; their settings go into the metadata."""
    from safetensors.torch import save_file

    if not gates:
        raise ValueError("save_gates: no gates")
    path = Path(path)
    arrays = {
        f"model.layers.{layer}.self_attn.attn_gate.{name}": t.detach().cpu().contiguous()
        for layer, gate in gates.items()
        for name, t in gate.state_dict().items()
    }
    settings = {str(layer): gate.settings() for layer, gate in gates.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(arrays, temporary, metadata={"format": _FORMAT, "settings": json.dumps(settings)})
    os.replace(temporary, path)


def load_gates(
    path: str | os.PathLike[str], make: Callable[[], BlockGate] | None = None
) -> dict[int, BlockGate]:
    """The gates of a file, in eval mode, by layer.

    Args:
        path: written by `save_gates`, or published by the authors (attn_gate_weights.pth, read without unpickling code,
            or the same as safetensors).
        make: makes an empty gate; needed for published files, which do not hold the settings, e.g.
            `lambda: BlockGate(32, 8, 128, theta=500000.0)` for a Llama-3.1-8B.

    Raises:
        ValueError: no gates in the file, names that are not those of a gate, no settings and no `make`, or weights of
            another shape.
    """
    path = Path(path)
    meta: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        arrays = torch.load(path, map_location="cpu", weights_only=True)
    states: dict[int, dict[str, Tensor]] = {}
    for name, t in arrays.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{path}: {name} is not a weight of a gate; accepted: {_NAME.pattern}")
        states.setdefault(int(found[1]), {})[found[2]] = t
    if not states:
        raise ValueError(f"{path}: holds no gates")
    if make is None and meta.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: does not say the gates' settings; pass make=, a function that makes an empty gate"
        )
    settings = json.loads(meta["settings"]) if make is None else {}
    gates = {}
    for layer, state in sorted(states.items()):
        gate = BlockGate(**settings[str(layer)]) if make is None else make()
        try:
            gate.load_state_dict({name: t.to(gate.mask_linear_k.weight.dtype) for name, t in state.items()})
        except RuntimeError as error:
            raise ValueError(f"{path}: layer {layer} does not fit {gate}: {error}") from error
        gates[layer] = gate.eval()
    return gates
