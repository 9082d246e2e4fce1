"""Gaussian adaptive attention: features weighted by bell curves around their own mean; no queries or keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

INITS = ("normal", "lognormal", "ones")
TINY = 1e-8  # added to the variance
NARROW = 1e-12  # least square of a width


class GaussianAdaptiveAttention(nn.Module):
    """x * A along one axis: A is a softmax of a product of bell curves around the input's own mean.

        A = softmax_axis( -sum_i (x - mu - delta_i)^2 / (2 c_i^2 (var + 1e-8)) ),     out = x A

    mu and var (unbiased) are of x along the axis. Each of `heads` contiguous pieces of the axis (the last one takes the
    rest) has its own statistics, offsets delta_i, which start at 0, and widths c_i. A sums to 1 in each piece, so the
    output is smaller than x by about the length of a piece. A product of bell curves is one bell curve: more of them
    change how A is learned, not what it can be.

    Args:
        axis: of the input.
        heads: pieces of the axis, each at least 2 long.
        gaussians: bell curves that are multiplied.
        padding_value: entries equal to it count as 0 in mu and var and are given back as they are; they keep their
            share of A. None: no padding.
        init: of the widths: "normal" (released first; about 8 % start below 0.1 and look at next to nothing),
            "lognormal" (exp of a normal, released later) or "ones".

    Shape: any with at least 2 axes -> the same.

    Raises:
        ValueError: heads or gaussians < 1, an unknown init, an input without that axis or too short along it.

    Source: Gaussian Adaptive Attention is All You Need (2024). Differs: logarithms instead of products of densities,
    which is the same and stays finite for narrow bell curves; widths below 1e-6 count as 1e-6.

    >>> layer = GaussianAdaptiveAttention(-1, init="ones")
    >>> [round(a, 3) for a in layer.weights(torch.tensor([[0.0, 1.0, 2.0, 5.0]]))[0].tolist()]
    [0.222, 0.307, 0.341, 0.13]
    """

    weight_range = (0.0, 1.0)

    def __init__(
        self,
        axis: int,
        heads: int = 1,
        gaussians: int = 1,
        *,
        padding_value: float | None = None,
        init: str = "normal",
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("gaussians", gaussians)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"GaussianAdaptiveAttention: {name} must be an int >= 1, got {value!r}")
        if init not in INITS:
            raise ValueError(
                f"GaussianAdaptiveAttention: init must be one of {', '.join(INITS)}, got {init!r}"
            )
        self.axis, self.heads, self.gaussians, self.padding_value = axis, heads, gaussians, padding_value
        self.offsets = nn.Parameter(torch.zeros(heads, gaussians))
        widths = torch.ones(heads, gaussians) if init == "ones" else torch.randn(heads, gaussians)
        self.widths = nn.Parameter(widths.exp() if init == "lognormal" else widths)

    def forward(self, x: Tensor) -> Tensor:
        """x times `weights(x)`; padded entries as they are."""
        out = (x * self.weights(x)).to(x.dtype)
        return out if self.padding_value is None else torch.where(x == self.padding_value, x, out)

    def weights(self, x: Tensor) -> Tensor:
        """A, in the shape of x and at least float32."""
        if not -x.dim() <= self.axis < x.dim() or x.dim() < 2:
            raise ValueError(
                f"GaussianAdaptiveAttention: axis {self.axis} of an input {tuple(x.shape)}; "
                "accepted: one of at least 2 axes"
            )
        n = x.shape[self.axis]
        if n // self.heads < 2:
            raise ValueError(
                f"GaussianAdaptiveAttention: axis {self.axis} must be at least 2 heads = {2 * self.heads} long, got {n}"
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        real = wide if self.padding_value is None else wide.masked_fill(x == self.padding_value, 0.0)
        size = n // self.heads
        sizes = [size] * (self.heads - 1) + [n - size * (self.heads - 1)]
        pieces = zip(wide.split(sizes, self.axis), real.split(sizes, self.axis), strict=True)
        return torch.cat([self._piece(h, *piece) for h, piece in enumerate(pieces)], self.axis)

    def _piece(self, head: int, x: Tensor, real: Tensor) -> Tensor:
        """A of one head's piece; real: x with 0 in padded places."""
        var, mean = torch.var_mean(real, self.axis, keepdim=True)
        far = (x - mean).unsqueeze(-1) - self.offsets[head]  # (..., gaussians)
        steep = 1 / (2 * self.widths[head].square().clamp_min(NARROW) * (var.unsqueeze(-1) + TINY))
        return torch.softmax(-(far.square() * steep).sum(-1), self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, heads={self.heads}, gaussians={self.gaussians}"


class GaussianAdaptiveBlock(nn.Module):
    """x += attention(x), once per layer; layers may differ in axis, heads and bell curves.

    Args:
        axes, heads, gaussians: one of each per layer.
        padding_value, init: as in `GaussianAdaptiveAttention`.

    Raises:
        ValueError: lists of different lengths, or empty ones.

    >>> GaussianAdaptiveBlock([-1, 1], [2, 1], [3, 3])(torch.randn(4, 5, 8)).shape
    torch.Size([4, 5, 8])
    """

    def __init__(
        self,
        axes: Sequence[int],
        heads: Sequence[int],
        gaussians: Sequence[int],
        *,
        padding_value: float | None = None,
        init: str = "normal",
    ) -> None:
        super().__init__()
        if not axes or not len(axes) == len(heads) == len(gaussians):
            raise ValueError(
                "GaussianAdaptiveBlock: axes, heads and gaussians must have one entry per layer, "
                f"got {len(axes)}, {len(heads)} and {len(gaussians)}"
            )
        self.layers = nn.ModuleList(
            GaussianAdaptiveAttention(*each, padding_value=padding_value, init=init)
            for each in zip(axes, heads, gaussians, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class FrozenEncoderProbe(nn.Module):
    """A classifier on a frozen encoder's features: layers mixed, a Gaussian adaptive block, pooled, a linear head.

        x = sum_l softmax(m)_l f_l,   logits = head(mean over tokens of block(x))

    Args:
        dim: width of the features; classes: of the answer.
        layers: encoder layers whose features are given.
        block: what re-weights them, a module (B, N, dim) -> (B, N, dim); None: a plain linear probe.

    Shape: (B, layers, N, dim) -> (B, classes).

    >>> probe = FrozenEncoderProbe(8, 3, 2, GaussianAdaptiveBlock([-1], [2], [1]))
    >>> probe(torch.randn(4, 2, 5, 8)).shape
    torch.Size([4, 3])
    """

    def __init__(self, dim: int, classes: int, layers: int = 1, block: nn.Module | None = None) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers))
        self.block = nn.Identity() if block is None else block
        self.head = nn.Linear(dim, classes)

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() != 4 or features.shape[1] != len(self.mix):
            raise ValueError(
                f"FrozenEncoderProbe: features must be (B, {len(self.mix)}, N, dim), got {tuple(features.shape)}"
            )
        x = torch.einsum("l,blnd->bnd", self.mix.softmax(0), features)
        return self.head(self.block(x).mean(1))


def importance_factor(weights: Tensor, axis: int) -> Tensor:
    """IF = (A - min A) / (max A - min A) of the mean weights A along an axis: which feature, token or layer matters.

    Args:
        weights: of a whole data set, any shape (`GaussianAdaptiveAttention.weights`).
        axis: of the features; all others are averaged over.

    Returns:
        (length of the axis,), from 0 to 1; all 0 where the means are equal.

    >>> importance_factor(torch.tensor([[0.1, 0.3, 0.6], [0.1, 0.5, 0.4]]), -1)
    tensor([0.0000, 0.7500, 1.0000])
    """
    if not -weights.dim() <= axis < weights.dim():
        raise ValueError(f"importance_factor: axis {axis} of weights {tuple(weights.shape)}")
    mean = weights.movedim(axis, 0).flatten(1).mean(1) if weights.dim() > 1 else weights
    span = mean.max() - mean.min()
    return (mean - mean.min()) / span if float(span) > 0 else torch.zeros_like(mean)
