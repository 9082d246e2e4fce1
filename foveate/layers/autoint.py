"""AutoInt: the columns of a record as tokens, whose self-attention builds feature crosses of growing order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention


class FieldEmbedding(nn.Module):
    """One vector for each field of a record: a row of a table, the mean of several rows, or a vector times the value.

    Args:
        cardinalities: how many values each categorical field has.
        num_numeric: numerical fields, which follow the categorical ones.
        dim: d, width of the vectors; they start at N(0, 0.01^2).

    Source: AutoInt (2018). Fields that hold several values: `cat` (B, Mc, V), negative where there is none.

    >>> embed = FieldEmbedding([3, 5], num_numeric=1, dim=4)
    >>> embed(torch.tensor([[2, 4]]), torch.tensor([[0.0]])).shape
    torch.Size([1, 3, 4])
    """

    starts: Tensor
    sizes: Tensor

    def __init__(self, cardinalities: Sequence[int], num_numeric: int, dim: int) -> None:
        super().__init__()
        if any(n < 1 for n in cardinalities) or num_numeric < 0 or not (len(cardinalities) or num_numeric):
            raise ValueError(
                "FieldEmbedding: cardinalities must be >= 1 each and num_numeric >= 0, with one field at least; got "
                f"{list(cardinalities)} and {num_numeric}"
            )
        sizes = torch.tensor(list(cardinalities), dtype=torch.int64)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.table = nn.Parameter(0.01 * torch.randn(int(sizes.sum()), dim))
        self.numeric = nn.Parameter(0.01 * torch.randn(num_numeric, dim))

    @property
    def fields(self) -> int:
        """M, fields of both kinds."""
        return len(self.sizes) + len(self.numeric)

    def forward(self, cat: Tensor | None = None, num: Tensor | None = None) -> Tensor:
        """(B, M, d) from cat int (B, Mc) or (B, Mc, V) and num (B, Mn); None where there are no such fields."""
        parts = []
        for name, x, count in (("cat", cat, len(self.sizes)), ("num", num, len(self.numeric))):
            if (x is None) != (count == 0) or (x is not None and (x.ndim < 2 or x.shape[1] != count)):
                got = None if x is None else tuple(x.shape)
                raise ValueError(f"FieldEmbedding: {name} must have {count} fields (B, {count}), got {got}")
        if cat is not None:
            ids = cat if cat.ndim == 3 else cat.unsqueeze(2)  # (B, Mc, V)
            held = ids >= 0
            if bool((ids >= self.sizes[:, None]).any()) or (cat.ndim == 2 and not bool(held.all())):
                raise ValueError(
                    f"FieldEmbedding: cat must be below {self.sizes.tolist()} and not negative, got up to "
                    f"{ids.amax((0, 2)).tolist()} and down to {int(ids.min())}"
                )
            rows = F.embedding((ids + self.starts[:, None]).clamp_min(0), self.table)  # (B, Mc, V, d)
            weight = held / held.sum(2, keepdim=True).clamp_min(1)  # of values; none at all give 0
            parts.append((rows * weight.to(rows.dtype).unsqueeze(3)).sum(2))
        if num is not None:
            parts.append(num.to(self.numeric.dtype).unsqueeze(2) * self.numeric)
        return torch.cat(parts, 1)


class InteractingLayer(nn.Module):
    """Multi-head self-attention among fields, with a projected residual; no positions and no mask.

        a_ml = softmax_l(s W_q e_m . W_k e_l),   u_m = ReLU([sum_l a_ml W_v e_l of all heads] + W_res e_m)

    Args:
        in_dim: width of the fields; out_dim: width over all heads.
        heads: H.
        paper: the formula of the paper: linear maps without bias, s = 1. Else as in the authors' code: ReLU on queries,
            keys, values and residual, all with bias, s = (out_dim / H)^-1/2, and a layer norm after the last ReLU.
        dropout: on the weights.

    Shape: (B, M, in_dim) -> (B, M, out_dim).

    Source: AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks (2018).

    >>> InteractingLayer(16, 64)(torch.randn(2, 39, 16)).shape
    torch.Size([2, 39, 64])
    """

    def __init__(
        self, in_dim: int, out_dim: int = 64, heads: int = 2, *, paper: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if heads < 1 or out_dim % heads:
            raise ValueError(
                f"InteractingLayer: out_dim must be a multiple of heads, got {out_dim} and {heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"InteractingLayer: dropout must be in [0, 1), got {dropout}")
        self.heads, self.paper, self.dropout = heads, paper, dropout
        self.scale = 1.0 if paper else (out_dim // heads) ** -0.5
        self.q_proj = nn.Linear(in_dim, out_dim, bias=not paper)
        self.k_proj = nn.Linear(in_dim, out_dim, bias=not paper)
        self.v_proj = nn.Linear(in_dim, out_dim, bias=not paper)
        self.res_proj = nn.Linear(in_dim, out_dim, bias=not paper)
        self.norm = None if paper else nn.LayerNorm(out_dim, eps=1e-8)

    def forward(self, e: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """u (B, M, out_dim); with return_weights also the weights (B, H, M, M), before dropout."""
        maps = (self.q_proj, self.k_proj, self.v_proj, self.res_proj)
        q, k, v, rest = (proj(e) if self.paper else proj(e).relu() for proj in maps)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, M, D)
        mixed = attention(q, k, v, scale=self.scale, dropout_p=self.dropout if self.training else 0.0)
        assert isinstance(mixed, Tensor)
        u = (mixed.transpose(1, 2).flatten(2) + rest).relu()
        u = u if self.norm is None else self.norm(u)
        if not return_weights:
            return u
        return u, (self.scale * q @ k.transpose(2, 3)).softmax(-1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, paper={self.paper}, dropout={self.dropout}"


class AutoInt(nn.Module):
    """Field embeddings, interacting layers, and one linear unit on all fields: the logit of a click.

    A layer can join what its fields have gathered, so L layers represent crosses of up to 2^L fields.

    Args:
        cardinalities, num_numeric, dim: as in `FieldEmbedding`.
        layers: out_dim of each interacting layer.
        heads, paper, dropout: as in `InteractingLayer`.
        mlp: widths of a ReLU network on the flat embeddings, whose logit is added (AutoInt+); None: without.

    Source: AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks (2018). Returns the
    logit; its sigmoid is the probability.

    >>> model = AutoInt([10, 20, 30], num_numeric=2)
    >>> model(torch.tensor([[1, 2, 3]]), torch.tensor([[0.5, -1.0]])).shape
    torch.Size([1])
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        num_numeric: int = 0,
        dim: int = 16,
        layers: Sequence[int] = (64, 64, 64),
        heads: int = 2,
        mlp: Sequence[int] | None = None,
        *,
        paper: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("AutoInt: layers must name the width of one layer at least, got none")
        self.embed = FieldEmbedding(cardinalities, num_numeric, dim)
        widths = [dim, *layers]
        self.layers = nn.ModuleList(
            InteractingLayer(a, b, heads, paper=paper, dropout=dropout) for a, b in pairwise(widths)
        )
        self.out = nn.Linear(self.embed.fields * widths[-1], 1)
        self.mlp = None
        if mlp is not None:
            inner = [self.embed.fields * dim, *mlp]
            steps = [m for a, b in pairwise(inner) for m in (nn.Linear(a, b), nn.ReLU())]
            self.mlp = nn.Sequential(*steps, nn.Linear(inner[-1], 1))

    def forward(self, cat: Tensor | None = None, num: Tensor | None = None) -> Tensor:
        """Logits (B,)."""
        e = u = self.embed(cat, num)
        for layer in self.layers:
            u = layer(u)
        y = self.out(u.flatten(1))
        return (y if self.mlp is None else y + self.mlp(e.flatten(1))).squeeze(1)

    def weights(self, cat: Tensor | None = None, num: Tensor | None = None) -> Tensor:
        """The weights of every layer for each record, (layers, B, H, M, M): which fields it combines."""
        u, found = self.embed(cat, num), []
        for layer in self.layers:
            u, a = layer(u, return_weights=True)
            found.append(a)
        return torch.stack(found)


@torch.no_grad()
def field_affinity(model: AutoInt, loader: Iterable[Sequence[Tensor | None]]) -> Tensor:
    """The weights of fields (row) on fields (column), averaged over records: (layers, heads, M, M), rows sum to 1.

    Args:
        model: is asked as it is in eval mode.
        loader: batches (cat, num), or (cat, num, ...) of which the rest is ignored.

    >>> field_affinity(AutoInt([4, 4], heads=2), [(torch.tensor([[0, 1], [2, 3]]), None)]).shape
    torch.Size([3, 2, 2, 2])
    """
    training, total, count = model.training, None, 0
    model.eval()
    try:
        for cat, num, *_ in loader:
            found = model.weights(cat, num)  # (layers, B, H, M, M)
            count += found.shape[1]
            total = found.double().sum(1) if total is None else total + found.double().sum(1)
    finally:
        model.train(training)
    if total is None:
        raise ValueError("field_affinity: loader gave no batch; accepted: at least one (cat, num)")
    return (total / count).float()
