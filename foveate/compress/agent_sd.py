"""AgentSD: agent attention in trained diffusion models, the agents being merged tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.compress.agent import agent_attention, sides
from foveate.core.attention import attention

ROWS = 1024  # sources compared with all targets at a time
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TokenMatching:
    """For every token that is no target the target that it resembles most, the most similar ones first.

    Attributes:
        source: int64 (B, N - d), tokens; partner: (B, N - d), their targets, as numbers in 0 .. d - 1.
        target: (d,), tokens that stay.
    """

    source: Tensor
    partner: Tensor
    target: Tensor

    @property
    def tokens(self) -> int:
        """N."""
        return self.source.shape[1] + len(self.target)

    def merged(self, ratio: float) -> int:
        """How many tokens a ratio of them removes: int(N ratio), but no target.

        >>> match_tokens(torch.randn(1, 64, 4), (8, 8), (4, 4)).merged(0.99)
        60
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"TokenMatching: ratio must be in [0, 1], got {ratio}")
        return min(self.source.shape[1], int(self.tokens * ratio))

    def merge(self, x: Tensor, count: int) -> Tensor:
        """(B, N, C) -> (B, N - count, C): `count` sources go into their targets, which become the plain mean of
        themselves and all that went into them. Order: the sources that are left, then the targets."""
        self._fits("merge", x, self.tokens, count)
        rows = self.source.unsqueeze(2).expand(-1, -1, x.shape[2])  # (B, N - d, C)
        sources, targets = x.gather(1, rows), x[:, self.target]
        into = self.partner[:, :count].unsqueeze(2).expand(-1, -1, x.shape[2])
        targets = targets.scatter_reduce(1, into, sources[:, :count], "mean")
        return torch.cat([sources[:, count:], targets], 1)

    def unmerge(self, y: Tensor, count: int) -> Tensor:
        """(B, N - count, C) -> (B, N, C): merged sources get what their target has."""
        self._fits("unmerge", y, self.tokens - count, count)
        left, targets = y.tensor_split([self.source.shape[1] - count], 1)
        into = self.partner[:, :count].unsqueeze(2).expand(-1, -1, y.shape[2])
        sources = torch.cat([targets.gather(1, into), left], 1)  # (B, N - d, C), as in `source`
        out = y.new_empty(len(y), self.tokens, y.shape[2]).index_copy(1, self.target, targets)
        return out.scatter(1, self.source.unsqueeze(2).expand(-1, -1, y.shape[2]), sources)

    def _fits(self, what: str, x: Tensor, tokens: int, count: int) -> None:
        if not 0 <= count <= self.source.shape[1]:
            raise ValueError(f"{what}: count must be in 0 .. {self.source.shape[1]}, got {count}")
        if x.ndim != 3 or x.shape[0] != len(self.source) or x.shape[1] != tokens:
            raise ValueError(
                f"{what}: accepted are tokens ({len(self.source)}, {tokens}, C), got {tuple(x.shape)}"
            )


