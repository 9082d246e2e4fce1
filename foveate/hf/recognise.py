"""From the mask functions of transformers to patterns whose tiles have a closed form.

transformers composes its masks from a handful of closures (`causal_mask_function`,
`sliding_window_overlay(w)`, `and_masks(...)`, ...). They are identified by name and module and their
parameters are read from the closure. What is not identified stays a function, evaluated element by element:
slower to lay out, equally exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.patterns import Causal, KeyPadding, Pattern, SlidingWindow
from foveate.hf.rule import Rule
from foveate.hf.sets import RuleFunction, SameGroup

HOME = "transformers.masking_utils"


@dataclass(frozen=True)
class Known:
    """A mask function that says itself which pattern (over the window) it is."""

    pattern: Pattern

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError("a Known rule is laid out, never evaluated")


@dataclass(frozen=True)
class Window:
    """Where a call sits: its queries start at q_offset, the first k_len keys (kv_offset onwards) are used."""

    q_len: int
    k_len: int
    q_offset: int
    kv_offset: int
    rows: int

    @property
    def aligned(self) -> bool:
        """The last query sits at the last key, so bottom-right alignment gives true distances."""
        return self.q_offset + self.q_len == self.kv_offset + self.k_len

    @property
    def end(self) -> int:
        return max(self.q_offset + self.q_len, self.kv_offset + self.k_len)


def kind_of(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """Name of a transformers mask function and the variables it closes over; ("", {}) for anything else."""
    if getattr(function, "__module__", None) != HOME:
        return "", {}
    name = function.__qualname__.removesuffix(".<locals>.inner_mask")
    name = name.removesuffix(".<locals>.and_mask").removesuffix(".<locals>.or_mask")
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return name, {n: c.cell_contents for n, c in zip(names, cells, strict=True)}


def conjuncts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions whose intersection `function` is."""
    name, bound = kind_of(function)
    if name == "and_masks":
        return [leaf for part in bound["mask_functions"] for leaf in conjuncts(part)]
    return [function]


def is_causal(function: Callable[..., Any]) -> bool:
    """Certainly no query sees a later key (so keys behind the last query can be left out)."""
    for part in conjuncts(function):
        name, bound = kind_of(part)
        if name == "causal_mask_function":
            return True
        if name == "or_masks" and all(is_causal(f) for f in bound["mask_functions"]):
            return True
    return False


def reach_of(rule: Rule) -> int | None:
    """The sliding window of a rule, in keys with the query's own; None without one."""
    found = [kind_of(part) for part in conjuncts(rule.function)]
    return min(
        (int(bound["sliding_window"]) for name, bound in found if name == "sliding_window_overlay"),
        default=None,
    )


def window_of(rule: Rule) -> Window:
    """Geometry after dropping keys that a causal rule cannot reach (the unwritten end of a static cache)."""
    k_len = rule.kv_len
    if is_causal(rule.function):
        k_len = min(k_len, max(rule.q_offset + rule.q_len - rule.kv_offset, 1))
    return Window(rule.q_len, k_len, rule.q_offset, rule.kv_offset, rule.batch)


def pattern_of(rule: Rule, window: Window) -> Pattern | None:
    """The model's own rule, padding included, as a pattern over the window; None = everything."""
    parts = [_lower(f, window, rule.vmap, rule.device) for f in _without_remaps(rule.function)]
    padding = real_keys(rule, window)
    return _intersection([*parts, None if padding is None else KeyPadding(padding)])


def _intersection(parts: list[Pattern | None]) -> Pattern | None:
    kept = [p for p in parts if p is not None]
    if Causal() in kept:  # causal and a half plane: a window
        behind = [p.before for p in kept if isinstance(p, SlidingWindow) and p.before is not None]
        if behind:
            kept = [
                SlidingWindow(min(behind) + 1),
                *(p for p in kept if not isinstance(p, (Causal, SlidingWindow))),
            ]
    whole: Pattern | None = None
    for part in kept:
        whole = part if whole is None else whole & part
    return whole


def real_keys(rule: Rule, window: Window) -> Tensor | None:
    """Bool (B, k_len), or None when every key is a real token."""
    if rule.padding is None:
        return None
    real = rule.padding[:, window.kv_offset : window.kv_offset + window.k_len]
    if real.shape[1] < window.k_len:
        real = torch.nn.functional.pad(real, (0, window.k_len - real.shape[1]))
    if bool(real.all()):
        return None
    if real.shape[0] > 1 and bool((real == real[:1]).all()):
        real = real[:1]
    return real.contiguous()


