"""The native engine as `torch.library` custom ops, with fake, autograd and vmap rules.

Defined by their schemas: the decorator torch.library.custom_op imports the compiler at the first call, which takes over
a second. First derivatives only; a second one raises and names the reference engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from foveate.core.engines import native_library as library
from foveate.core.engines.native_library import Scores, Where
from foveate.core.request import EngineRefusal

_REST = (
    "Tensor? row_ptr, Tensor? tile_idx, Tensor? tile_id, Tensor? dictionary, int layout_batch, int layout_heads, "
    "int kind, int normalizer, float scale, float softcap, float shift, float dropout_p, Tensor? seed, Tensor? sinks, "
    "Tensor? temperature, Tensor? bias, Tensor? table, Tensor? q_code, Tensor? k_code"
)
_FORWARD, _BACKWARD = "foveate::native_forward", "foveate::native_backward"
_EXTRAS = ("sinks", "temperature", "bias", "table")  # what may want a gradient besides q, k and v
_SCORE_FIELDS = tuple(field.name for field in fields(Scores))


def forward(q: Tensor, k: Tensor, v: Tensor, where: Where, scores: Scores) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) in the dtype of q and lse (B, H, N) float32, empty where the normaliser has none."""
    return _picked(torch.ops.foveate.native_forward.default, _Forward)(q, k, v, *flat(where, scores))


