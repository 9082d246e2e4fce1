"""Checks of modules: layers (batch, tokens, dim), maps (batch, height, width, dim) and gates (batch, channels, height,
width), each to the same shape; backbones, from images to scores and maps.

`dim` and the channels are heads * head_dim of the check; `grid` gives a map's sides, and those of a backbone's images.

A gate may declare what it multiplies by: a method `weights(x)` and an attribute `weight_range = (low, high)`.

A stateful layer has `initial_state(x)`, the state before the first token for inputs like x; `layer(x, state=s)` takes
the next tokens and returns (out, state after them), without changing s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue.conformance.subject import CUTS, ODD, Subject, demand, places, refused, same

MAPS = ((5, 7), (13, 11))


# ------------------------------------------------------------------------------------------- what modules need
def sizes(s: Subject) -> list[tuple[int, ...]]:
    """Sizes of inputs without batch and channels, those that must be accepted first; others may be refused."""
    if s.check.use == "gate":
        return [*MAPS]
    if s.check.use == "map":
        return [s.check.grid or MAPS[1], *MAPS, (3, 17), (63, 2)]
    if s.check.use == "backbone":
        return [s.check.grid or (64, 64)]
    return [(s.check.tokens,), *((n,) for n in ODD)]


def given(s: Subject, size: tuple[int, ...], batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """A seeded input (batch, tokens, dim), (batch, height, width, dim) or (batch, channels, height, width)."""
    shape = (batch, *size, s.dim)
    if s.check.use in ("gate", "backbone"):
        width = s.dim if s.check.use == "gate" else int(s.check.arguments.get("in_channels", 3))
        shape = (batch, width, *size)
    return s.normal(*shape, dtype=dtype, seed=sum(size))


def module(s: Subject, seed: int = 0, *, stirred: bool = True, **other: Any) -> nn.Module:
    """The module in float64 and eval mode, made under a seed.

    stirred: noise is added to every parameter, so that parts which start at zero take part. other: arguments that
    replace those of the check.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = s.build(**other)
        demand(
            isinstance(made, nn.Module), f"{made!r} is a {type(made).__name__}; accepted: a torch.nn.Module"
        )
        made = made.double().eval()
        if stirred:
            with torch.no_grad():
                for p in made.parameters():
                    p += 0.1 * torch.randn(p.shape).to(p)
    return made


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    demand(isinstance(out, Tensor), f"returned a {type(out).__name__}; a module returns a tensor")
    return out


# --------------------------------------------------------------------------------------------------- the checks
def shape_and_dtype(s: Subject) -> None:
    must = len(MAPS) if s.check.use == "gate" else 1
    for dtype in (torch.float64, torch.float32):
        layer = module(s).to(dtype)
        for number, size in enumerate(sizes(s)):
            x = given(s, size, dtype=dtype)
            out, refusal = refused(lambda layer=layer, x=x: _run(layer, x))
            if out is None:
                demand(number >= must, f"refuses {tuple(x.shape)}, which the check asks for: {refusal}")
                continue
            want = (len(x), layer.num_classes) if s.check.use == "backbone" else tuple(x.shape)
            demand(
                tuple(out.shape) == want,
                f"{tuple(x.shape)} became {tuple(out.shape)}; accepted: "
                f"{want if s.check.use == 'backbone' else 'the same shape'}",
            )
            demand(out.dtype == dtype, f"{dtype} became {out.dtype}")
            demand(
                bool(torch.isfinite(out).all()),
                f"{tuple(x.shape)}: not finite at {places(~torch.isfinite(out))}",
            )


def batch_rows(s: Subject) -> None:
    layer = module(s)
    x = given(s, sizes(s)[0], batch=3)
    together = _run(layer, x)
    for b in range(3):
        same(f"batch row {b} alone, in eval mode", _run(layer, x[b : b + 1]), together[b : b + 1])


def state_dict_round_trip(s: Subject) -> None:
    one, other = module(s, 0), module(s, 1)
    x = given(s, sizes(s)[0])
    state = {name: t.clone() for name, t in one.state_dict().items()}
    try:
        other.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise AssertionError(f"the state_dict of one module does not load into another: {error}") from None
    same("a module loaded from another's state_dict", _run(other, x), _run(one, x))


