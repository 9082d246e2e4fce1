"""Draw every static pattern on one page: python docs/patterns.py [docs/patterns.png]"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from foveate.core import patterns as P
from foveate.core.patterns.plot import contact_sheet


def examples() -> dict[str, tuple[P.Pattern, int]]:
    """{name: (pattern, length)}, one of each kind and a few combinations."""
    causal = P.Causal()
    grid = (24, 24)
    cells = 24 * 24
    far = torch.rand(256, generator=torch.Generator().manual_seed(0)) < 0.9
    table = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    return {
        "Full": (P.Full(), 256),
        "Causal": (causal, 256),
        "SlidingWindow": (P.SlidingWindow(48), 256),
        "SlidingWindow.symmetric": (P.SlidingWindow.symmetric(49), 256),
        "Causal & (window | sinks)": (causal & (P.SlidingWindow(32) | P.Sinks(16)), 256),
        "Dilated": (P.Dilated(16, 8), 256),
        "Causal & (window | Strided)": (causal & (P.SlidingWindow(16) | P.Strided(16)), 256),
        "Blocked": (P.Blocked(32, before=1, after=1), 256),
        "GlobalTokens | window": (P.GlobalTokens([0, 100]) | P.SlidingWindow.symmetric(17), 256),
        "PrefixLM": (P.PrefixLM(80), 256),
        "Causal & Documents": (causal & P.Documents.from_cu_seqlens([0, 40, 130, 150, 256]), 256),
        "SharedQuestion": (P.SharedQuestion((90, 50, 70, 46)), 256),
        "KeyPadding & Causal": (causal & P.KeyPadding(far), 256),
        "Regions": (P.Regions(torch.arange(256) // 32 % 3, table), 256),
        "PowerOfTwo": (P.PowerOfTwo(), 256),
        "power_attention": (P.power_attention(8, 3, 1), 256),
        "Shards, head 1 of 4": (P.Shards(8, 2, 4, offsets=(0,), require_coverage=False), 256),
        "Random & Causal": (causal & P.Random(0.25, block=16), 256),
        "MaskMod (q ^ k)": (P.MaskMod(lambda b, h, q, k: (q ^ k) % 7 == 0), 256),
        "Neighborhood 1-D": (P.Neighborhood(256, 48), 256),
        "Neighborhood, row-major": (P.Neighborhood(grid, 7), cells),
        "Neighborhood, Hilbert": (P.Neighborhood((32, 32), 9, order="hilbert"), 1024),
        "Neighborhood, Morton": (P.Neighborhood(grid, 7, order="morton"), cells),
        "Neighborhood, tile-major": (P.Neighborhood(grid, 7, order=P.tile_major(grid, 8)), cells),
        "Neighborhood, stride 4": (P.Neighborhood(grid, 8, stride=4, order=P.tile_major(grid, 4)), cells),
        "Neighborhood, dilation 3": (P.Neighborhood(grid, 5, dilation=3), cells),
        "Neighborhood 3-D, causal in time": (
            P.Neighborhood((9, 8, 8), (4, 5, 5), causal=(True, False, False)),
            cells,
        ),
        "Windows (Swin)": (P.Windows(grid, 8), cells),
        "Windows, shifted": (P.Windows(grid, 8, shift=4), cells),
        "Windows, window-major": (P.Windows(grid, 8, order=P.tile_major(grid, 8)), cells),
        "Grid (MaxViT)": (P.Grid(grid, 8), cells),
        "Axial | Axial": (P.Axial(grid, 0) | P.Axial(grid, 1), cells),
        "~SlidingWindow": (~P.SlidingWindow.symmetric(129), 256),
    }


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
    figure = contact_sheet(examples(), columns=7, pixels=1024)
    figure.savefig(path.with_suffix(".tmp.png"), dpi=90)
    os.replace(path.with_suffix(".tmp.png"), path)
    print(f"{path}: {len(examples())} patterns")


if __name__ == "__main__":
    main()