def _picked(op: Callable, function: type[torch.autograd.Function]) -> Callable:
    """The op; inside torch.func transforms, which know no autograd rules of custom ops, the function that wraps it."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return op
    return function.apply


def flat(where: Where, scores: Scores) -> tuple:
    """The trailing arguments of both ops."""
    return (
        where.row_ptr, where.tile_idx, where.tile_id, where.dictionary, where.batch, where.heads, where.kind,
        *(getattr(scores, field) for field in _SCORE_FIELDS),
    )  # fmt: skip


def _unflat(rest: tuple) -> tuple[Where, Scores]:
    row_ptr, tile_idx, tile_id, dictionary, batch, heads, kind, *scores = rest
    return Where(kind, row_ptr, tile_idx, tile_id, dictionary, batch, heads), Scores(*scores)


# --------------------------------------------------------------------------------------------------------- forward
def _run_forward(q, k, v, *rest):
    return library.call(q, k, v, *_unflat(rest))


def _fake_forward(q, k, v, *rest):
    _, scores = _unflat(rest)
    lse = q.new_empty(q.shape[:3] if scores.normalizer == 0 else (0,), dtype=torch.float32)
    return library.empty_out(q, v), lse


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, *(t for t in rest if isinstance(t, Tensor)))
    ctx.rest = tuple(Tensor if isinstance(t, Tensor) else t for t in rest)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *grads):
    dout, dlse = grads
    q, k, v, out, lse, *saved = ctx.saved_tensors
    tensors = iter(saved)
    rest = tuple(next(tensors) if t is Tensor else t for t in ctx.rest)
    _, scores = _unflat(rest)
    needs = dict(zip(_SCORE_FIELDS, ctx.needs_input_grad[10:], strict=True))
    wanted = [bool(needs[name]) and getattr(scores, name) is not None for name in _EXTRAS]
    if dout is None:
        dout = torch.zeros_like(out)
    backward = _picked(torch.ops.foveate.native_backward.default, _Backward)
    found = backward(dout, dlse, q, k, v, out, lse, *rest, wanted)
    extras = {name: grad for name, grad, want in zip(_EXTRAS, found[3:], wanted, strict=True) if want}
    return (*found[:3], *(None for _ in range(7)), *(extras.get(name) for name in _SCORE_FIELDS))


# -------------------------------------------------------------------------------------------------------- backward
def _run_backward(dout, dlse, q, k, v, out, lse, *rest):
    *rest, wanted = rest
    where, scores = _unflat(tuple(rest))
    names = [name for name, want in zip(_EXTRAS, wanted, strict=True) if want]
    grads = library.call_backward(dout, dlse, q, k, v, out, lse, where, scores, names)
    nothing = [q.new_empty(0, dtype=torch.float32) for _ in _EXTRAS]  # no output may alias another
    extras = [
        grad if (grad := getattr(grads, name)) is not None else empty
        for name, empty in zip(_EXTRAS, nothing, strict=True)
    ]
    return (grads.q, grads.k, grads.v, *extras)


def _fake_backward(dout, dlse, q, k, v, out, lse, *rest):
    *rest, wanted = rest
    _, scores = _unflat(tuple(rest))
    extras = [
        torch.empty_like(getattr(scores, name), memory_format=torch.contiguous_format)
        if want
        else q.new_empty(0, dtype=torch.float32)
        for name, want in zip(_EXTRAS, wanted, strict=True)
    ]
    return (*(t.new_empty(t.shape) for t in (q, k, v)), *extras)


def _nothing_to_save(ctx, inputs, output) -> None:
    """torch.func transforms demand a context even where nothing is kept."""


def _no_second_derivative(ctx, *grads):
    raise EngineRefusal(
        "the native engine has first derivatives only; for a second one use engine='reference'"
    )


# ------------------------------------------------------------------------------------------------------------ vmap
def _vmap_rule(op: Callable, big: int, alone: int) -> Callable:
    """One call over a longer batch where only the first `big` arguments are mapped and every output but the last
    `alone` keeps its batch; else one call per element.
    """

    def rule(info, in_dims, *args):
        where, scores = _unflat(tuple(args[big : big + 19]))
        if scores.dropout_p and info.randomness != "same":
            raise EngineRefusal(
                "dropout under vmap runs on the native engine with randomness='same' only (one seed for all); "
                f"got randomness={info.randomness!r}"
            )
        size = info.batch_size
        small = [t for t in (scores.temperature, scores.bias) if t is not None]
        mapped = [isinstance(t, Tensor) and dim is not None for t, dim in zip(args, in_dims, strict=True)]
        shared = not any(mapped[big:]) and all(t.shape[0] == 1 for t in small)
        wants = bool(alone) and any(args[-1])
        if shared and where.batch == 1 and not scores.dropout_p and not wants and scores.normalizer == 0:
            folded = [
                None if t is None else _front(t, dim, size).flatten(0, 1)
                for t, dim in zip(args[:big], in_dims[:big], strict=True)
            ]
            found = op(*folded, *args[big:])
            batched = len(found) - alone
            out = [t.unflatten(0, (size, -1)) for t in found[:batched]]
            return (*out, *found[batched:]), (*(0 for _ in out), *(None for _ in range(alone)))
        rows = [
            op(*(t.select(dim, n) if on else t for t, dim, on in zip(args, in_dims, mapped, strict=True)))
            for n in range(size)
        ]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(rows[0])

    return rule


class _Forward(torch.autograd.Function):
    """native_forward for torch.func."""

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_differentiate)

    @staticmethod
    def forward(*args):
        return torch.ops.foveate.native_forward.default(*args)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_rule(_Forward.apply, 3, 0)(info, in_dims, *args)


class _Backward(torch.autograd.Function):
    """native_backward for torch.func."""

    setup_context = staticmethod(_nothing_to_save)
    backward = staticmethod(_no_second_derivative)

    @staticmethod
    def forward(*args):
        return torch.ops.foveate.native_backward.default(*args)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_rule(_Backward.apply, 7, 4)(info, in_dims, *args)


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


torch.library.define(_FORWARD, f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD,
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_REST}, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
for _op, _run, _fake in ((_FORWARD, _run_forward, _fake_forward), (_BACKWARD, _run_backward, _fake_backward)):
    torch.library.impl(_op, "CPU", _run)
    torch.library.register_fake(_op, _fake)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _no_second_derivative, setup_context=_nothing_to_save)
torch.library.register_vmap(_FORWARD, _vmap_rule(torch.ops.foveate.native_forward.default, 3, 0))
torch.library.register_vmap(_BACKWARD, _vmap_rule(torch.ops.foveate.native_backward.default, 7, 4))
