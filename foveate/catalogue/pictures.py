"""Pictures of mechanisms, computed by their code on a small input and kept as data that pages and terminals draw.

Two kinds. `pairs`: who may look at whom, one frame per setting of the controls (a window, a dilation), each frame a
bit matrix queries x keys. `map`: one matrix of weights in 256 steps.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from foveate.core.layout import BlockLayout
    from foveate.core.patterns.base import Pattern

LIMIT = 256  # tokens per side of a picture


def pairs(
    caption: str,
    frames: Sequence[tuple[Mapping[str, Any], Pattern | BlockLayout | Tensor, str]],
    *,
    tokens: int = 48,
    grid: Sequence[int] | None = None,
    head: int = 0,
) -> dict[str, Any]:
    """A picture of (query, key) pairs.

    Args:
        caption: what to look at, one sentence.
        frames: (setting, pattern or layout or bool matrix, code shown below). Settings have the same names in every
            frame and make a full grid of their values; one frame without controls has the setting {}.
        tokens: queries and keys of a pattern.
        grid: (height, width) when the tokens lie on a grid: a page then shows the keys of a query there too.
        head: the head shown of a pattern whose heads differ.

    >>> from foveate.patterns import Causal
    >>> pairs("Every query sees the past.", [({}, Causal(), "Causal()")], tokens=8)["frames"][0]["density"]
    0.5625
    """
    import torch

    from foveate.core.layout import BlockLayout
    from foveate.core.patterns.base import Pattern

    controls: dict[str, list[Any]] = {}
    made = []
    for setting, source, code in frames:
        if isinstance(source, Pattern):
            source = source.layout(tokens)
        if isinstance(source, BlockLayout):
            dense = source.to_dense()
            source = dense[0, min(head, dense.shape[1] - 1)]
        if not isinstance(source, torch.Tensor) or source.dtype != torch.bool or source.dim() != 2:
            raise TypeError(
                f"pairs: frame {dict(setting)} must be a pattern, a layout or a bool matrix, got {source!r}"
            )
        if max(source.shape) > LIMIT:
            raise ValueError(f"pairs: {tuple(source.shape)} pairs; accepted: at most {LIMIT} tokens a side")
        for name, value in setting.items():
            if value not in controls.setdefault(name, []):
                controls[name].append(value)
        made.append({
            "setting": dict(setting),
            "code": code,
            "queries": source.shape[0],
            "keys": source.shape[1],
            "density": round(float(source.float().mean()), 6),
            "bits": _bits(source.numpy()),
        })  # fmt: skip
    expected = 1
    for values in controls.values():
        expected *= len(values)
    if len(made) != expected or any(set(f["setting"]) != set(controls) for f in made):
        raise ValueError(
            f"pairs: {len(made)} frames for controls {controls}; accepted: one for every combination"
        )
    if grid is not None and any(f["keys"] != grid[0] * grid[1] for f in made):
        raise ValueError(f"pairs: grid {tuple(grid)} does not hold the keys")
    return {
        "kind": "pairs",
        "caption": caption,
        "controls": [{"name": name, "values": values} for name, values in controls.items()],
        "frames": made,
        "grid": None if grid is None else list(grid),
    }


def weights(
    caption: str, matrix: Tensor, *, rows: str = "query", columns: str = "key", code: str = ""
) -> dict[str, Any]:
    """A picture of a matrix of weights >= 0 (rows x columns); the largest is drawn darkest."""
    if matrix.dim() != 2 or max(matrix.shape) > LIMIT:
        raise ValueError(f"weights: matrix {tuple(matrix.shape)}; accepted: 2-D, at most {LIMIT} a side")
    top = float(matrix.max())
    levels = (matrix / (top or 1.0)).clamp(0, 1).mul(255).round().byte()
    return {
        "kind": "map",
        "caption": caption,
        "rows": rows,
        "columns": columns,
        "code": code,
        "shape": list(matrix.shape),
        "largest": round(top, 6),
        "levels": base64.b64encode(levels.numpy().tobytes()).decode(),
    }


def _bits(dense: np.ndarray) -> str:
    import numpy as np

    return base64.b64encode(np.packbits(dense, bitorder="little").tobytes()).decode()


def unpack(frame: Mapping[str, Any]) -> list[list[bool]]:
    """The pairs of a frame, row by row; plain Python, so that a terminal can draw without numpy."""
    data = base64.b64decode(frame["bits"])
    n, m = frame["queries"], frame["keys"]
    flat = [bool(data[i >> 3] >> (i & 7) & 1) for i in range(n * m)]
    return [flat[i * m : (i + 1) * m] for i in range(n)]


def text(picture: Mapping[str, Any], width: int = 48) -> str:
    """A picture in characters, two rows to a line; the first frame of `pairs`.

    >>> frame = {"bits": "DwAA", "queries": 2, "keys": 2}
    >>> print(text({"kind": "pairs", "frames": [frame]}))
    ██
    """
    if picture["kind"] == "pairs":
        rows = unpack(picture["frames"][0])
        step = max(1, -(-len(rows[0]) // width))
        rows = [[any(any(r[j : j + step]) for r in rows[i : i + step]) for j in range(0, len(rows[0]), step)]
                for i in range(0, len(rows), step)]  # fmt: skip
        if len(rows) % 2:
            rows.append([False] * len(rows[0]))
        shapes = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
        lines = [
            "".join(shapes[a, b] for a, b in zip(rows[i], rows[i + 1], strict=True))
            for i in range(0, len(rows), 2)
        ]
    else:
        n, m = picture["shape"]
        data = base64.b64decode(picture["levels"])
        step = max(1, -(-m // width))
        shades = " ░▒▓█"
        lines = []
        for i in range(0, n, 2 * step):
            cells = (data[i * m + j] for j in range(0, m, step))
            lines.append("".join(shades[min(4, c * 5 // 256)] for c in cells))
    return "\n".join(line.rstrip() for line in lines)
