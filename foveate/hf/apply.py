"""`apply`: restrict the attention of a transformers model, and undo it."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from foveate.core.patterns import Pattern
from foveate.core.selectors.base import Selector
from foveate.hf.forward import NAME, PHASES, SITES, Job, Site, Tally, forward
from foveate.hf.report import Check, CheckError, LayerReport, Report
from foveate.hf.rule import build_mask

AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, build_mask)

_DISPATCH = "ALL_ATTENTION_FUNCTIONS.get_interface("
_CROSS = re.compile(r"cross|encdec|enc_dec|encoder_attn|encoder_attention", re.IGNORECASE)
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def apply(
    model: PreTrainedModel,
    policy: str | Pattern | Selector,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    phase: str = "both",
    *,
    engine: str = "auto",
) -> Handle:
    """Run a model's attention through `foveate.attention`, restricted by a policy.

    What is executed is the model's own rule (causal, sliding window, chunks, packed sequences, padding) AND
    the policy. The rule arrives symbolically and becomes an exact layout; no N x N mask is formed. It is laid
    out once per forward and shared by the layers that have the same rule.

    Args:
        model: a transformers model whose attention dispatches through `AttentionInterface`. Its
            self-attention is restricted; cross-attention always follows the model's own rule.
        policy: "dense" (the model's own rule only), a `Pattern`, or a `Selector`. Positions in a pattern are
            those of the sequence, whatever the cache holds: with left padding they count from each row's
            first real token.
        layers: layer numbers to restrict (`module.layer_idx`; for modules without one, their order in the
            model). In an encoder-decoder model they count within each stack. Default: all. The others run the
            model's own rule.
        heads: query heads to restrict; the others run the model's own rule. Default: all.
        phase: "prefill" (several queries, or the first token), "decode" (one query on a filled cache; the last
            piece of a chunked prefill is one too when it holds a single token) or "both".
        engine: passed to `foveate.attention`.

    Returns:
        A `Handle`: use it as a context manager or call `.remove()`.

    Raises:
        TypeError: not a transformers model, or a policy of another kind.
        ValueError: the model cannot switch its attention (the message says why), a policy is already applied
            to it (remove that one first: policies do not nest), or an argument is out of range.

    Keyword arguments that a model passes to its attention are honoured (soft-cap, learned sinks, position
    bias, packed sequence lengths), known to be without effect, or refused with a ValueError at the call; none
    is dropped.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch, foveate as fv
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> with fv.hf.apply(model, fv.patterns.SlidingWindow(4)) as handle:
    ...     _ = model(torch.arange(10)[None])
    >>> round(handle.report().density, 3)  # 34 of 55 pairs
    0.618
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if isinstance(policy, tuple):
        from foveate.core.patterns import as_pattern

        policy = as_pattern(policy)
    if not isinstance(policy, (Pattern, Selector)) and policy != "dense":
        raise TypeError(f"policy must be 'dense', a Pattern or a Selector, got {policy!r}")
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}; got {phase!r}")
    _require_switchable(model)
    found = _attention_modules(model)
    if not found:
        raise ValueError(
            _cannot(type(model).__name__, model, "no module of it calls its attention through it")
        )
    for path, module, _, _ in found:
        if module in SITES:
            raise ValueError(
                f"a policy is already applied to {type(model).__name__} (module {path}); "
                "call its .remove() first"
            )
    wanted = _numbers("layers", layers)
    known = {layer for _, _, layer, _ in found}
    if wanted is not None and not wanted <= known:
        raise ValueError(
            f"layers must lie in {_ranges(known)} for {type(model).__name__}; got {sorted(wanted - known)}"
        )
    head_set = _numbers("heads", heads)
    total = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if head_set is not None and isinstance(total, int) and max(head_set) >= total:
        raise ValueError(f"heads must lie in [0, {total}) for {type(model).__name__}; got {sorted(head_set)}")

    job = Job(policy=None if isinstance(policy, str) else policy, heads=head_set, phase=phase, engine=engine)
    switch = _Switch(model)
    try:
        switch.on()
        for path, module, layer, kind in found:
            SITES[module] = Site(path, layer, kind, wanted is None or layer in wanted, job)
    except BaseException:
        for _, module, _, _ in found:
            SITES.pop(module, None)
        switch.off()
        raise
    skipped = tuple(sorted({type(m).__name__ for _, m in _bystanders(model)}))
    return Handle(model, job, switch, skipped)


