"""Attention on every engine that accepts a request, against the float64 definition, within the project's budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from foveate.catalogue.conformance.budget import assert_grads_within_budget, assert_within_budget
from foveate.catalogue.conformance.subject import demand
from foveate.core import engines
from foveate.core.attention import attention
from foveate.core.normalizers import ReLU, Sigmoid, as_normalizer
from foveate.core.request import make_request

QUICK = ("native", "sdpa", "reference")  # flex compiles for seconds
COARSE = 2.0  # of the budget in bfloat16, where tiles of weights are rounded before they meet the values


def accepting(names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, who: Any, **options: Any) -> list[str]:
    """Those of the engines that run this request, with log-sum-exp where the normaliser has one."""
    request = make_request(q, k, v, who, **options)
    return [name for name in names if engines.refusal(name, request, False) is None]


def attend(q: Tensor, k: Tensor, v: Tensor, who: Any, **options: Any) -> Tensor:
    """`attention` on the engine that `auto` picks."""
    out = attention(q, k, v, who, **options)
    assert isinstance(out, Tensor)
    return out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    who: Any,
    allowed: Tensor | None,
    names: tuple[str, ...] = QUICK,
    **options: Any,
) -> int:
    """Every engine of `names` that accepts; returns how many did.

    Args:
        allowed: the pairs that `who` stands for, bool, broadcastable to (B, H, N, M).
        options: score, normalizer and sinks of `attention`.
    """
    told = _told(options)
    ran = accepting(names, q, k, v, who, **options)
    for name in ran:
        request = make_request(q, k, v, who, **options)
        with_lse = not isinstance(told["normalizer"], (Sigmoid, ReLU))
        with_lse = with_lse and engines.refusal(name, request, True) is None
        found = attention(q, k, v, who, engine=name, return_lse=with_lse, **options)
        out, lse = found if isinstance(found, tuple) else (found, None)
        with _named(name, q):
            factor = COARSE if q.dtype == torch.bfloat16 and name == "native" else 1.0
            assert_within_budget(out, q, k, v, allowed, lse=lse, factor=factor, **told)
    return len(ran)


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    who: Any,
    allowed: Tensor | None,
    names: tuple[str, ...] = QUICK,
    **options: Any,
) -> int:
    """The gradient of every input and of every tensor of the scores; returns how many engines gave them."""
    scores = _scores(options)
    leaves: dict[Any, Tensor] = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in (("q", q), ("k", k), ("v", v))
    }
    made = []
    for number, score in enumerate(scores):
        wide = (
            torch.float64 if q.dtype == torch.float64 else None
        )  # else sums over float32 parameters are in float32
        held = {name: t.detach().clone().to(wide).requires_grad_() for name, t in score.tensors.items()}
        demand(
            len(held) <= 1,
            f"{type(score).__name__} holds {list(held)}; the budget knows one tensor per score",
        )
        for t in held.values():
            leaves["score", number] = t
        made.append(dataclasses.replace(score, **held) if held else score)
    if options.get("sinks") is not None:
        leaves["sinks"] = options["sinks"] = options["sinks"].detach().clone().requires_grad_()
    if made:
        options["score"] = tuple(made)
    told = _told(options)
    g = torch.Generator().manual_seed(11)
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=g).to(q.dtype)
    inputs = leaves["q"], leaves["k"], leaves["v"]
    ran = accepting(names, *inputs, who, **options)
    for name in ran:
        out = attention(*inputs, who, engine=name, **options)
        demand(
            isinstance(out, Tensor) and out.requires_grad, f"engine {name}: the result carries no gradient"
        )
        assert isinstance(out, Tensor)
        found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
        with _named(name, q):
            grads = {
                key: torch.zeros_like(leaf) if grad is None else grad
                for (key, leaf), grad in zip(leaves.items(), found, strict=True)
            }
            factor = COARSE if q.dtype == torch.bfloat16 and name == "native" else 1.0
            assert_grads_within_budget(grads, q, k, v, allowed, dout=dout, factor=factor, **told)
    return len(ran)


def _scores(options: dict[str, Any]) -> tuple:
    score = options.get("score")
    return () if score is None else score if isinstance(score, tuple) else (score,)


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """The same options as the budgets take them."""
    normalizer = as_normalizer(options.get("normalizer", "softmax"))
    return {"scores": _scores(options), "sinks": options.get("sinks"), "normalizer": normalizer}


class _named:
    """Puts the engine and the dtype in front of what an error says."""

    def __init__(self, name: str, q: Tensor) -> None:
        self.where = f"engine {name}, {str(q.dtype).removeprefix('torch.')}, {tuple(q.shape)}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, AssertionError):
            raise AssertionError(f"{self.where}: {error}") from error
