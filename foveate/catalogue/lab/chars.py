"""Text for tiny language models: bytes of the standard library, for training and held out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from foveate.catalogue.lab.tasks import generator

VOCAB = 128  # ASCII


@functools.cache
def text(held_out: bool) -> Tensor:
    """uint8 tokens below `VOCAB`; the held-out files are the same as the organism `reader`'s."""
    from foveate.organisms.reader.data import stdlib_text

    data = torch.frombuffer(bytearray(stdlib_text(held_out=held_out)), dtype=torch.uint8)
    return data[data < VOCAB]


def rows(batch: int, length: int, g: torch.Generator, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, next ids), both int64 (batch, length), at random places."""
    data = text(held_out)
    starts = torch.randint(0, len(data) - length - 1, (batch, 1), generator=g)
    got = data[starts + torch.arange(length + 1)].long()
    return got[:, :-1], got[:, 1:]


def bits(
    model: torch.nn.Module, length: int, *, batches: int = 8, batch: int = 16, last: int | None = None
) -> float:
    """Held-out bits per byte of ids -> logits, the same rows for every model.

    Args:
        last: count only this many last positions of each row; None: all.
    """
    model.eval()
    total = 0.0
    with torch.no_grad():
        for i in range(batches):
            ids, targets = rows(batch, length, generator(77, length, i), held_out=True)
            logits = model(ids).float()
            if last is not None:
                logits, targets = logits[:, -last:], targets[:, -last:]
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    return total / batches / 0.6931471805599453
