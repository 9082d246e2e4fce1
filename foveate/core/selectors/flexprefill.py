"""FlexPrefill: a block map per head and input, query-aware or vertical-slash, sized by estimated mass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout
from foveate.core.selectors.base import Selector

CHUNK = 1 << 25  # elements of the probe strip, or of block maps, that are held at once


class SelectionInfo(TypedDict):
    """What FlexPrefill decided, per batch row and head."""

    query_aware: Tensor  # bool (B, H): True = block map from pooled attention, False = vertical-slash
    js: Tensor  # (B, H): sqrt of the Jensen-Shannon divergence, compared with tau; NaN where not asked
    density: Tensor  # float64 (B, H): allowed pairs / (N * M)


@dataclass(frozen=True)
class FlexPrefill(Selector):
    """Block-sparse causal prefill whose budget follows the content.

    With c = block, nb = ceil(M / c) key blocks, and everything below per query head:

    1. Probe. P = causal softmax(scale q^ k^T) for the last c queries q^. vertical_j = mean over its rows of
       P[:, j]; slash_d = mean over its rows of P at distance d = query position - key.
    2. Decision. p^ = softmax over blocks of scale mean(q^) . kbar, with kbar the block means of k; p =
       vertical summed over blocks. D = sqrt(JSD(p^, p)), natural logarithm. The head is query-aware iff D
       < tau.
    3. Vertical-slash heads. n = number of columns (of distances) that the descending sums need to exceed
       gamma; as blocks, n // c + 1, clamped to the budgets. The strongest blocks and block distances are
       kept; block 0 and distance 0 always. Query block I sees the kept blocks J <= I and I - s for every kept
       distance s.
    4. Query-aware heads. Row softmax of scale qbar kbar^T over causal blocks; all its entries compete: the
       largest are kept while their running sum stays <= gamma * (number of query blocks). In union with the
       vertical-slash map of min_budget.
    5. Diagonal blocks are masked element by element; the softmax over what is kept is exact.

    Cost: c * M per head for the probe (in chunks of heads) and nb^2 for the block maps; nothing is N x M.

    Args:
        block: block size c in tokens, a multiple of 64.
        gamma: share of the attention mass to cover; above 1 keeps everything. The paper uses 0.95 (Llama,
        GLM) or 0.9.
        tau: threshold on D; 0 = vertical-slash only, above sqrt(ln 2) = query-aware only.
        min_budget: least number of tokens kept per query block, as columns and as distances; rounded up to
        blocks.
        max_budget: most of them for vertical-slash heads (rounded down to blocks), or None.

    Everything is kept when M <= max(2 c, min_budget), and for a single query (decoding). Chunked prefill
    (fewer queries than keys) aligns the last query with the last key (bottom-right) and needs M - N to be a
    multiple of 64; the blocks stay those of the whole sequence.

    Source: FlexPrefill (2025). Differs from the released code: batches; block in place of a hard-coded 128; x
    log x = 0 at 0 instead of NaN (which sent such heads to vertical-slash); block distances floor(d / c) of
    true distances also when c does not divide the length; heads are grouped as in `attention`, h // (H /
    Hkv).

    >>> import torch
    >>> q, k = torch.randn(1, 4, 1000, 16), torch.randn(1, 2, 1000, 16)
    >>> layout, info = FlexPrefill(block=64, min_budget=64).select(q, k)
    >>> layout.heads, tuple(info["query_aware"].shape)
    (4, (1, 4))
    """

    block: int = 128
    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < TILE or self.block % TILE:
            raise ValueError(f"FlexPrefill.block must be a positive multiple of {TILE}, got {self.block!r}")
        for name, value in (("gamma", self.gamma), ("tau", self.tau)):
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise ValueError(f"FlexPrefill.{name} must be a finite number >= 0, got {value!r}")
        if not isinstance(self.min_budget, int) or self.min_budget < 1:
            raise ValueError(
                f"FlexPrefill.min_budget must be a positive int (tokens), got {self.min_budget!r}"
            )
        if self.max_budget is not None and (
            not isinstance(self.max_budget, int) or self._most() < -(-self.min_budget // self.block)
        ):
            raise ValueError(
                "FlexPrefill.max_budget must be None or an int (tokens) that holds at least the blocks of "
                f"min_budget={self.min_budget} at block={self.block}, got {self.max_budget!r}"
            )

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        """The layout for q (B, H, N, D) and k (B, Hkv, M, D); see `select` for errors."""
        return self.select(q, k, scale=scale, is_causal=is_causal)[0]

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> tuple[BlockLayout, SelectionInfo]:
        """The layout, and what was decided.

        Args:
            q: (B, H, N, D); k: (B, Hkv, M, D), H a multiple of Hkv, N <= M.
            scale: factor on q k^T; default D ** -0.5.
            is_causal: must be True: the method is defined for causal attention.

        Raises:
            ValueError: shapes that do not fit, is_causal=False, or M - N that is not a multiple of 64.
        """
        self._check(q, k, is_causal)
        batch, heads, n, dim = q.shape
        m, c = k.shape[2], self.block
        scale = float(dim**-0.5 if scale is None else scale)
        if n == 1 or m <= max(2 * c, self.min_budget):
            layout = BlockLayout.from_blocks(
                torch.ones(-(-n // TILE), -(-m // TILE), dtype=torch.bool, device=q.device), n, m, causal=True
            )
            shape, nothing = (batch, heads), torch.zeros(batch, heads, device=q.device)
            info = SelectionInfo(
                query_aware=nothing.bool(),
                js=torch.full_like(nothing, torch.nan),
                density=torch.full(shape, layout.density, dtype=torch.float64, device=q.device),
            )
            return layout, info
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        vertical, slash = probe(q, k, c, scale)  # (B, H, M) each
        kbar = block_means(k.to(wide), c, 0)  # (B, Hkv, nb, D)
        qbar = block_means(q.to(wide), c, (m - n) % c)  # (B, H, na, D)
        query_aware, js = self._decide(q[:, :, -c:].to(wide).mean(2), kbar, vertical, scale)
        blocks = self._vertical_slash(vertical, slash, query_aware, (m - n) // c, qbar.shape[2])
        self._add_query_aware(blocks, qbar, kbar, query_aware, scale)
        times, skipped = c // TILE, (m - n) % c // TILE
        rows = blocks.repeat_interleave(times, 2)[:, :, skipped : skipped + -(-n // TILE)]
        grid = rows.repeat_interleave(times, 3)[..., : -(-m // TILE)]
        layout = BlockLayout.from_blocks(grid, n, m, causal=True)
        density = layout.row_area.sum(-1).double() / (n * m)
        return layout, SelectionInfo(query_aware=query_aware, js=js, density=density.to(q.device))

    # ------------------------------------------------------------------------------------ the steps
    def _decide(self, q_mean: Tensor, kbar: Tensor, vertical: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(query_aware, D), both (B, H), from the mean probe query (B, H, D)."""
        grouped = q_mean.unflatten(1, (kbar.shape[1], -1))  # (B, Hkv, G, D)
        estimate = torch.softmax(torch.matmul(grouped, kbar.transpose(-1, -2)) * scale, -1).flatten(1, 2)
        js = js_divergence(estimate, block_sums(vertical, self.block)).clamp_min(0).sqrt()
        return js < self.tau, js

    def _vertical_slash(
        self, vertical: Tensor, slash: Tensor, query_aware: Tensor, first: int, rows: int
    ) -> Tensor:
        """Block map, bool (B, H, rows, nb); query-aware heads get that of the least budget. `first` is the
        number of the first query block.
        """
        least = -(-self.min_budget // self.block)
        kept = []
        for mass in (vertical, slash):
            single = mass.sort(-1, descending=True).values.cumsum(-1, dtype=torch.float64)
            count = ((single <= self.gamma).sum(-1) + 1) // self.block + 1  # (B, H) blocks
            count = count.clamp(min=least, max=None if self.max_budget is None else self._most())
            count = torch.where(query_aware, least, count)
            pooled = block_sums(mass, self.block)
            pooled[..., 0] = torch.inf  # the sink block, the diagonal
            order = pooled.argsort(dim=-1, descending=True, stable=True)
            top = torch.arange(order.shape[-1], device=order.device) < count.unsqueeze(-1)
            kept.append(torch.zeros_like(top).scatter(-1, order, top))  # (B, H, nb)
        columns, distances = kept
        nb = columns.shape[-1]
        back = torch.arange(first, first + rows, device=columns.device)[:, None] - torch.arange(
            nb, device=columns.device
        )  # (rows, nb), I - J
        return (columns.unsqueeze(2) | distances[..., back.clamp_min(0)]) & (back >= 0)

    def _add_query_aware(
        self, blocks: Tensor, qbar: Tensor, kbar: Tensor, query_aware: Tensor, scale: float
    ) -> None:
        """Add their strongest pooled pairs to the query-aware heads' maps in `blocks` (B, H, na, nb).

        Only causal ones weigh anything; with gamma >= 1 the others come along and `select` masks them.
        """
        na, nb = blocks.shape[2:]
        causal = torch.ones(na, nb, dtype=torch.bool, device=blocks.device).tril(nb - na)
        groups = blocks.shape[1] // kbar.shape[1]
        chosen = query_aware.nonzero()  # (heads, 2)
        for at in chosen.split(max(1, CHUNK // (na * nb))):
            b, h = at.unbind(1)
            logits = torch.matmul(qbar[b, h], kbar[b, h // groups].transpose(-1, -2)) * scale  # (n, na, nb)
            flat = torch.softmax(logits.masked_fill(~causal, -torch.inf), -1).flatten(1)
            strongest, order = flat.sort(-1, descending=True)
            taken = strongest.cumsum(-1, dtype=torch.float64) <= self.gamma * na
            blocks[b, h] |= torch.zeros_like(taken).scatter(-1, order, taken).unflatten(1, (na, nb))

    def _most(self) -> int:
        assert self.max_budget is not None
        return self.max_budget // self.block

    def _check(self, q: Tensor, k: Tensor, is_causal: bool) -> None:
        if not is_causal:
            raise ValueError(
                "FlexPrefill is defined for causal attention; got is_causal=False, accepted is True"
            )
        for name, t in (("q", q), ("k", k)):
            if not isinstance(t, Tensor) or t.ndim != 4:
                got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
            raise ValueError(
                "q (B, H, N, D) and k (B, Hkv, M, D) must share B and D, with H a multiple of Hkv; "
                f"got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        n, m = q.shape[2], k.shape[2]
        if n > m:
            raise ValueError(
                f"FlexPrefill needs at least as many keys as queries, got {n} queries and {m} keys"
            )
        if n > 1 and (m - n) % TILE and m > max(2 * self.block, self.min_budget):
            raise ValueError(
                f"chunked prefill needs k_len - q_len to be a multiple of {TILE}, got {m} - {n} = {m - n}"
            )


def probe(q: Tensor, k: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of the last `rows` queries, averaged by key and by distance.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D), bottom-right aligned; if N < rows, all queries are used.

    Returns:
        vertical (B, H, M) and slash (B, H, M), means over the rows of P[:, j] and of P at distance d; both
        sum to 1.
    """
    batch, heads, n, _ = q.shape
    kv_heads, m = k.shape[1], k.shape[2]
    rows, groups = min(rows, n), heads // kv_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    vertical = torch.empty(batch, heads, m, dtype=wide, device=q.device)
    slash = torch.empty_like(vertical)
    hidden = torch.ones(rows, m, dtype=torch.bool, device=q.device).triu(m - rows + 1)
    for b in range(batch):
        step = max(1, CHUNK // (rows * m * groups))
        for first in range(0, kv_heads, step):
            keys = k[b, first : first + step].to(wide)  # (h, M, D)
            mine = slice(first * groups, (first + len(keys)) * groups)
            queries = q[b, mine, -rows:].to(wide).reshape(len(keys), groups * rows, -1)
            logits = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale).view(-1, rows, m)
            strip = torch.softmax(logits.masked_fill_(hidden, -torch.inf), -1)  # (h G, rows, M)
            vertical[b, mine] = strip.mean(1)
            slash[b, mine] = diagonal_sums(strip) / rows
    return vertical, slash


def diagonal_sums(strip: Tensor) -> Tensor:
    """(..., R, M) -> (..., M): sums over pairs of equal distance d = (M - R + i) - j >= 0.

    With R - 1 zeros before each row, key j of row i lies at flat index i W + (R - 1) + j, W = M + R - 1, and
    the pairs of one distance are W + 1 apart: the diagonals are rows of a strided view.

    >>> import torch
    >>> diagonal_sums(torch.tensor([[1.0, 2.0, 0.0], [4.0, 8.0, 16.0]]))  # distances 0, 1, 2
    tensor([18.,  9.,  4.])
    """
    r, m = strip.shape[-2:]
    padded = torch.nn.functional.pad(strip, (r - 1, 0)).reshape(-1, r, m + r - 1).contiguous()
    width = m + r - 1
    shifted = padded.as_strided((len(padded), r, m), (r * width, width + 1, 1))
    return shifted.sum(1).flip(-1).view(*strip.shape[:-2], m)


def block_sums(mass: Tensor, block: int) -> Tensor:
    """(..., M) -> (..., ceil(M / block))"""
    rest = -mass.shape[-1] % block
    return torch.nn.functional.pad(mass, (0, rest)).unflatten(-1, (-1, block)).sum(-1)


def block_means(x: Tensor, block: int, offset: int) -> Tensor:
    """(B, H, N, D) -> (B, H, blocks, D): means over the rows that are there; row 0 is at `offset` < block."""
    n = x.shape[2]
    rest = -(offset + n) % block
    sums = torch.nn.functional.pad(x, (0, 0, offset, rest)).unflatten(2, (-1, block)).sum(3)
    edges = torch.arange(sums.shape[2] + 1, device=x.device) * block
    sizes = edges.clamp(offset, offset + n).diff()
    return sums / sizes.to(x.dtype).unsqueeze(-1)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """0.5 KL(p || m) + 0.5 KL(q || m), m = (p + q) / 2, over the last axis; natural logarithm, 0 log 0 = 0.

    >>> import torch
    >>> js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))  # ln 2
    tensor(0.6931)
    """
    mid = (p + q) / 2
    terms = torch.stack([torch.xlogy(x, x) - torch.xlogy(x, mid) for x in (p, q)])
    return 0.5 * terms.sum((0, -1))
