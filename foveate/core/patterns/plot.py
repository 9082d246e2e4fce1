"""Pictures of layouts: who may look at whom, element by element and tile by tile.

Both views are drawn from the layout: one pixel per element (or tile) while it fits into `pixels`, otherwise
one per square of them, shaded by the share that is allowed. So nothing on the way to a picture is N x N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.core.layout import TILE, BlockLayout, unpack_bits
from foveate.core.patterns.base import Pattern, as_pattern, integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS = 1024
INK = (0.10, 0.25, 0.48)  # allowed elements, full tiles
MIXED = (0.93, 0.58, 0.20)  # partial tiles
PAPER = (0.96, 0.96, 0.95)


def plot_pattern(pattern: Pattern, q_len: int, k_len: int | None = None, **options: Any) -> Figure:
    """Element and tile view of a pattern; options as in `plot_layout`.

    >>> from foveate.core.patterns import Causal, SlidingWindow
    >>> figure = plot_pattern(Causal() & SlidingWindow(100), 500)
    >>> [axes.get_title() for axes in figure.axes]
    ['elements: 500 x 500, 18 % allowed', 'tiles: 0 full, 21 partial (5 bitmaps), 43 empty']
    """
    options.setdefault("title", repr(pattern))
    return plot_layout(as_pattern(pattern).layout(q_len, k_len), **options)


def plot_layout(
    layout: BlockLayout, *, batch: int = 0, head: int = 0, pixels: int = PIXELS, title: str | None = None
) -> Figure:
    """Element view and tile view side by side, queries downwards, keys to the right.

    Args:
        batch, head: the plane that is drawn.
        pixels: largest number of pixels per axis of a view; memory is at most a few times pixels**2.
        title: printed above.

    Returns:
        a matplotlib Figure (`.savefig(path)` writes it).

    Raises:
        ImportError: without matplotlib, the extra `foveate[viz]`.
    """
    figure = _figure((10, 5.4))
    left, right = figure.subplots(1, 2)
    draw_elements(left, layout, batch=batch, head=head, pixels=pixels)
    draw_tiles(right, layout, batch=batch, head=head, pixels=pixels)
    if title:
        figure.suptitle(title if len(title) < 110 else title[:107] + "...", fontsize=10)
    return figure


def contact_sheet(
    patterns: Mapping[str, tuple[Pattern, int]], *, columns: int = 6, pixels: int = 256
) -> Figure:
    """Many patterns on one page: {name: (pattern, length)}; element views, the first head of each.

    >>> from foveate.core.patterns import Causal, Full
    >>> len(contact_sheet({"full": (Full(), 64), "causal": (Causal(), 64)}, columns=2).axes)
    2
    """
    columns = integer("contact_sheet", "columns", columns, 1)
    rows = max(1, -(-len(patterns) // columns))
    figure = _figure((1.9 * columns, 2.2 * rows))
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for place, (name, (pattern, length)) in zip(axes, patterns.items(), strict=False):
        layout = as_pattern(pattern).layout(length)
        draw_elements(place, layout, pixels=pixels)
        place.set(xticks=[], yticks=[], xlabel="", ylabel="")
        place.set_title(f"{name}\n{length} tokens, {100 * layout.density:.1f} %", fontsize=8)
    for place in axes[len(patterns) :]:
        place.remove()
    return figure


def draw_elements(
    axes: Axes, layout: BlockLayout, *, batch: int = 0, head: int = 0, pixels: int = PIXELS
) -> None:
    """The element view on given matplotlib axes."""
    share, _ = element_shares(layout, batch, head, pixels)
    _show(axes, layout, _mix(share, INK))
    n, m = layout.q_len, layout.k_len
    allowed = int(layout.row_area[batch, head].sum()) / (n * m)
    axes.set_title(f"elements: {n} x {m}, {100 * allowed:.3g} % allowed", fontsize=9)


def draw_tiles(
    axes: Axes, layout: BlockLayout, *, batch: int = 0, head: int = 0, pixels: int = PIXELS
) -> None:
    """The tile view on given matplotlib axes."""
    full, mixed = tile_shares(layout, batch, head, pixels)
    _show(axes, layout, _mix(full, INK, mixed, MIXED), whole_tiles=True)
    _, _, ids = _plane(layout, batch, head)
    whole, part, kinds = int((ids == 0).sum()), int((ids > 0).sum()), len(np.unique(ids[ids > 0]))
    empty = layout.q_tiles * layout.k_tiles - whole - part
    axes.set_title(f"tiles: {whole} full, {part} partial ({kinds} bitmaps), {empty} empty", fontsize=9)


def element_shares(
    layout: BlockLayout, batch: int = 0, head: int = 0, pixels: int = PIXELS
) -> tuple[np.ndarray, int]:
    """(share of allowed pairs per cell, float (rows, columns); elements per side of a cell).

    A cell is one element while both lengths fit into `pixels`; then 2, 4, .. 64 elements, then whole tiles.
    """
    pixels = integer("plot", "pixels", pixels, 1)
    longest = max(layout.q_len, layout.k_len)
    cell = 1
    while cell < TILE and -(-longest // cell) > pixels:
        cell *= 2
    if -(-longest // cell) > pixels:
        cell = TILE * -(-longest // (TILE * pixels))
    row, column, ids = _plane(layout, batch, head)
    per = max(1, TILE // cell)  # cells per side of a tile
    used, ids = np.unique(ids, return_inverse=True)
    words = np.concatenate([np.full((1, TILE), -1), layout.dictionary.cpu().numpy()])[used]
    small = np.empty((len(used), per, per), np.float32)  # allowed pairs per cell of each bitmap
    for start in range(0, len(used), 1024):
        bits = unpack_bits(words[start : start + 1024]).reshape(-1, per, TILE // per, per, TILE // per)
        small[start : start + 1024] = bits.sum(axis=(2, 4))
    if cell <= TILE:
        grid = np.zeros((layout.q_tiles, layout.k_tiles, per, per), np.float32)
        grid[row, column] = small[ids]
        grid = grid.swapaxes(1, 2).reshape(layout.q_tiles * per, layout.k_tiles * per)
    else:
        times = cell // TILE
        grid = np.zeros((-(-layout.q_tiles // times), -(-layout.k_tiles // times)), np.float32)
        np.add.at(grid, (row // times, column // times), small[ids, 0, 0])
    rows, columns = -(-layout.q_len // cell), -(-layout.k_len // cell)
    size = np.full(
        (rows, columns), float(cell * cell), np.float32
    )  # pairs per cell, fewer at the ragged edges
    size[-1] *= (layout.q_len - (rows - 1) * cell) / cell
    size[:, -1] *= (layout.k_len - (columns - 1) * cell) / cell
    return np.minimum(grid[:rows, :columns] / size, 1), cell


def tile_shares(
    layout: BlockLayout, batch: int = 0, head: int = 0, pixels: int = PIXELS
) -> tuple[np.ndarray, np.ndarray]:
    """(share of full tiles, share of partial tiles) per cell, float (rows, columns)."""
    times = -(-max(layout.q_tiles, layout.k_tiles) // integer("plot", "pixels", pixels, 1))
    row, column, ids = _plane(layout, batch, head)
    shape = (-(-layout.q_tiles // times), -(-layout.k_tiles // times))
    shares = []
    for chosen in (ids == 0, ids > 0):
        grid = np.zeros(shape, np.float32)
        np.add.at(grid, (row[chosen] // times, column[chosen] // times), 1)
        shares.append(grid / times**2)
    return shares[0], shares[1]


def _plane(layout: BlockLayout, batch: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(query tile, key tile, id) of the tiles of one batch row and head."""
    batch = integer("plot", "batch", batch, 0, layout.batch - 1)
    head = integer("plot", "head", head, 0, layout.heads - 1)
    first = (batch * layout.heads + head) * layout.q_tiles
    ptr = layout.row_ptr.cpu().numpy()[first : first + layout.q_tiles + 1]
    some = slice(int(ptr[0]), int(ptr[-1]))
    row = np.repeat(np.arange(layout.q_tiles), np.diff(ptr))
    return row, layout.tile_idx.cpu().numpy()[some], layout.tile_id.cpu().numpy()[some]


def _mix(*shares_and_colours: Any) -> np.ndarray:
    """Paper covered by the given shares of colours, float (rows, columns, 3)."""
    paper = np.array(PAPER, np.float32)
    image = np.broadcast_to(paper, (*shares_and_colours[0].shape, 3)).copy()
    for share, colour in zip(shares_and_colours[::2], shares_and_colours[1::2], strict=True):
        strength = (share**0.4)[..., None]  # so that thin lines stay visible
        image += strength * (np.array(colour, np.float32) - paper)
    return np.clip(image, 0, 1)


def _show(axes: Axes, layout: BlockLayout, image: np.ndarray, whole_tiles: bool = False) -> None:
    right, bottom = layout.k_len, layout.q_len
    if whole_tiles:
        right, bottom = layout.k_tiles * TILE, layout.q_tiles * TILE
    axes.imshow(image, extent=(0, right, bottom, 0), interpolation="antialiased", aspect="equal")
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    axes.tick_params(labelsize=7)


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'foveate[viz]'") from error
    return Figure(figsize=size, layout="constrained")
