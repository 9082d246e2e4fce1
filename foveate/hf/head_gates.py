"""DuoAttention's gates: which KV heads need the whole context, learned on a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.cache import DuoAttention
from foveate.core.patterns import Sinks, SlidingWindow
from foveate.hf.apply import apply

Example = tuple[Tensor, Tensor]
"""(ids (1, n) int64, supervised (1, n) bool: the positions whose final state must not change)."""


class HeadGates(nn.Module):
    """One number per layer and KV head: 1 = full attention, 0 = sinks and recent tokens only.

        out = a * full + (1 - a) * streaming,   a = clamp(alpha, 0, 1), one per KV head of the layer

    DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (2024).

    >>> gates = HeadGates(2, 4)
    >>> gates.alpha.data[0] = torch.tensor([0.9, 0.1, 0.4, 0.6])
    >>> gates.binarize(threshold=0.5)[0].tolist()
    [True, False, False, True]
    """

    def __init__(self, layers: int, kv_heads: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(layers, kv_heads))

    def mix(self, layer: int, full: Tensor, streaming: Tensor) -> Tensor:
        """(B, H, N, Dv): the two outputs of a layer, mixed per KV head."""
        alpha = self.alpha[layer].clamp(0, 1).to(full.dtype)
        alpha = alpha.repeat_interleave(full.shape[1] // len(alpha)).view(1, -1, 1, 1)  # (1, H, 1, 1)
        return alpha * full + (1 - alpha) * streaming

    def binarize(self, *, sparsity: float | None = None, threshold: float | None = None) -> Tensor:
        """Bool (layers, KV heads), True = retrieval.

        Args:
            sparsity: share of streaming heads over the whole model (the lowest gates; ties by place).
            threshold: or: retrieval where the gate is at least this. Exactly one of the two.
        """
        if (sparsity is None) == (threshold is None):
            raise ValueError("binarize: give sparsity or threshold, not both")
        alpha = self.alpha.detach().clamp(0, 1)
        if threshold is not None:
            return alpha >= threshold
        assert sparsity is not None
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}")
        flat = alpha.reshape(-1)
        streaming = flat.argsort(stable=True)[: round(sparsity * len(flat))]
        out = torch.ones_like(flat, dtype=torch.bool)
        out[streaming] = False
        return out.view_as(alpha)

    def policy(
        self, *, sparsity: float | None = None, threshold: float | None = None, **sizes: int
    ) -> DuoAttention:
        """`foveate.cache.DuoAttention` with these heads; ``sizes``: its sink and recent."""
        unknown = set(sizes) - {"sink", "recent"}
        if unknown:
            raise TypeError(f"policy() has no argument {', '.join(sorted(unknown))}; accepted: sink, recent")
        table = self.binarize(sparsity=sparsity, threshold=threshold)
        return DuoAttention(tuple(map(tuple, table.tolist())), **sizes)

    def save(self, path: str | Path) -> None:
        """Write the gates as safetensors, under a temporary name first."""
        from safetensors.torch import save_file

        path = Path(path)
        save_file({"alpha": self.alpha.detach().cpu().contiguous()}, path.with_name(path.name + ".tmp"))
        path.with_name(path.name + ".tmp").replace(path)

    @staticmethod
    def load(path: str | Path) -> HeadGates:
        """The gates that `save` wrote."""
        from safetensors.torch import load_file

        alpha = load_file(path)["alpha"]
        gates = HeadGates(*alpha.shape)
        gates.alpha.data = alpha
        return gates


def train_head_gates(
    model: PreTrainedModel,
    data: Iterable[Example],
    *,
    sink: int = 128,
    recent: int = 256,
    steps: int = 2000,
    lr: float = 0.02,
    reg: float = 0.05,
    teacher_forced: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> HeadGates:
    """Learn the gates: the mixed model's final states at the supervised positions should equal the full model's.

        loss = mean over supervised positions of ||h_full - h_mixed||^2 / d  +  reg * mean |alpha|

    Only the gates train (AdamW, no weight decay; the rate rises over the first fifth of the steps, falls over the last
    fifth, from and to a tenth of ``lr``); they are clamped to [0, 1] before every step.

    Args:
        model: a decoder-only transformers model; its weights receive no gradient and do not change.
        data: examples, repeated if there are fewer than ``steps``.
        sink, recent: what streaming heads see while learning.
        teacher_forced: the full term of a layer is the full model's output of that layer, detached (as in the release);
            by default it is computed from the mixed model's own states.
        progress: called with the step and its loss.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    examples = list(data)
    if not examples:
        raise ValueError("data has no examples")
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    gates = HeadGates(
        int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads)
    )
    optimiser = torch.optim.AdamW([gates.alpha], lr=lr, weight_decay=0.0)
    fifth = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: max(0.1, min(1.0, (s + 1) / fifth, (steps - s) / fifth))
    )
    body: Any = model.base_model
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    kept: dict[int, Tensor] = {}

    def teach(layer: int, full: Tensor, streaming: Tensor) -> Tensor:
        kept[layer] = full.detach()
        return full

    def learn(layer: int, full: Tensor, streaming: Tensor) -> Tensor:
        return gates.mix(layer, kept[layer] if teacher_forced else full, streaming)

    was_training = model.training
    model.eval()
    try:
        with apply(model, SlidingWindow(recent) | Sinks(sink)) as handle:
            for step in range(steps):
                ids, supervised = examples[step % len(examples)]
                gates.alpha.data.clamp_(0, 1)
                handle._job.mix = teach
                with torch.no_grad():
                    teacher = body(ids, use_cache=False).last_hidden_state[supervised]
                handle._job.mix = learn
                student = body(ids, use_cache=False).last_hidden_state[supervised]
                loss = (teacher - student).float().pow(2).mean() + reg * gates.alpha.abs().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                if progress is not None:
                    progress(step, float(loss.detach()))
    finally:
        model.train(was_training)
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(grad)
    gates.alpha.data.clamp_(0, 1)
    return gates
