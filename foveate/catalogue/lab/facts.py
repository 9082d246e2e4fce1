"""Associative recall in which a fact is one token: facts stand early in a row, and their kind is asked for later."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.catalogue.lab.lab import Lab
from foveate.catalogue.lab.tasks import IGNORE, generator
from foveate.catalogue.lab.tiny import train


@dataclass(frozen=True)
class Facts:
    """One fact of each kind in the first half of a row; tokens that name a kind ask for its fact.

    Tokens: [0, filler) say nothing; then one per kind, which asks; then kinds * looks facts.

    Args:
        tokens: length of test rows; training rows grow to it over the first half of the training.
        edges: bounds of the distances that are told apart, the last one `tokens`.
        budget: tokens of a training step.
    """

    tokens: int
    edges: tuple[int, ...]
    kinds: int = 8
    looks: int = 4
    filler: int = 8
    budget: int = 1024

    @property
    def vocab(self) -> int:
        return self.filler + self.kinds * (1 + self.looks)

    @property
    def middles(self) -> list[float]:
        """The middle of each range of distances."""
        return [(a + b - 1) / 2 for a, b in itertools.pairwise(self.edges)]

    def rows(
        self, batch: int, length: int, g: torch.Generator, share: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids, targets, places (batch, kinds) of the facts, distance from each place to the fact it may ask for).

        share: of the places after its fact that ask; None: another one in every row.

        >>> ids, targets, place, distance = Facts(32, (1, 32)).rows(2, 32, generator(0), 0.5)
        >>> row, at = (targets != IGNORE).nonzero()[0].tolist()
        >>> (ids[row, at - distance[row, at]] == targets[row, at]).item()
        True
        """
        place = torch.rand(batch, max(self.kinds, length // 2), generator=g).argsort(1)[:, : self.kinds]
        looks = torch.randint(self.looks, (batch, self.kinds), generator=g)
        fact = self.filler + self.kinds + torch.arange(self.kinds) * self.looks + looks
        which = torch.randint(self.kinds, (batch, length), generator=g)
        distance = torch.arange(length) - place.gather(1, which)
        often = torch.rand(batch, 1, generator=g) if share is None else share
        asked = (torch.rand(batch, length, generator=g) < often) & (distance > 0)
        ids = torch.where(
            asked, self.filler + which, torch.randint(self.filler, (batch, length), generator=g)
        )
        targets = torch.where(asked, fact.gather(1, which), IGNORE)
        return ids.scatter(1, place, fact), targets.scatter(1, place, IGNORE), place, distance

    def learn(self, lab: Lab, model: nn.Module, steps: int, seed: int, what: str, lr: float = 4e-3) -> None:
        """Train the model on rows that grow."""

        def batch(step: int) -> tuple[Tensor, Tensor]:
            length = min(self.tokens, 16 * math.ceil(2 * step / steps * self.tokens / 16 + 1e-9))
            ids, targets, *_ = self.rows(max(1, self.budget // length), length, generator(seed, step))
            return ids, targets

        train(lab, model, batch, steps=steps, lr=lr, what=what)

    @torch.no_grad()
    def answered(self, model: nn.Module, count: int, beyond: int) -> tuple[list[float], float, Tensor]:
        """(share of questions answered in each range of distances, share beyond a distance, places of the facts).

        The same `count` rows for every model.
        """
        ids, targets, place, distance = self.rows(count, self.tokens, generator(99), 0.1)
        model.eval()
        right, asked = model(ids).argmax(-1) == targets, targets != IGNORE
        share = lambda seen: float(right[asked & seen].float().mean())  # noqa: E731
        near = [share((distance >= a) & (distance < b)) for a, b in itertools.pairwise(self.edges)]
        return near, share(distance > beyond), place
