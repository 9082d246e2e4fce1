"""Mixture-of-head attention in a trained transformers model: each token keeps the heads of its longest queries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from foveate.layers.mixture_of_heads import route_heads_by_query_norm


class HeadMixture:
    """Head choice that is in force on a model until `.remove()` or the end of the `with` block.

    Attributes:
        gates: {layer: (B, N, H)} of the last forward, 0 or 1, detached.
    """

    def __init__(self) -> None:
        self.gates: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._queries: dict[int, Tensor] = {}

    def remove(self) -> None:
        """Take the choice away; the model is as before. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> HeadMixture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply_mixture_of_heads(
    model: PreTrainedModel,
    *,
    shared: int | None = None,
    k: int | None = None,
    layers: Iterable[int] | None = None,
) -> HeadMixture:
    """Multiply each head's output by 0 or 1 just before the output projection; k of the routed heads stay on.

    The router has no weights (`route_heads_by_query_norm` of what q_proj gives), so that a trained model can be tuned
    on with it; the gradient passes the choice straight through. Every head is computed: this is for tuning and
    measuring, it saves nothing.

    Args:
        model: a transformers model whose attention modules have q_proj and o_proj (Llama and its relatives).
        shared: the first heads, always on; default: half of them.
        k: routed heads on for each token; default: a quarter of all heads.
        layers: numbers of the attention modules, in their order in the model; default: all.

    Raises:
        TypeError: not a transformers model. ValueError: no such modules, or numbers out of range.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> with apply_mixture_of_heads(model) as mixture:
    ...     _ = model(torch.arange(10)[None])
    >>> mixture.gates[0].sum(-1).unique().tolist()
    [3.0]
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    heads = int(model.config.get_text_config().num_attention_heads)
    shared = heads // 2 if shared is None else shared
    k = heads // 4 if k is None else k
    if shared < 0 or k < 0 or not 1 <= shared + k <= heads:
        raise ValueError(f"shared + k must lie in [1, {heads}], both >= 0; got {shared} and {k}")
    found: list[Any] = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "o_proj")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention modules with q_proj and o_proj")
    wanted = range(len(found)) if layers is None else sorted(set(layers))
    if not set(wanted) <= set(range(len(found))):
        raise ValueError(f"layers must lie in [0, {len(found) - 1}], got {list(wanted)}")
    mixture = HeadMixture()

    def keep(layer: int):
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            mixture._queries[layer] = out.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, N, D)

        return hook

    def gate(layer: int):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            gates = route_heads_by_query_norm(mixture._queries.pop(layer), shared=shared, k=k)
            mixture.gates[layer] = gates.detach()
            mixed = args[0].unflatten(-1, (heads, -1)) * gates.unsqueeze(-1).to(args[0].dtype)
            return mixed.flatten(-2), *args[1:]

        return hook

    for layer in wanted:
        mixture._hooks.append(found[layer].q_proj.register_forward_hook(keep(layer)))
        mixture._hooks.append(found[layer].o_proj.register_forward_pre_hook(gate(layer)))
    return mixture