def parameter_gradients(s: Subject) -> None:
    layer = module(s).train()
    x = given(s, sizes(s)[-1 if s.check.use == "gate" else 0]).requires_grad_()
    torch.manual_seed(0)
    out = _run(layer, x)
    (out * s.normal(*out.shape, dtype=out.dtype, seed=5)).sum().backward()
    for name, t in (("the input", x), *layer.named_parameters()):
        if not t.requires_grad:
            continue
        demand(t.grad is not None, f"{name} gets no gradient in train mode")
        grad = t.grad if t.grad is not None else t
        demand(
            bool(torch.isfinite(grad).all()),
            f"the gradient of {name} is not finite at {places(~grad.isfinite())}",
        )
        demand(bool(grad.any()), f"the gradient of {name} is 0 throughout in train mode")


def seeded(s: Subject) -> None:
    one, other = module(s, 3, stirred=False), module(s, 3, stirred=False)
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        demand(torch.equal(a, b), f"made twice under one seed, {name} differs")
    x = given(s, sizes(s)[0])
    outs = []
    for layer in (one.train(), other.train()):
        torch.manual_seed(4)
        outs.append(_run(layer, x))
    demand(
        torch.equal(*outs),
        f"run twice in train mode under one seed, the result differs at {places(outs[0] != outs[1])}",
    )


def eval_deterministic(s: Subject) -> None:
    layer = module(s)
    x = given(s, sizes(s)[0])
    one, other = _run(layer, x), _run(layer, x)
    demand(torch.equal(one, other), f"run twice in eval mode, the result differs at {places(one != other)}")


def parameter_count(s: Subject) -> None:
    want = s.cost.evaluate("parameters", **s.check.symbols)
    found = {name: p.numel() for name, p in module(s).named_parameters()}
    demand(
        sum(found.values()) == want,
        f"has {sum(found.values())} parameters {found}; cost.parameters = {s.cost.parameters} gives {want:g} for "
        f"{dict(s.check.symbols)}",
    )


def inputs_unchanged(s: Subject) -> None:
    for mode in (False, True):
        x = given(s, sizes(s)[0])
        before = x.clone()
        _run(module(s).train(mode), x)
        demand(torch.equal(x, before), f"the module wrote into its input, at {places(x != before)}")


def strides(s: Subject) -> None:
    layer = module(s)
    x = given(s, sizes(s)[0])
    turned = x.transpose(1, -1).contiguous().transpose(1, -1)
    same("a non-contiguous input", _run(layer, turned), _run(layer, x))


# ------------------------------------------------------------------------------------- what tags bring to layers
def prefix_causality(s: Subject) -> None:
    layer, n = module(s), s.check.tokens
    x = given(s, (n,))
    full = _run(layer, x)
    for p in (cut for cut in CUTS if cut < n):
        changed = torch.cat([x[:, :p], 1 - 2 * x[:, p:]], 1)
        same(f"tokens from {p} on changed: the first {p}", _run(layer, changed)[:, :p], full[:, :p])
        out = refused(lambda p=p: _run(layer, x[:, :p]))[0]
        if out is not None:
            same(f"the first {p} of {n} tokens alone", out, full[:, :p])


def permutation(s: Subject) -> None:
    layer, n = module(s), s.check.tokens
    x = given(s, (n,))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    same("permuted tokens", _run(layer, x[:, order]), _run(layer, x)[:, order])


def segments(s: Subject) -> None:
    layer, n = module(s), s.check.tokens
    demand(
        hasattr(layer, "initial_state"),
        f"tagged stateful, but {type(layer).__name__} has no initial_state(x)",
    )
    x = given(s, (n,))
    full = _run(layer, x)
    for ends in ([n], [*(cut for cut in CUTS if cut < n), n], list(range(1, min(n, 23) + 1))):
        state, start, parts = layer.initial_state(x), 0, []  # pyright: ignore[reportCallIssue]
        for end in ends:
            found = layer(x[:, start:end], state=state)
            demand(
                isinstance(found, tuple) and len(found) == 2,
                f"with state= it returned a {type(found).__name__}; accepted: (out, state)",
            )
            same("the same state twice", layer(x[:, start:end], state=state)[0], found[0])
            parts.append(found[0])
            state, start = found[1], end
        same(f"{len(ends)} segments ending at {ends[:7]}", torch.cat(parts, 1), full[:, : ends[-1]])


