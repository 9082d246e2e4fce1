"""Timing in turns: everyone is measured once per round, so that a machine that slows down slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from foveate.catalogue.lab.lab import Lab
from foveate.catalogue.record import Figure


@dataclass(frozen=True)
class Times:
    """Seconds of each arm: `first` call, then one per round."""

    first: dict[str, float]
    rounds: dict[str, list[float]]

    def median(self, arm: str) -> float:
        return statistics.median(self.rounds[arm])

    def speedup(self, arm: str, base: str, name: str = "") -> Figure:
        """How many times faster `arm` is than `base`: the median of the rounds' ratios, with the range that holds
        the middle 95 % of the median's bootstrap distribution."""
        ratios = [b / a for a, b in zip(self.rounds[arm], self.rounds[base], strict=True)]
        import numpy as np

        drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
        return Figure(name or f"{arm} against {base}", statistics.median(ratios), float(low), float(high),
                      len(ratios), "x")  # fmt: skip


def paired_times(
    lab: Lab, arms: Mapping[str, Callable[[], object]], rounds: int, what: str = "timing"
) -> Times:
    """Time every arm once per round, in turns; the first call of each is kept apart. CUDA work is waited for."""

    def once(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if lab.device != "cpu":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = {name: once(call) for name, call in arms.items()}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in lab.track(range(rounds), what):
        for name, call in arms.items():
            taken[name].append(once(call))
    return Times(first, taken)
