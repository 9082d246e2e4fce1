"""An independent definition of "the model's own rule AND a policy": plain softmax with a boolean mask per
layer and head.

It shares nothing with foveate: transformers builds its dense `sdpa` mask, the policy is a function of
absolute positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

_state: dict = {}


def _mask(**arguments):
    _state["pads"] = None
    if arguments.get("attention_mask") is not None:
        _state["pads"] = (arguments["attention_mask"].long().cumsum(1) == 0).sum(1)
    _state["q_offset"], _state["kv_offset"] = int(arguments["q_offset"]), int(arguments["kv_offset"])
    arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(**arguments)


def _attend(module, q, k, v, attention_mask, scaling=None, dropout=0.0, **unused):
    batch, heads, n, _ = q.shape
    groups, m = heads // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    seen = attention_mask.expand(batch, heads, n, m).clone()
    decoding = n == 1 and _state["q_offset"] > 0
    in_phase = _state["phase"] in ("both", "decode" if decoding else "prefill")
    if in_phase and (_state["layers"] is None or module.layer_idx in _state["layers"]):
        pads = torch.zeros(batch, dtype=torch.long) if _state["pads"] is None else _state["pads"]
        i = torch.arange(n)[None, None, :, None] + _state["q_offset"] - pads[:, None, None, None]
        j = torch.arange(m)[None, None, None, :] + _state["kv_offset"] - pads[:, None, None, None]
        allowed = _state["policy"](i, j).expand(batch, heads, n, m).clone()
        if _state["heads"] is not None:
            others = [h for h in range(heads) if h not in _state["heads"]]
            allowed[:, others] = True
        seen &= allowed
    logits = (q @ k.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2).contiguous(), weights


AttentionInterface.register("oracle", _attend)
AttentionMaskInterface.register("oracle", _mask)


@contextmanager
def oracle(
    model,
    policy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    phase: str = "both",
):
    """`policy(i, j)`: may the query at position i see the key at position j (positions without left
    padding)?"""
    _state.update(policy=policy, layers=layers, heads=heads, phase=phase)
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