# ------------------------------------------------------------------------------------------------------ backbones
def maps(s: Subject) -> None:
    size = sizes(s)[0]
    x = given(s, size)
    whole: Any = module(s)
    found = whole.forward_features(x)
    demand(
        isinstance(found, list) and len(found) == len(whole.channels) == len(whole.strides),
        f"forward_features returned {len(found)} maps; channels are {whole.channels}, strides {whole.strides}",
    )
    for number, (got, width, stride) in enumerate(zip(found, whole.channels, whole.strides, strict=True)):
        want = (len(x), width, *(-(-n // stride) for n in size))
        demand(
            tuple(got.shape) == want,
            f"map {number} of images {size} is {tuple(got.shape)}; stride {stride} and {width} channels give {want}",
        )
    same("forward, against forward_head(forward_features)", whole(x), whole.forward_head(found))
    state = whole.state_dict()
    options: tuple[dict[str, Any], ...] = ({"features_only": True}, {"num_classes": 0})
    for other in options:
        part: Any = module(s, 1, stirred=True, **other)
        lacks = set(part.state_dict()) - set(state)
        demand(not lacks, f"made with {other} it has {sorted(lacks)} besides")
        part.load_state_dict({name: t for name, t in state.items() if name in part.state_dict()})
        if "features_only" in other:
            got = part(x)
            demand(
                isinstance(got, list),
                f"with features_only it returned a {type(got).__name__}, not a list of maps",
            )
            for number, (one, want) in enumerate(zip(got, found, strict=True)):
                same(f"map {number} with features_only", one, want)
        else:
            got = part(x)
            demand(
                isinstance(got, Tensor) and got.ndim == 2 and len(got) == len(x),
                f"with num_classes=0 it returned {tuple(got.shape)}; accepted: pooled features (batch, channels)",
            )


def any_size(s: Subject) -> None:
    layer = module(s)
    for size in ((61, 67), (97, 53)):
        out, refusal = refused(lambda size=size: _run(layer, given(s, size)))
        if out is None:
            demand(
                refusal.startswith("ValueError") and any(c.isdigit() for c in refusal),
                f"refuses images of {size} without naming sizes that it takes: {refusal}",
            )
        else:
            demand(bool(torch.isfinite(out).all()), f"images of {size} give what is not finite")


# ---------------------------------------------------------------------------------------------------------- gates
def weight_range(s: Subject) -> None:
    gate = module(s)
    low, high = getattr(gate, "weight_range", (-math.inf, math.inf))
    weigh = getattr(gate, "weights", None)
    if weigh is None:
        demand(not hasattr(gate, "weight_range"), "has a weight_range, but no method weights(x)")
        return
    for size in MAPS:
        for factor in (1.0, 100.0):
            x = given(s, size) * factor
            got = weigh(x)
            wrong = ~((got >= low) & (got <= high))
            demand(not bool(wrong.any()), f"weights of {size} maps leave [{low}, {high}] at {places(wrong)}")
            try:
                torch.broadcast_shapes(got.shape, x.shape)
            except RuntimeError:
                demand(
                    False,
                    f"weights(x) has shape {tuple(got.shape)}, which does not broadcast to {tuple(x.shape)}",
                )


SHARED = (
    shape_and_dtype,
    batch_rows,
    state_dict_round_trip,
    parameter_gradients,
    seeded,
    eval_deterministic,
    parameter_count,
    inputs_unchanged,
    strides,
)
LAYERS = {f.__name__: f for f in (*SHARED, prefix_causality, permutation, segments)}
BACKBONES = {f.__name__: f for f in (*SHARED, maps, any_size)}
MAP_LAYERS = {f.__name__: f for f in SHARED}
GATES = {f.__name__: f for f in (*SHARED, weight_range)}
