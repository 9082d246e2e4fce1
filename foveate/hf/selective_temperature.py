"""Selective temperatures in a transformers model: a few parameters beside it, on its queries and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from foveate.layers.selective_temperature import SelectiveTemperature

NAMES = ("selective_q", "selective_v")


class SelectiveHandle:
    """Temperatures that are in force on a model until `.remove()` or the end of the `with` block.

    Attributes:
        temperatures: the modules, those of the queries and then of the values of each layer.
    """

    def __init__(self) -> None:
        self.temperatures: list[SelectiveTemperature] = []
        self._hooks: list[RemovableHandle] = []
        self._owners: list[tuple[nn.Module, str]] = []

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that were added, to tune with a rate of their own and without weight decay."""
        return [p for tau in self.temperatures for p in tau.parameters()]

    def remove(self) -> None:
        """Take the temperatures away; the model is as before. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        for owner, name in self._owners:
            delattr(owner, name)
        self._hooks, self._owners = [], []

    def __enter__(self) -> SelectiveHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def apply_selective_temperature(
    model: PreTrainedModel,
    *,
    query: bool = True,
    value: bool = True,
    token: bool = True,
    position: str | None = "loglog",
    init: float | None = None,
) -> SelectiveHandle:
    """Multiply the queries and values of every attention module by a `SelectiveTemperature`.

    A factor on what q_proj gives is a factor on the logits of that query, as rotation keeps it; so the attention itself
    is the model's own, and `foveate.hf.apply` works besides. The new parameters are part of the model (`selective_q`,
    `selective_v` of its attention modules) and are saved with it. Positions are the model's `position_ids`.

    Args:
        model: a transformers model whose attention modules have q_proj, v_proj and o_proj and take position ids (Llama
            and its relatives). One that normalises queries after q_proj would take the factor away, and is refused.
        query, value: which have a temperature; the values' reads the token only.
        token, position, init: as in `SelectiveTemperature`; `token=False, value=False` is the released form.

    Raises:
        TypeError: not a transformers model. ValueError: no such modules, or temperatures are applied already.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> with apply_selective_temperature(model) as handle:
    ...     sum(p.numel() for p in handle.parameters())
    110
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    heads = int(model.config.get_text_config().num_attention_heads)
    found: list[Any] = [
        m for m in model.modules() if all(hasattr(m, p) for p in ("q_proj", "v_proj", "o_proj"))
    ]
    name = type(model).__name__
    if not found:
        raise ValueError(f"{name} has no attention modules with q_proj, v_proj and o_proj")
    if any(hasattr(m, "q_norm") for m in found):
        raise ValueError(f"{name} normalises its queries after q_proj, which takes a factor on them away")
    if any(hasattr(m, n) for m in found for n in NAMES):
        raise ValueError(f"selective temperatures are already applied to {name}; call .remove() first")
    handle = SelectiveHandle()
    for module in found:
        where: dict[str, Tensor] = {}
        handle._hooks.append(module.register_forward_pre_hook(_positions(where), with_kwargs=True))
        dim = module.q_proj.out_features // heads
        for wanted, owned, proj in (
            (query, "selective_q", module.q_proj),
            (value and token, "selective_v", module.v_proj),
        ):
            if not wanted:
                continue
            queries = owned == "selective_q"
            tau = SelectiveTemperature(
                proj.out_features // dim,
                dim,
                token=token,
                position=position if queries else None,
                init=init,
            ).to(proj.weight.device)
            module.add_module(owned, tau)
            handle.temperatures.append(tau)
            handle._owners.append((module, owned))
            handle._hooks.append(proj.register_forward_hook(_scale(tau, where, dim)))
    return handle


def _positions(where: dict[str, Tensor]):
    """A hook that keeps the position ids an attention module is called with."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("position_ids", kwargs.get("cache_position"))
        if not isinstance(given, Tensor):
            raise ValueError(f"{type(module).__name__} was called without position_ids")
        where["at"] = given

    return hook


def _scale(tau: SelectiveTemperature, where: dict[str, Tensor], dim: int):
    """A hook that multiplies each head of a projection by its temperature."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        y = out.unflatten(-1, (-1, dim)).transpose(1, 2)  # (B, heads, N, D)
        factor = tau(y, where["at"]).transpose(1, 2).unsqueeze(-1)  # (B, N, heads, 1)
        return (out.unflatten(-1, (-1, dim)) * factor.to(out.dtype)).flatten(-2)

    return hook
