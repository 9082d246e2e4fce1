"""Gates of SeerAttention for a transformers model: distilled from its own attention, without changing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foveate.core.layout import TILE, BlockLayout
from foveate.core.selectors.base import Selector
from foveate.hf.apply import apply
from foveate.layers.seer_attention import (
    BlockGate,
    Rotary,
    gate_loss,
    pooled_attention_target,
    unrotated,
)

LOSS_SCALE = 10.0


@dataclass(frozen=True)
class Lesson:
    """What one layer's gate learns from one batch: pooled q and k, the block map to predict, and the tokens."""

    q: Tensor  # (B, H, blocks, poolings of q * D)
    k: Tensor  # (B, Hkv, blocks, poolings of k * D)
    target: Tensor  # (B, H, blocks, blocks)
    tokens: int


@dataclass(frozen=True, eq=False)
class _Listener(Selector):
    """Keeps everything (the model runs densely), and notes what the gates learn from."""

    gates: Mapping[int, BlockGate]
    rotary: Rotary | None
    layer: int = -1
    found: dict[int, Lesson] = field(default_factory=dict)

    def at_layer(self, layer: int) -> _Listener:
        return replace(self, layer=layer)

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        n = q.shape[2]
        if self.layer in self.gates:
            gate = self.gates[self.layer]
            if not is_causal or k.shape[2] != n:
                raise ValueError(
                    f"gates are distilled from causal attention over whole sequences; got {n} queries, {k.shape[2]} "
                    f"keys, causal={is_causal}"
                )
            target = pooled_attention_target(q, k, gate.block, scale=scale)
            if self.rotary is not None:
                q, k = unrotated(q, self.rotary, 0), unrotated(k, self.rotary, 0)
            self.found[self.layer] = Lesson(*gate.pool(q, k), target, n)
        everything = torch.ones(-(-n // TILE), -(-k.shape[2] // TILE), dtype=torch.bool, device=q.device)
        return BlockLayout.from_blocks(everything, n, k.shape[2], causal=is_causal)


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The module of a model that makes its rotary tables, (like, positions) -> cos, sin.

    Raises:
        ValueError: none, or several that differ in kind.
    """
    found = [m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb"]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} modules named rotary_emb; accepted: one. Pass rotary="
        )
    return found[0]


def make_gates(
    model: PreTrainedModel, *, block: int = 64, width: int | None = None, **settings: Any
) -> dict[int, BlockGate]:
    """An untrained gate for every layer, sized and based on the model's configuration.

    Args:
        width: d_g; default the model's head dimension (then queries have no matrix).
        settings: further arguments of `BlockGate`.

    >>> from foveate import organisms
    >>> gates = make_gates(organisms.load("reader")[0])
    >>> sorted(gates), sum(p.numel() for gate in gates.values() for p in gate.parameters())
    ([0, 1, 2, 3], 98304)
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if "theta" not in settings:
        rope = getattr(config, "rope_parameters", None) or {}
        settings["theta"] = float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)
    made = {
        layer: BlockGate(heads, kv_heads, head_dim, block, head_dim if width is None else width, **settings)
        for layer in range(config.num_hidden_layers)
    }
    return {layer: gate.to(model.device) for layer, gate in made.items()}


@torch.no_grad()
def gate_lessons(
    model: PreTrainedModel, ids: Tensor, gates: Mapping[int, BlockGate], *, rotary: Rotary | None = None
) -> dict[int, Lesson]:
    """Run a model densely on ids (B, N) and note, per layer of `gates`, what its gate should predict.

    The block maps are streamed (no N x N map) and small, so lessons can be kept. No padding.
    """
    if ids.ndim != 2 or ids.dtype.is_floating_point:
        raise ValueError(f"ids must be token numbers (batch, tokens), got {ids.dtype} {tuple(ids.shape)}")
    listener = _Listener(gates, rotary_of(model) if rotary is None else rotary)
    options = {"logits_to_keep": 1} if "logits_to_keep" in model.forward.__code__.co_varnames else {}
    with apply(model, listener):
        model(input_ids=ids.to(model.device), use_cache=False, **options)
    missing = sorted(set(gates) - set(listener.found))
    if missing:
        raise ValueError(f"{type(model).__name__} has no layers {missing}, for which there are gates")
    return listener.found


def lesson_loss(
    gates: Mapping[int, BlockGate], lessons: Mapping[int, Lesson], drop_first: float = 0.25
) -> Tensor:
    """The sum of the layers' `gate_loss`."""
    losses = [
        gate_loss(gates[i].score(one.q, one.k, one.tokens, one.tokens), one.target, drop_first)
        for i, one in lessons.items()
    ]
    return torch.stack(losses).sum()


def distill_gates(
    model: PreTrainedModel,
    data: Iterable[Tensor | Mapping[int, Lesson]],
    steps: int = 500,
    lr: float = 1e-3,
    *,
    gates: Mapping[int, BlockGate] | None = None,
    warm_up: int = 20,
    drop_first: float = 0.25,
    rotary: Rotary | None = None,
    log: Callable[[int, float], None] | None = None,
) -> dict[int, BlockGate]:
    """Train gates to predict the block maps of a frozen model's own attention.

        loss = 10 sum over layers of KL(T || softmax(S)), AdamW without decay, a warm-up and a cosine to zero

    Only gates have gradients; the model runs densely without any, and its weights are not touched.

    Args:
        data: batches of token ids (B, N) without padding, or what `gate_lessons` made of them. A sequence is gone
            through again and again, each batch seen by the model only once: their lessons are kept. Another iterable
            must last for `steps` batches.
        gates: the gates to train on; default `make_gates(model)`.
        log: called with (step, loss).

    Returns:
        {layer: gate}, in eval mode.

    Source: SeerAttention (2024): its recipe for gates after pre-training, which takes 500 steps of 16 x 64K tokens.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"distill_gates: steps must be an int >= 1, got {steps!r}")
    gates = dict(make_gates(model) if gates is None else gates)
    tables = rotary_of(model) if rotary is None else rotary
    parameters = [p for gate in gates.values() for p in gate.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    kept: dict[int, Mapping[int, Lesson]] = {}
    rest = None if isinstance(data, Sequence) else iter(data)
    for step in range(steps):
        if rest is not None:
            try:
                batch = next(rest)
            except StopIteration:
                raise ValueError(f"distill_gates: data ended after {step} of {steps} batches") from None
            lessons = (
                batch if isinstance(batch, Mapping) else gate_lessons(model, batch, gates, rotary=tables)
            )
        else:
            assert isinstance(data, Sequence)
            number = step % len(data)
            if number not in kept:
                batch = data[number]
                kept[number] = (
                    batch if isinstance(batch, Mapping) else gate_lessons(model, batch, gates, rotary=tables)
                )
            lessons = kept[number]
        warm = min(1.0, (step + 1) / max(warm_up, 1))
        done = max(0, step - warm_up) / max(1, steps - warm_up)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        loss = LOSS_SCALE * lesson_loss(gates, lessons, drop_first)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if log is not None:
            log(step, float(loss.detach()))
    return {layer: gate.eval() for layer, gate in gates.items()}
