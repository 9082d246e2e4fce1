"""The mask of a transformers model as a *rule* that occupies no memory.

transformers lets an attention implementation bring its own mask builder. Ours returns a `RuleMask`: a
`torch.Tensor` of shape (B, 1, Q, K) whose storage is one byte (all strides are 0) and which carries the
arguments of the builder. Models hand it through their layers unread, caches and `generate()` see the tensor
that they expect, and `foveate` reads the rule at the other end. Nothing N x N exists.

An operation on the mask that cannot be followed symbolically gives the ordinary boolean mask (True = may
attend), as the `sdpa` implementation would have built it, within a size limit; above the limit it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

DENSE_LIMIT = 1 << 26  # elements a RuleMask may be turned into when a model computes with it


@dataclass(eq=False)
class Rule:
    """Who may look at whom, as transformers says it, with the geometry of one forward call.

    Attributes:
        batch, q_len, kv_len: sizes of the mask.
        q_offset: absolute position of the first query (tokens seen before this call).
        kv_offset: absolute position of the first key (not 0 for caches that dropped old keys).
        function: `f(b, h, q, kv) -> bool`, on absolute positions.
        padding: bool (B, seen) over absolute key positions, True = a real token; None = no padding.
        vmap: the function may not be index based and must be called through `torch.vmap`.
        memo: what was derived from this rule; lives exactly as long as the forward call that made it.
    """

    batch: int
    q_len: int
    kv_len: int
    q_offset: int
    kv_offset: int
    function: Callable[..., Any]
    padding: Tensor | None = None
    vmap: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    def to_dense(self) -> Tensor:
        """Bool (B, 1, Q, K); refuses above `DENSE_LIMIT` elements."""
        size = self.batch * self.q_len * self.kv_len
        if size > DENSE_LIMIT:
            raise ValueError(
                f"the model computes with its attention mask, which would need {size} elements; "
                f"the limit is {DENSE_LIMIT}. Use the model's own attention at this length."
            )
        mask = sdpa_mask(
            batch_size=self.batch,
            q_length=self.q_len,
            kv_length=self.kv_len,
            q_offset=self.q_offset,
            kv_offset=self.kv_offset,
            mask_function=self.function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=self.vmap,
            device=self.device,
        )
        assert mask is not None  # skipping is switched off
        return mask


class RuleMask(Tensor):
    """A zero-storage bool tensor (B, 1, Q, K) that carries a `Rule`."""

    rule: Rule

    @staticmethod
    def of(rule: Rule) -> RuleMask:
        flat = torch.zeros((), dtype=torch.bool, device=rule.device)
        mask = flat.expand(rule.batch, 1, rule.q_len, rule.kv_len).as_subclass(RuleMask)
        mask.rule = rule
        return mask

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        followed = _follow(func, args, kwargs)
        if followed is not NotImplemented:
            return followed
        args = tuple(_dense(a) for a in args)
        return func(*args, **{name: _dense(a) for name, a in kwargs.items()})

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"RuleMask(shape={tuple(self.shape)}, rule={getattr(self, 'rule', None)})"


def _dense(value: Any) -> Any:
    if isinstance(value, RuleMask):
        return value.rule.to_dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(v) for v in value)
    return value


_SAME = {Tensor.contiguous, Tensor.detach, Tensor.clone, Tensor.requires_grad_}
_SIZES = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}
_SIZES |= {Tensor.untyped_storage, Tensor.data_ptr, Tensor.storage_offset, Tensor.type}
_SIZES |= {Tensor.ndimension, Tensor.element_size, Tensor.get_device, Tensor.stride, Tensor.is_contiguous}


def _follow(func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """The result of an operation that leaves a rule a rule (or only asks for sizes), else NotImplemented."""
    mask = args[0] if args else None
    if not isinstance(mask, RuleMask):
        return NotImplemented
    if func in _SAME:
        return mask
    if func in _SIZES or getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return NotImplemented if isinstance(out, Tensor) else out
    if func is Tensor.to:
        return _to(mask, args[1:], kwargs)
    if func is Tensor.__getitem__:
        return _slice(mask, args[1])
    return NotImplemented


def _to(mask: RuleMask, args: tuple, kwargs: dict) -> Any:
    """`.to(device)` and `.to(bool)` keep the rule; any other dtype needs numbers."""
    target = torch.empty(0, dtype=torch.bool, device=mask.device).to(*args, **kwargs)
    if target.dtype != torch.bool:
        return NotImplemented
    if target.device == mask.device:
        return mask
    rule = mask.rule
    padding = None if rule.padding is None else rule.padding.to(target.device)
    return RuleMask.of(replace(rule, padding=padding, device=target.device, memo={}))


def _slice(mask: RuleMask, index: Any) -> Any:
    """`mask[..., a:b]`, `mask[:, :, a:b, c:d]` and the like are the same rule on a smaller window."""
    index = index if isinstance(index, tuple) else (index,)
    if index.count(Ellipsis) == 1 if all(not isinstance(i, Tensor) for i in index) else False:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (4 - len(index) + 1) + index[at + 1 :]
    index = index + (slice(None),) * (4 - len(index))
    if len(index) != 4 or not all(isinstance(i, slice) for i in index):
        return NotImplemented
    spans = [i.indices(size) for i, size in zip(index, mask.shape, strict=True)]
    starts, sizes = [s[0] for s in spans], [s[1] - s[0] for s in spans]
    if any(s[2] != 1 for s in spans) or min(sizes) < 1 or sizes[:2] != list(mask.shape[:2]):
        return NotImplemented
    rule = mask.rule
    if (rule.q_len, rule.kv_len) == (sizes[2], sizes[3]):
        return mask
    return RuleMask.of(
        replace(
            rule,
            q_len=sizes[2],
            kv_len=sizes[3],
            q_offset=rule.q_offset + starts[2],
            kv_offset=rule.kv_offset + starts[3],
            memo={},
        )
    )


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **unused: Any,
) -> RuleMask:
    """The mask builder registered with transformers (`AttentionMaskInterface`).

    `unused` holds what only concerns the shortcuts of other implementations: allow_is_causal_skip,
    allow_is_bidirectional_skip, local_size (already part of the function), dtype, config.
    """
    from transformers.masking_utils import causal_mask_function

    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must have 2 or 4 dimensions, got shape {tuple(attention_mask.shape)}"
        )
    if device is None:
        device = attention_mask.device if attention_mask is not None else "cpu"
    # static caches hand out the tensor that they advance in place: read it now
    return RuleMask.of(
        Rule(
            batch=int(batch_size),
            q_len=int(q_length),
            kv_len=int(kv_length),
            q_offset=int(q_offset),
            kv_offset=int(kv_offset),
            function=mask_function or causal_mask_function,
            padding=None if attention_mask is None else attention_mask.to(torch.bool),
            vmap=use_vmap,
            device=torch.device(device),
        )
    )