class Handle:
    """A policy that is in force on a model until `.remove()` or the end of the `with` block.

    The counts of `.report()` stay available afterwards.
    """

    def __init__(self, model: PreTrainedModel, job: Job, switch: _Switch, skipped: tuple[str, ...]):
        self._model = weakref.ref(model)
        self._name = type(model).__name__
        self._job = job
        self._switch = switch
        self._skipped = skipped
        self._sites = [SITES[m] for m in model.modules() if m in SITES and SITES[m].job is job]
        self._active = True
        # a model that dies with its policy still on gives its config back
        self._finalizer = weakref.finalize(model, switch.off)

    @property
    def active(self) -> bool:
        """Whether the policy is in force."""
        return self._active

    def remove(self) -> None:
        """Restore the model's previous attention implementation. Calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        self._finalizer.detach()
        model = self._model()
        if model is not None:
            for module in model.modules():
                site = SITES.get(module)
                if site is not None and site.job is self._job:
                    del SITES[module]
        self._switch.off()

    def __enter__(self) -> Handle:
        if not self._active:
            raise ValueError("this handle was removed; call apply() again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def report(self) -> Report:
        """Calls, tokens, measured density and layout bytes per attention module."""
        policy = "dense" if self._job.policy is None else repr(self._job.policy)
        if self._job.heads is not None:
            policy += f" on heads {sorted(self._job.heads)}"
        layers = [
            LayerReport(
                s.path,
                s.layer,
                s.kind,
                s.tally.calls,
                s.tally.restricted,
                s.tally.tokens,
                s.tally.area,
                s.tally.rule_area,
                s.tally.nbytes,
            )
            for s in self._sites
        ]
        return Report(self._name, policy, self._job.phase, tuple(layers), self._skipped)

    def reset(self) -> None:
        """Set the counts of `report()` back to zero."""
        for site in self._sites:
            site.tally = Tally()

    def check(self, inputs: Mapping[str, Any] | Tensor, *, tolerance: float | None = None) -> Check:
        """Compare the model with its eager attention and through foveate with the dense policy (the full
        budget).

        It proves that the model's masks, scales, soft-caps, sinks and biases are understood, on these inputs,
        before any restriction. The policy stays in force; counts are not touched; dropout is off during the
        check.

        Args:
            inputs: what the model takes: token ids, or a mapping such as a tokenizer returns.
            tolerance: largest absolute difference accepted; default 1e-4 in float32, looser in 16-bit types.

        Raises:
            CheckError: the difference is larger. ValueError: the handle was removed.
        """
        model = self._model()
        if not self._active or model is None:
            raise ValueError("check() needs an active handle; this one was removed")
        if isinstance(inputs, Tensor):
            inputs = {model.main_input_name: inputs}
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        limit = TOLERANCE.get(dtype, 1e-4) if tolerance is None else float(tolerance)
        training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            with torch.no_grad():
                with self._switch.eager():
                    name, eager = _main_output(model(**inputs))
                self._job.suspended = True
                _, ours = _main_output(model(**inputs))
        finally:
            self._job.suspended = False
            for module in training:
                module.training = True
        keep = _real_positions(model, inputs, eager)
        error = (eager.double() - ours.double()).abs()[keep]
        # the maximum of a NaN is not reliable: say so instead
        worst = float("nan") if not bool(torch.isfinite(error).all()) else float(error.max())
        result = Check(worst, float(error.mean()), int(keep.sum()), name, limit)
        if not worst <= limit:
            raise CheckError(
                f"{self._name}: {name} differs from eager attention by up to {worst:.3g} on "
                f"{result.positions} positions (tolerance {limit:.3g}); this model's attention is not "
                "reproduced, do not trust a policy on it"
            )
        return result

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        return f"<foveate.hf.Handle {self._name} {self._job.policy or 'dense'} {state}>"


# ------------------------------------------------------------------------------------- switching
@dataclass
class _Held:
    """A config object whose implementation name we changed, for everybody who shares it."""

    config: Any
    before: str | None
    users: int


_HELD: dict[int, _Held] = {}


class _Switch:
    """Sets the implementation name on the configs of a model and restores it. Configs may be shared between
    models, so the first user stores the previous name and the last one restores it."""

    def __init__(self, model: PreTrainedModel):
        self._configs = _configs(model)
        self._before = [c._attn_implementation for c in self._configs]
        self._model = weakref.ref(model)
        self._is_on = False

    def on(self) -> None:
        model = self._model()
        assert model is not None
        for config, before in zip(self._configs, self._before, strict=True):
            held = _HELD.setdefault(id(config), _Held(config, before, 0))
            held.users += 1
        self._is_on = True
        model.set_attn_implementation(NAME)
        missed = [type(c).__name__ for c in self._configs if c._attn_implementation != NAME]
        if missed:
            raise ValueError(
                f"{type(model).__name__} kept its attention implementation on {', '.join(missed)}"
            )

    def off(self) -> None:
        if not self._is_on:
            return
        self._is_on = False
        for config in self._configs:
            held = _HELD[id(config)]
            held.users -= 1
            if held.users == 0:
                config._attn_implementation_internal = held.before
                del _HELD[id(config)]

    @contextmanager
    def eager(self) -> Iterator[None]:
        try:
            for config in self._configs:
                config._attn_implementation_internal = "eager"
            yield
        finally:
            for config in self._configs:
                config._attn_implementation_internal = NAME


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config object that decides an implementation: of the model, its submodels, and their
    sub-configs."""
    found: dict[int, Any] = {}
    waiting = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while waiting:
        config = waiting.pop(0)
        if id(config) in found:
            continue
        found[id(config)] = config
        subs = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
        waiting.extend(c for c in subs if c is not None)
    return list(found.values())