@torch.no_grad()
def match_tokens(
    x: Tensor,
    grid: tuple[int, int],
    stride: tuple[int, int] = (4, 4),
    *,
    generator: torch.Generator | None = None,
) -> TokenMatching:
    """Targets, one in each cell of a grid of tokens, and for every other token the target of largest cosine.

    Args:
        x: (B, N, C), by which tokens are compared: hidden states.
        grid: (h, w), h w = N, row-major.
        stride: (rows, columns) of a cell; what is left over at the lower and right border has no target.
        generator: draws the target of each cell, the same for all rows of the batch. None, or an odd batch: its first
            token (halves of a batch with and without prompt must agree).

    Compares (N - d) d pairs, `ROWS` sources at a time.

    Raises:
        ValueError: a grid that does not hold the tokens or is smaller than a cell.

    Source: Agent Attention: On the Integration of Softmax and Linear Attention (2023), which has it from token
    merging for Stable Diffusion. Differs: equal cosines are taken in the order of the tokens.

    >>> match_tokens(torch.randn(2, 64, 8), (8, 8)).target.tolist()
    [0, 4, 32, 36]
    """
    h, w = sides("match_tokens", grid)
    sy, sx = sides("match_tokens", stride)
    if x.ndim != 3 or x.shape[1] != h * w or h < sy or w < sx:
        raise ValueError(
            f"match_tokens: x must be (B, h * w, C) and the grid at least a cell; got {tuple(x.shape)}, "
            f"grid {(h, w)}, stride {(sy, sx)}"
        )
    rows, columns = h // sy, w // sx
    if generator is None or len(x) % 2:
        pick = torch.zeros(rows, columns, dtype=torch.int64)
    else:
        pick = torch.randint(sy * sx, (rows, columns), generator=generator, device=generator.device)
    pick = pick.to(x.device)
    y = torch.arange(rows, device=x.device)[:, None] * sy + pick // sx
    target = (y * w + torch.arange(columns, device=x.device) * sx + pick % sx).flatten()  # (d,)
    others = torch.ones(h * w, dtype=torch.bool, device=x.device)
    others[target] = False
    source = others.nonzero().flatten()  # (N - d,)
    unit = F.normalize(x, dim=-1)
    keys = unit[:, target].mT  # (B, C, d)
    best = [(part @ keys).max(-1) for part in unit[:, source].split(ROWS, 1)]
    cosine, partner = (torch.cat([found[i] for found in best], 1) for i in (0, 1))  # (B, N - d)
    order = cosine.argsort(dim=1, descending=True, stable=True)
    return TokenMatching(source[order], partner.gather(1, order), target)


def agent_sd_attention(
    x: Tensor,
    to_q: Map,
    to_k: Map,
    to_v: Map,
    heads: int,
    matching: TokenMatching,
    *,
    ratio: float = 0.4,
    agent_ratio: float = 0.95,
    k2: float = 0.3,
    shortcut: float = 0.075,
    engine: str = "auto",
) -> Tensor:
    """Self-attention of a trained diffusion model through merged tokens as agents, without training.

        Y = merge(X, ratio),  A = Wq merge(X, agent_ratio),  s = D^-1/2
        O = softmax(s^k2 Q_Y A^T) softmax(s A K_Y^T) V_Y + shortcut V_Y      if agents are fewer than half of Y's tokens
        O = softmax(s Q_Y K_Y^T) V_Y                                         otherwise

    and merged tokens get what their target has. The released settings for 50 steps of Stable Diffusion: 20 steps with
    a matching of stride (4, 4) and agent_ratio 0.95, then stride (2, 2) and 0.5, which is plain token merging.

    Args:
        x: (B, N, C), what the attention reads (after the norm).
        to_q, to_k, to_v: the trained maps (B, n, C) -> (B, n, heads * D).
        matching: of the hidden states, `match_tokens`.
        ratio, agent_ratio: shares of the tokens that are merged, for the tokens and for the agents.
        k2, shortcut, engine: see above, and `attention`.

    Returns:
        (B, N, heads * D), before the output map.

    Source: Agent Attention: On the Integration of Softmax and Linear Attention (2023). Differs: a function on tokens,
    not a patch of a pipeline: which layers use it and at which steps is up to the caller.

    >>> to = torch.nn.Linear(32, 32)
    >>> x = torch.randn(2, 256, 32)
    >>> agent_sd_attention(x, to, to, to, 4, match_tokens(x, (16, 16))).shape
    torch.Size([2, 256, 32])
    """
    count, fewer = matching.merged(ratio), matching.merged(agent_ratio)
    split = lambda t: t.unflatten(2, (heads, -1)).transpose(1, 2)  # noqa: E731  (B, heads, n, D)
    y = matching.merge(x, count)
    q, k, v = (split(to(y)) for to in (to_q, to_k, to_v))
    if 2 * (matching.tokens - fewer) < y.shape[1]:
        agents = split(to_q(matching.merge(x, fewer)))
        scale = q.shape[3] ** -0.5
        out = agent_attention(q, k, v, agents, scale=scale, scale_bcast=scale**k2, engine=engine)
        out = out + shortcut * v
    else:
        out = attention(q, k, v, engine=engine)
        assert isinstance(out, Tensor)
    return matching.unmerge(out.transpose(1, 2).flatten(2), count)
