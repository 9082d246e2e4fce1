"""Agent attention as a layer for maps: agents from pooled queries, position biases, a convolution over the values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.compress.agent import AgentBias, agent_attention, pool_agents, sides, square


class AgentAttention2d(nn.Module):
    """Attention through n agents on a grid of tokens, in two thin softmaxes.

        A = AvgPool_{p x p}(Q),  n = p^2
        O = softmax(Q A^T / sqrt(D) + B2) softmax(A K^T / sqrt(D) + B1) V
        out = (merge(O) + DWC(V)) W_O

    DWC: a depthwise 3 x 3 convolution over the values as a map, which gives back the diversity that a map of rank n
    lacks. Costs n (N + M) pairs per head and 9 N multiply-adds per channel.

    Args:
        dim: C, width of the tokens.
        heads: H.
        resolution: (h, w), rows and columns of the tokens in row-major order.
        agents: n, a square number.
        reduction: keys and values come from a map that a convolution makes smaller by this factor (pyramid models);
            values are enlarged again, bilinearly, for DWC.
        class_token: the tokens begin with one more, which attends and is attended to, but is neither pooled nor
            convolved. Not together with a reduction.
        depthwise: with DWC; position: with B1 and B2.
        bias: of the query, key and value maps; the output map always has one.
        dropout: on the weights of both softmaxes in train mode.

    Shape: (B, N, C) -> (B, N, C), N = h w, one more with a class token.

    Source: Agent Attention: On the Integration of Softmax and Linear Attention (2023). Differs: any resolution at each
    call (tables of rows and columns are interpolated); sides need not be multiples of the reduction.

    >>> layer = AgentAttention2d(32, heads=4, resolution=(14, 14))
    >>> layer(torch.randn(2, 196, 32)).shape, layer(torch.randn(2, 96, 32), resolution=(8, 12)).shape
    (torch.Size([2, 196, 32]), torch.Size([2, 96, 32]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        resolution: tuple[int, int],
        *,
        agents: int = 49,
        reduction: int = 1,
        class_token: bool = False,
        depthwise: bool = True,
        position: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"AgentAttention2d: dim must be a multiple of heads, got {dim} and {heads}")
        if isinstance(reduction, bool) or not isinstance(reduction, int) or reduction < 1:
            raise ValueError(f"AgentAttention2d: reduction must be an int >= 1, got {reduction!r}")
        if class_token and reduction > 1:
            raise ValueError(f"AgentAttention2d: class_token needs reduction=1, got {reduction}")
        if not 0 <= dropout < 1:
            raise ValueError(f"AgentAttention2d: dropout must be in [0, 1), got {dropout}")
        self.resolution = sides("AgentAttention2d", resolution, reduction)
        self.heads, self.side, self.reduction, self.dropout = (
            heads,
            square("AgentAttention2d", agents),
            reduction,
            dropout,
        )
        self.lead = int(class_token)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)
        self.smaller = nn.Conv2d(dim, dim, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if depthwise else None
        self.position = (
            AgentBias(heads, self.resolution, agents, reduction=reduction, class_token=class_token)
            if position
            else None
        )

    def forward(self, x: Tensor, *, resolution: tuple[int, int] | None = None) -> Tensor:
        """out (B, N, C) for tokens on `resolution` (h, w); default: the one that the layer was made for."""
        h, w = (
            self.resolution if resolution is None else sides("AgentAttention2d", resolution, self.reduction)
        )
        if x.ndim != 3 or x.shape[1] != h * w + self.lead:
            raise ValueError(
                f"AgentAttention2d: x must be (B, {h * w + self.lead}, C) for resolution {(h, w)}, "
                f"got {tuple(x.shape)}"
            )
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, H, tokens, D)
        q = split(self.q_proj(x))
        read = x
        if self.smaller is not None and self.norm is not None:
            read = self.norm(self.smaller(x.mT.unflatten(2, (h, w))).flatten(2).mT)  # (B, M, C)
        k, v = self.k_proj(read), self.v_proj(read)
        agents = pool_agents(q[:, :, self.lead :], (self.side, self.side), (h, w))
        agg, bcast = (None, None) if self.position is None else self.position((h, w))
        out = agent_attention(
            q,
            split(k),
            split(v),
            agents,
            bias_agg=agg,
            bias_bcast=bcast,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = out.transpose(1, 2).flatten(2)  # (B, N, C)
        if self.dwc is not None:
            keys = (h // self.reduction, w // self.reduction)
            values = v[:, self.lead :].mT.unflatten(2, keys)  # (B, C, ...)
            if self.reduction > 1:
                values = F.interpolate(values, (h, w), mode="bilinear", align_corners=False)
            near = self.dwc(values).flatten(2).mT
            out = torch.cat([out[:, : self.lead], out[:, self.lead :] + near], 1)
        return self.o_proj(out)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, resolution={self.resolution}, agents={self.side**2}, reduction={self.reduction}"
