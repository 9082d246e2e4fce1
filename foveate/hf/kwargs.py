"""What a model passes to its attention function besides q, k, v and the mask: honoured, known to be harmless,
or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.scores import Bias, Score, SoftCap

# Names that do not change what attention computes here, and why.
HARMLESS = {
    "position_ids": "rotary embedding is already applied",
    "position_embeddings": "rotary embedding is already applied",
    "cache_position": "the mask rule knows the positions",
    "sliding_window": "already part of the mask rule; applying it again would be wrong",
    "use_cache": "the cache is already updated",
    "output_hidden_states": "collected outside attention",
    "output_router_logits": "collected outside attention",
    "return_dict": "shape of the model's output",
    "num_items_in_batch": "scale of a training loss",
    "logits_to_keep": "which logits the model returns",
    "deterministic": "flash-attention backward option",
    "target_dtype": "flash-attention option; q, k and v have their dtype already",
    "is_causal": "read together with the mask",
    "max_length_q": "follows from cu_seq_lens_q",
    "max_length_k": "follows from cu_seq_lens_k",
    "max_seqlen": "follows from cu_seq_lens",
    "labels": "training loss",
    "token_type_ids": "used by the embedding and by the mask rule",
}

# Names that change the result and have no equivalent here, and why.
REFUSED = {
    "indices": "the model selects keys per query itself (an indexer); use its own attention implementation",
    "block_indices": "the model selects key blocks per query itself; use its own attention implementation",
    "cache": "continuous batching pages its keys; use generate() instead",
    "block_table": "continuous batching pages its keys; use generate() instead",
    "head_mask": "head masks are not supported",
    "layer_head_mask": "head masks are not supported",
}


@dataclass(frozen=True)
class Extras:
    """The honoured part of the keyword arguments, in the terms of `foveate.attention`."""

    scores: tuple[Score, ...] = ()
    bias: Tensor | None = None
    sinks: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None


NOTHING = Extras()


def read(kwargs: dict[str, Any], owner: str) -> Extras:
    """Sort the keyword arguments of one attention call.

    Raises:
        ValueError: a keyword that changes the result and cannot be honoured, or one that is not known.
    """
    scores: tuple[Score, ...] = ()
    bias = sinks = cu_q = cu_k = None
    for name, value in kwargs.items():
        if value is None or name in HARMLESS:
            continue
        if name == "softcap":
            scores = (SoftCap(float(value)),)
        elif name in ("s_aux", "sinks"):
            sinks = value.reshape(-1)
        elif name == "position_bias":
            bias = value
        elif name in ("cu_seq_lens_q", "cu_seqlens_q"):
            cu_q = value
        elif name in ("cu_seq_lens_k", "cu_seqlens_k"):
            cu_k = value
        elif name == "output_attentions":
            if value:
                raise ValueError(
                    f"{owner}: output_attentions=True cannot be honoured, attention maps are never formed; "
                    "call .remove() and use attn_implementation='eager' for them"
                )
        elif value is False:
            continue
        elif name in REFUSED:
            raise ValueError(f"{owner}: keyword {name!r} cannot be honoured: {REFUSED[name]}")
        else:
            raise ValueError(
                f"{owner}: unknown attention keyword {name!r} = {_short(value)}; it may change the result, "
                "so it is not dropped. Honoured: softcap, s_aux, sinks, position_bias, cu_seq_lens_q, "
                f"cu_seq_lens_k. Without effect: {', '.join(sorted(HARMLESS))}"
            )
    if (cu_q is None) != (cu_k is None):
        raise ValueError(f"{owner}: cu_seq_lens_q and cu_seq_lens_k must be given together")
    if not scores and bias is None and sinks is None and cu_q is None:
        return NOTHING
    return Extras(scores, bias, sinks, cu_q, cu_k)


def with_bias(extras: Extras, start: int, stop: int, additive: Tensor | None) -> tuple[Score, ...]:
    """All scores of the call for keys [start, stop): the model's, its position bias, the mask's finite
    values."""
    scores = extras.scores
    for bias in (extras.bias, additive):
        if bias is not None:
            scores = (*scores, Bias(bias[..., start:stop] if bias.shape[-1] > 1 else bias))
    return scores


def document_ids(cu: Tensor, length: int) -> Tensor:
    """int64 (length,): which packed sequence each token is in, from cumulative lengths (n + 1,)."""
    if cu.ndim != 1 or int(cu[0]) != 0 or int(cu[-1]) != length:
        raise ValueError(f"cu_seq_lens must rise from 0 to {length}, got {cu.tolist()}")
    at = torch.arange(length, device=cu.device)
    return torch.searchsorted(cu[1:].contiguous(), at, right=True)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
