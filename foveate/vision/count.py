"""What a model costs for one image: multiply-adds of its matrix products and convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foveate.vision.backbone import Backbone


def multiply_adds(
    model: nn.Module, size: int | tuple[int, int] = 224, *, in_channels: int | None = None
) -> int:
    """Multiply-adds of one forward pass of one image, which papers call FLOPs.

    Counts matrix products, convolutions and the pairs that attention visits; not norms, activations, softmax. Runs the
    model in eval mode on zeros, on the device of its parameters: on the meta device nothing is computed.

    Args:
        model: takes (B, in_channels, H, W).
        size: (H, W) or one int.
        in_channels: default: that of a `Backbone`, else 3.

    >>> multiply_adds(nn.Conv2d(3, 8, 4, stride=4), 16) == 4 * 4 * 8 * 3 * 4 * 4
    True
    """
    height, width = (size, size) if isinstance(size, int) else size
    if in_channels is None:
        in_channels = model.in_channels if isinstance(model, Backbone) else 3
    some = next(model.parameters())
    images = torch.zeros(1, in_channels, height, width, dtype=some.dtype, device=some.device)
    training = model.training
    counter = FlopCounterMode(display=False, custom_mapping=_native())
    try:
        with torch.no_grad(), counter:
            model.eval()(images)
    finally:
        model.train(training)
    return counter.get_total_flops() // 2


def _native() -> dict[Any, Any]:
    """The native engine's forward, counted by the pairs of its layout."""
    import foveate.core.engines.native_ops  # noqa: F401  (defines the op)
    from foveate.core.engines.native_library import KINDS
    from foveate.core.layout import BlockLayout

    def pairs(q, k, v, row_ptr, tile_idx, tile_id, dictionary, layout_batch, layout_heads, kind, *rest, **_):
        b, h, n, d = q.shape
        m, e = v.shape[2:]
        if tile_id is None:
            seen = (
                b * h * (sum(max(0, m - n + i + 1) for i in range(n)) if kind == KINDS["causal"] else n * m)
            )
        else:
            arrays = (row_ptr, tile_idx, tile_id, dictionary)
            layout = BlockLayout(n, m, *arrays, batch=layout_batch, heads=layout_heads)
            seen = layout.area * (b // layout_batch) * (h // layout_heads)
        return 2 * seen * (d + e)

    pairs._get_raw = True  # type: ignore[attr-defined]
    return {torch.ops.foveate.native_forward: pairs}
