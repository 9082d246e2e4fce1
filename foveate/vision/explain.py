"""Which cells of a map each query sees in a layer, and which ones reach it through all layers so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from foveate.core.layout import BlockLayout
from foveate.core.patterns.base import Pattern
from foveate.vision.windows import pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCH = 64  # queries of one backward pass
PAPER, FAR, INK, MARK = (0.96, 0.96, 0.95), (0.66, 0.77, 0.90), (0.10, 0.25, 0.48), (0.93, 0.58, 0.20)
LEGEND = "orange; dark: seen in this layer; light: has reached it through all layers so far"


@dataclass(frozen=True, eq=False)
class WindowReach:
    """What `explain_window` found.

    Args:
        grid: (H, W) of the map.
        direct: bool (layers, H W, H W), [l, i, j]: layer l alone carries something from cell j to cell i.
        reached: the same for layers 0 to l one after another: the receptive field, and how it grows.
        names: of the layers.
    """

    grid: tuple[int, int]
    direct: Tensor
    reached: Tensor
    names: tuple[str, ...]

    def field(self, query: tuple[int, int], layer: int = -1) -> Tensor:
        """bool (H, W): the cells that reach the query (row, column) through all layers up to this one."""
        return self.reached[layer, self._number(query)].view(self.grid)

    def seen(self, query: tuple[int, int], layer: int) -> Tensor:
        """bool (H, W): the cells that the query sees in this layer."""
        return self.direct[layer, self._number(query)].view(self.grid)

    def share(self) -> list[float]:
        """After each layer, the share of all pairs of cells that are connected."""
        return [float(matrix.double().mean()) for matrix in self.reached]

    def _number(self, query: tuple[int, int]) -> int:
        if not all(0 <= at < n for at, n in zip(query, self.grid, strict=True)):
            raise ValueError(f"WindowReach: query must lie in a map of {self.grid}, got {query}")
        return query[0] * self.grid[1] + query[1]

    def __repr__(self) -> str:
        shares = ", ".join(
            f"{name} {100 * s:.1f} %" for name, s in zip(self.names, self.share(), strict=True)
        )
        return f"WindowReach({self.grid[0]} x {self.grid[1]}: {shares})"

    def plot(self, query: tuple[int, int] | None = None) -> Figure:
        """One map per layer: the query, what it sees in that layer, what has reached it through all layers so far.

        Args:
            query: (row, column); the middle of the map when not given.

        Raises:
            ImportError: without matplotlib, the extra `foveate[viz]`.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'foveate[viz]'") from error
        count = len(self.names)
        figure = Figure(figsize=(2.4 * count + 0.4, 2.9), layout="constrained")
        self.draw(figure.subplots(1, count, squeeze=False)[0], query)
        figure.suptitle(f"query {LEGEND}", fontsize=8)
        return figure

    def draw(self, axes: Sequence[Axes], query: tuple[int, int] | None = None) -> None:
        """The maps of `plot` on given matplotlib axes, one per layer."""
        at = (self.grid[0] // 2, self.grid[1] // 2) if query is None else query
        for layer, (place, name) in enumerate(zip(axes, self.names, strict=True)):
            reached = self.field(at, layer)
            image = torch.tensor(PAPER).expand(*self.grid, 3).clone()
            image[reached] = torch.tensor(FAR)
            image[self.seen(at, layer)] = torch.tensor(INK)
            image[at] = torch.tensor(MARK)
            place.imshow(image.numpy(), interpolation="nearest")
            place.set_title(
                f"{layer + 1}: {name}\n{int(reached.sum())} of {reached.numel()} cells", fontsize=8
            )
            place.set(xticks=[], yticks=[])


def explain_window(
    layers: Sequence[Pattern | BlockLayout | nn.Module],
    grid: int | tuple[int, int],
    *,
    dim: int | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> WindowReach:
    """Which cells each query of a map sees in every layer, and which ones reach it through the layers so far.

    A pattern says what it sees. A module is asked: a cell reaches another when the gradient of the one's output with
    respect to the other's input is not zero, at a random input in float64 and eval mode. Every layer of patterns is
    taken to have a shortcut; a module is taken as it is (a block has its own).

    Args:
        layers: patterns on the grid (row-major), layouts of H W tokens, or modules (B, H, W, dim) -> the same; mixed
            at will.
        grid: (H, W) or one int. Memory and time grow with (H W)^2; 32 x 32 is a second.
        dim: channels that the modules take, needed when there are any.
        names: of the layers, for pictures; by default their classes.
        seed: of the modules' input.

    Raises:
        TypeError, ValueError: a layer that is none of these, or does not keep the map's shape.

    >>> from foveate.patterns import Grid, Windows
    >>> reach = explain_window([Windows((8, 8), 4), Windows((8, 8), 4, shift=2), Grid((8, 8), 2)], 8)
    >>> [round(share, 2) for share in reach.share()]
    [0.25, 0.56, 1.0]
    >>> reach.field((0, 0), 1).int().sum().item()
    16
    """
    shape = pair("explain_window", "grid", grid)
    if not layers:
        raise ValueError("explain_window: layers must name at least one layer, got none")
    labels = tuple(type(layer).__name__ for layer in layers) if names is None else tuple(names)
    if len(labels) != len(layers):
        raise ValueError(f"explain_window: one name per layer, got {len(labels)} for {len(layers)} layers")
    cells = shape[0] * shape[1]
    direct, reached = [], []
    through = torch.eye(cells, dtype=torch.bool)
    for layer in layers:
        if isinstance(layer, nn.Module):
            if dim is None:
                raise ValueError(
                    "explain_window: dim, the channels of the map, is needed where layers are modules"
                )
            step = _asked(layer, shape, dim, seed)
        elif isinstance(layer, (Pattern, BlockLayout)):
            layout = layer.layout(cells) if isinstance(layer, Pattern) else layer
            if (layout.q_len, layout.k_len) != (cells, cells):
                raise ValueError(
                    f"explain_window: a layout must join {cells} queries and keys, got {layout.q_len}, {layout.k_len}"
                )
            step = layout.to_dense()[0].any(0) | torch.eye(cells, dtype=torch.bool)
        else:
            raise TypeError(
                f"explain_window: layers are patterns, layouts or modules, got {type(layer).__name__}"
            )
        through = (step.float() @ through.float()) > 0
        direct.append(step)
        reached.append(through)
    return WindowReach(shape, torch.stack(direct), torch.stack(reached), labels)


def _asked(layer: nn.Module, shape: tuple[int, int], dim: int, seed: int) -> Tensor:
    """bool (H W, H W): where the gradient of a cell's output with respect to a cell's input is not zero."""
    import copy

    asked = copy.deepcopy(layer).double().eval()
    g = torch.Generator().manual_seed(seed)
    one = torch.randn(1, *shape, dim, generator=g, dtype=torch.float64)
    weights = torch.randn(dim, generator=g, dtype=torch.float64)
    cells = shape[0] * shape[1]
    rows = []
    for start in range(0, cells, BATCH):
        count = min(BATCH, cells - start)
        x = one.expand(count, -1, -1, -1).clone().requires_grad_()
        out = asked(x)
        if out.shape != x.shape:
            raise ValueError(
                f"explain_window: {type(layer).__name__} turned {tuple(x.shape)} into {tuple(out.shape)}; "
                "accepted: the same shape"
            )
        own = out.flatten(1, 2)[torch.arange(count), torch.arange(start, start + count)]  # (count, dim)
        (found,) = torch.autograd.grad((own @ weights).sum(), x)
        rows.append((found != 0).any(3).flatten(1))
    return torch.cat(rows)