# --------------------------------------------------------------------------------- finding modules
def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


_dispatches: dict[type, bool] = {}


def _dispatching(cls: type) -> bool:
    """Whether instances of this module class call `ALL_ATTENTION_FUNCTIONS.get_interface`."""
    known = _dispatches.get(cls)
    if known is None:
        stop = (nn.Module, PreTrainedModel, object)
        known = any(_DISPATCH in _source(c) for c in cls.__mro__ if c not in stop)
        _dispatches[cls] = known and not issubclass(cls, PreTrainedModel)
    return _dispatches[cls]


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module, int, str]]:
    """(path, module, layer number, kind) of every module that dispatches its attention."""
    found = []
    counts: dict[str, int] = {}
    for path, module in model.named_modules():
        if not _dispatching(type(module)):
            continue
        kind = "cross" if _CROSS.search(path) or "CrossAttention" in type(module).__name__ else "self"
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            # order among its siblings: the same path with other numbers in it
            stack = re.sub(r"\d+", "#", path)
            layer = counts.get(stack, 0)
            counts[stack] = layer + 1
        found.append((path, module, layer, kind))
    return found


def _bystanders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules named like attention that neither dispatch nor contain one that does."""
    out = []
    for path, module in model.named_modules():
        if "Attention" not in type(module).__name__ or isinstance(module, PreTrainedModel):
            continue
        if not any(_dispatching(type(m)) for m in module.modules()):
            out.append((path, module))
    return out


def _require_switchable(model: PreTrainedModel) -> None:
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            name = type(module).__name__ + (f" (at {path})" if path else "")
            reason = f"{type(module).__module__} does not use it"
            if not _source(type(module)):
                reason = f"the source of {type(module).__name__} cannot be read, so transformers cannot tell"
            raise ValueError(_cannot(name, module, reason))


def _cannot(name: str, model: nn.Module, reason: str) -> str:
    own = sorted({type(m).__name__ for _, m in _bystanders(model)})
    text = f"{name} cannot switch its attention implementation: transformers dispatches attention through "
    text += f"AttentionInterface, and {reason}"
    if own:
        text += f"; {', '.join(own)} compute attention inside their own forward"
    return text


# -------------------------------------------------------------------------------------- small helpers
def _numbers(name: str, given: Iterable[int] | None) -> frozenset[int] | None:
    if given is None:
        return None
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be an iterable of ints or None, got {given!r}")
    items = list(given)
    if any(isinstance(i, bool) or not isinstance(i, int) for i in items):
        raise TypeError(f"{name} must be an iterable of ints or None, got {items!r}")
    if not items or min(items) < 0:
        raise ValueError(f"{name} must be a non-empty set of numbers >= 0, got {items!r}")
    return frozenset(items)


def _ranges(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"[0, {high}]" if numbers == set(range(low, high + 1)) and low == 0 else str(sorted(numbers))


def _main_output(output: Any) -> tuple[str, Tensor]:
    for name in ("logits", "last_hidden_state", "prediction_logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return name, value
    raise ValueError(f"check() compares logits or last_hidden_state; {type(output).__name__} has neither")


def _real_positions(model: PreTrainedModel, inputs: Mapping[str, Any], output: Tensor) -> Tensor:
    """Bool over the leading (batch, length) axes of the output: the positions that hold real tokens."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    mask = inputs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and tuple(mask.shape) == tuple(output.shape[:2]):
        return mask.to(device=output.device, dtype=torch.bool)
    return torch.ones(output.shape[: min(2, output.ndim)], dtype=torch.bool, device=output.device)
