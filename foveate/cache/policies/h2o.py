"""H2O: the tokens that attention has paid most to so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.cache.policy import Policy
from foveate.cache.view import View


@dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters and recent tokens: a key is scored by the softmax weight it received from all queries so far.

    H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (2023). As in the paper half
    of a budget in tokens is for recent ones unless ``recent=`` says otherwise. Differs: the mean over a group's query
    heads, one decision per KV head. The sums over a prompt cost as much as dense attention (in bounded memory).

    >>> H2O().default_recent(64, 4)
    32
    """

    name: ClassVar[str] = "h2o"
    schedule: ClassVar[str | int] = 1
    needs_keys: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = True

    def default_recent(self, amount: int | float, sinks: int) -> int:
        return 32 if isinstance(amount, float) else max(1, min(amount // 2, amount - sinks))

    def score(self, view: View) -> Tensor:
        return view.mass