def left_pads(rule: Rule) -> tuple[int, ...]:
    """Padding tokens before the first real one, per row (0 for a row of padding only)."""
    if rule.padding is None or bool(rule.padding[:, 0].all()):
        return (0,) * rule.batch
    real = rule.padding
    first = torch.where(real.any(1), real.to(torch.int8).argmax(1), 0)
    return tuple(first.expand(rule.batch).tolist())


def _lower(function: Callable[..., Any], window: Window, vmap: bool, device: torch.device) -> Pattern | None:
    """One conjunct as a pattern; None when it forbids nothing here."""
    if isinstance(function, Known):
        return function.pattern
    name, bound = kind_of(function)
    if name == "bidirectional_mask_function":
        return None
    if name == "causal_mask_function" and window.aligned:
        return None if window.q_len == 1 else Causal()
    if name == "sliding_window_overlay" and window.aligned:
        size = int(bound["sliding_window"])
        farthest = window.q_offset + window.q_len - 1 - window.kv_offset  # largest distance of a pair
        if size > farthest:
            return None
        return SlidingWindow(before=size - 1, after=window.end)  # alone, a half plane: no limit ahead
    if name == "sliding_window_bidirectional_overlay" and window.aligned:
        size = int(bound["sliding_window"])
        if size >= window.end - 1:
            return None
        return SlidingWindow(before=size, after=size)
    if name == "chunked_overlay":
        chunk, pads = int(bound["chunk_size"]), bound["left_padding"].reshape(-1, 1)
        if bool((pads == pads[:1]).all()):
            pads = pads[:1]
        at = torch.arange(window.end, device=pads.device)[None]
        ids = torch.div(at - pads, chunk, rounding_mode="floor")
        return _groups(ids - ids.min(), window)
    if name in ("packed_sequence_mask_function", "blockwise_overlay"):
        ids = bound["packed_sequence_mask" if name[0] == "p" else "block_sequence_ids"]
        if ids.shape[1] >= window.end:
            if bool((ids == ids[:1]).all()):
                ids = ids[:1]
            ids = ids.to(torch.int64)
            return _groups(ids if name[0] == "b" else ids - ids.min(), window)
    if name == "or_masks":
        parts = [_all(f, window, vmap, device) for f in bound["mask_functions"]]
        if any(p is None for p in parts):
            return None
        whole = parts[0]
        for part in parts[1:]:
            assert whole is not None
            assert part is not None
            whole = whole | part
        return whole
    return RuleFunction(function, window.q_offset, window.kv_offset, window.rows, vmap, str(device))


def _all(function: Callable[..., Any], window: Window, vmap: bool, device: torch.device) -> Pattern | None:
    return _intersection([_lower(f, window, vmap, device) for f in _without_remaps(function)])


def _groups(ids: Tensor, window: Window) -> Pattern | None:
    q_ids = ids[:, window.q_offset : window.q_offset + window.q_len].contiguous()
    k_ids = ids[:, window.kv_offset : window.kv_offset + window.k_len].contiguous()
    first = ids.reshape(-1)[0]
    if int(first) >= 0 and bool((q_ids == first).all()) and bool((k_ids == first).all()):
        return None
    return SameGroup(q_ids, k_ids)


def _without_remaps(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Conjuncts, with rules on per-sequence positions rewritten to rules on plain positions where that is the
    same.

    Packed sequences arrive as `same_sequence(q, k) & rule(position[q], position[k])`. Within a sequence
    positions rise by one, so a rule that depends only on distance gives the same answer on plain indices.
    """
    parts = conjuncts(function)
    packs = [
        kind_of(p)[1]["packed_sequence_mask"]
        for p in parts
        if kind_of(p)[0] == "packed_sequence_mask_function"
    ]
    out = []
    for part in parts:
        name, bound = kind_of(part)
        if (
            name == "remap_positions_for_packed_sequence"
            and packs
            and bound["position_ids"].shape == packs[0].shape
        ):
            inner = conjuncts(bound["mask_function"])
            steps = bound["position_ids"].diff(dim=1) == 1
            joined = packs[0].diff(dim=1) == 0
            if all(kind_of(f)[0] in _BY_DISTANCE for f in inner) and bool((steps | ~joined).all()):
                out.extend(inner)
                continue
        out.append(part)
    return out


_BY_DISTANCE = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
}
