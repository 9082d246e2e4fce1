"""Decoding with a trained organism under a cache policy: what it still finds, and what it costs in bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache as remember
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.bench.subject import load_subject
from foveate.bench.texts import load_text
from foveate.organisms.reader import data

ANSWER = data.DIGITS  # bytes of an answer
ASKED = data.LINE - 1  # bytes of the question's line, answer included

MakeCache = Callable[[Any], Any]
"""A model -> a cache for it; a `foveate.hf.Cache`, or any other that transformers takes."""


@remember
def reader() -> Any:
    """The shipped language model."""
    return load_subject("reader").model


@remember
def held_out() -> bytes:
    """Text that the reader was not trained on."""
    return load_text("stdlib").data


@torch.no_grad()
def read_on(model: Any, ids: Tensor, start: int, make: MakeCache) -> tuple[Tensor, Any]:
    """Prefill ``ids[:start]``, then give the rest one token at a time.

    Args:
        ids: (n,) int64. make: what makes the cache.

    Returns:
        Logits (n - start, vocabulary) that predict ``ids[start:]``, and the cache as it is then.
    """
    cache = make(model)
    try:
        out = [model(ids[None, :start], past_key_values=cache, logits_to_keep=1).logits[0, -1]]
        for at in range(start, len(ids) - 1):
            out.append(model(ids[None, at : at + 1], past_key_values=cache).logits[0, -1])
    finally:
        if hasattr(cache, "release"):
            cache.release()
    return torch.stack(out), cache


def needles(seed: int, length: int, depths: tuple[float, ...], distractors: int = 0) -> list[Tensor]:
    """One question for each depth, each (length,) ids that end with the question and its answer."""
    rng = np.random.default_rng([seed, length])
    asked = [data.needle(length, depth, rng, held_out(), distractors=distractors)[0] for depth in depths]
    return [torch.from_numpy(ids) for ids in asked]


def found(model: Any, question: Tensor, make: MakeCache, *, asked_first: bool = True) -> bool:
    """Whether every byte of the answer is the likeliest one, given those before.

    Args:
        asked_first: the cache is cut after the question was read (it may look at it), else before.
    """
    logits, _ = read_on(model, question, len(question) - (ANSWER if asked_first else ASKED), make)
    return bool((logits[-ANSWER:].argmax(-1) == question[-ANSWER:]).all())


def bits(model: Any, ids: Tensor, start: int, make: MakeCache) -> tuple[float, Any]:
    """Bits per byte of ``ids[start:]`` while decoding, and the cache."""
    logits, cache = read_on(model, ids, start, make)
    nats = torch.nn.functional.cross_entropy(logits.float(), ids[start:])
    return float(nats) / math.log(2), cache


def passage(seed: int, length: int) -> Tensor:
    """(length,) ids of held-out text from a seeded place."""
    text = held_out()
    at = int(np.random.default_rng([seed, length, 7]).integers(len(text) - length))
    return torch.frombuffer(bytearray(text[at : at + length]), dtype=torch.uint8).long()
