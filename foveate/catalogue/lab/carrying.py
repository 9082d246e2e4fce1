"""Training a small model to carry a pass key under a set of pairs, and how far it carries."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from foveate.catalogue.lab.lab import Lab
from foveate.catalogue.lab.tasks import generator, passkey, reminders
from foveate.catalogue.lab.tiny import Attend, TinyLM, accuracy, train
from foveate.core.attention import attention
from foveate.core.patterns import Pattern


@dataclass(frozen=True)
class Carrying:
    """A model of `layers` x `heads` that learns `reminders` and is asked by `passkey`, each arm in the same way.

    Rows grow from 16 tokens to `tokens` over the first half of the training, `budget` tokens a step throughout: on
    long rows alone, models often do not find what to look for.

    Args:
        tokens: length of training and test rows.
        edges: bounds of the distances that are tested; an answer is known by `edges[i]` <= distance < `edges[i + 1]`.
        steps: of training.
        budget: tokens of a training step.
        positions: of `TinyLM`; "none" where the arms rotate queries and keys by themselves.
    """

    tokens: int
    layers: int
    heads: int
    edges: tuple[int, ...]
    steps: int = 400
    lr: float = 3e-3
    vocab: int = 16
    dim: int = 64
    budget: int = 1024
    positions: str = "rotary"

    @property
    def middles(self) -> list[float]:
        """The middle of each range of distances."""
        return [(a + b - 1) / 2 for a, b in itertools.pairwise(self.edges)]

    def found(self, lab: Lab, name: str, arm: Pattern | Attend, seed: int) -> list[float]:
        """Share of 128 pass keys found in each range of distances, after training; the same ones for every arm.

        arm: a set of pairs, or a function of q, k and v.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cast(Tensor, attention(q, k, v, arm)) if isinstance(arm, Pattern) else arm(q, k, v)

        def learn() -> list[float]:
            torch.manual_seed(seed)
            model = TinyLM(self.vocab, self.dim, self.heads, self.layers, attend, positions=self.positions)
            steps = lab.pick(self.steps, 5)
            train(lab, model, lambda step: self.rows(step / steps, generator(seed, step)), steps=steps, lr=self.lr,
                  what=f"{name}, seed {seed}")  # fmt: skip
            return [self._test(lab, model, *ends) for ends in itertools.pairwise(self.edges)]

        return lab.once(f"{name}-{seed}".replace(" ", "_"), learn)

    def rows(self, share: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows of a step, after a share of the training."""
        length = min(self.tokens, 16 * math.ceil(share * 2 * self.tokens / 16 + 1e-9))
        return reminders(max(1, self.budget // length), length, self.vocab, g)

    def _test(self, lab: Lab, model: TinyLM, near: int, end: int) -> float:
        g = generator(near, end)
        rows = lab.pick(128, 16)
        distance = torch.randint(near, end, (rows,), generator=g)
        return accuracy(lab, model, [passkey(rows, self.tokens, distance, self.vocab, g)])

    def far(self, found: list[float], beyond: int) -> float:
        """The mean over the ranges that begin beyond a distance."""
        return statistics.mean(f for f, near in zip(found, self.edges[:-1], strict=True) if near > beyond)
