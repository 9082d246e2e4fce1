"""A longer context for a rotary model: other rotation rates, and queries that sharpen with their position."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core.layout import TILE, BlockLayout
from foveate.core.selectors.base import Selector
from foveate.hf.apply import apply


def log_length_scale(position: Tensor, train_length: int) -> Tensor:
    """lambda_i = max(1, log i / log c), the factor on the query at 1-based position i; float64, like `position`.

    Args:
        position: integers >= 1, any shape.
        train_length: c >= 2, the window the model was trained with.

    Source: Extending LLMs' Context Window with 100 Samples (2024).

    >>> log_length_scale(torch.tensor([1, 4096, 16384, 4096**2]), 4096)
    tensor([1.0000, 1.0000, 1.1667, 2.0000], dtype=torch.float64)
    """
    c = _whole("log_length_scale", "train_length", train_length, 2)
    if position.is_floating_point() or bool((position < 1).any()):
        raise ValueError(f"log_length_scale: position must be integers >= 1, got {position.dtype}, "
                         f"least {position.min() if position.numel() else None}")  # fmt: skip
    return (position.double().log() / math.log(c)).clamp(min=1.0)


@dataclass(frozen=True)
class ContextExtension:
    """What `apply_context_extension` does to a model: rates of the rotary pairs, a magnitude, a query factor.

    `rates` gets the model's own base b, the rotated width d and the trained window c, and returns theta (d / 2,) in
    float64 and the factor on rotated queries and keys. `skip_layers` None: queries stay as they are; a number: layers
    from there on multiply the query at position i by `log_length_scale(i, c)`.
    """

    @property
    def skip_layers(self) -> int | None:
        return None

    def rates(self, base: float, width: int, train_length: int) -> tuple[Tensor, float]:
        raise NotImplementedError


@dataclass(frozen=True)
class PositionInterpolation(ContextExtension):
    """Positions divided by a factor s: theta_r = b^(-2r/d) / s.

    Source: Extending Context Window of Large Language Models via Positional Interpolation (2023).

    >>> PositionInterpolation(4.0).rates(10_000.0, 4, 4096)[0]
    tensor([0.2500, 0.0025], dtype=torch.float64)
    """

    factor: float

    def __post_init__(self) -> None:
        _factor(self)

    def rates(self, base: float, width: int, train_length: int) -> tuple[Tensor, float]:
        return rotary_rates(base, width) / self.factor, 1.0


@dataclass(frozen=True)
class NTK(ContextExtension):
    """A base at which the slowest pair turns s times slower and the fastest as before: b s^(d / (d - 2)).

    >>> before, after = (m.rates(10_000.0, 64, 4096)[0] for m in (NTK(1.0), NTK(4.0)))
    >>> (before / after)[[0, -1]]
    tensor([1.0000, 4.0000], dtype=torch.float64)
    """

    factor: float

    def __post_init__(self) -> None:
        _factor(self)

    def rates(self, base: float, width: int, train_length: int) -> tuple[Tensor, float]:
        if width <= 2:
            raise ValueError(f"NTK: needs more than one rotary pair, got width {width}")
        return rotary_rates(base * self.factor ** (width / (width - 2)), width), 1.0


@dataclass(frozen=True)
class YaRN(ContextExtension):
    """Pairs that turn often within the trained window stay, those that turn seldom are interpolated, a ramp between.

        turns_r = c b^(-2r/d) / 2 pi,  theta_r = b^(-2r/d) (1 - g_r + g_r / s)

    g goes linearly in r from 0 at the pair of `fast` turns to 1 at that of `slow` turns. Rotated queries and keys are
    multiplied by 0.1 ln s + 1 (logits by its square).

    Args:
        factor: s >= 1.
        fast, slow: turns within the trained window.
        magnitude: instead of 0.1 ln s + 1.

    Source: YaRN: Efficient Context Window Extension of Large Language Models (2023).

    >>> theta, magnitude = YaRN(4.0).rates(10_000.0, 64, 4096)
    >>> (rotary_rates(10_000.0, 64) / theta)[[0, -1]], round(magnitude, 4)
    (tensor([1., 4.], dtype=torch.float64), 1.1386)
    """

    factor: float
    fast: float = 32.0
    slow: float = 1.0
    magnitude: float | None = None

    def __post_init__(self) -> None:
        _factor(self)
        if not self.fast > self.slow > 0:
            raise ValueError(f"YaRN: accepted fast > slow > 0, got fast={self.fast!r}, slow={self.slow!r}")

    def rates(self, base: float, width: int, train_length: int) -> tuple[Tensor, float]:
        def pair(turns: float) -> float:  # the (fractional) pair with so many turns in the trained window
            return width * math.log(train_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair(self.fast)), 0)
        high = min(math.ceil(pair(self.slow)), width - 1)
        r = torch.arange(width // 2, dtype=torch.float64)
        share = ((r - low) / max(high - low, 1e-3)).clamp(0, 1)
        magnitude = 0.1 * math.log(self.factor) + 1 if self.magnitude is None else self.magnitude
        return rotary_rates(base, width) * (1 - share + share / self.factor), magnitude


@dataclass(frozen=True)
class ABF(ContextExtension):
    """Adjusted base frequency: theta_r = base^(-2r/d), whatever the model's base was.

    Source: Effective Long-Context Scaling of Foundation Models (2023).

    >>> ABF().rates(10_000.0, 4, 4096)[0][1] == 500_000.0**-0.5
    tensor(True)
    """

    base: float = 500_000.0

    def __post_init__(self) -> None:
        if isinstance(self.base, bool) or not isinstance(self.base, (int, float)) or not self.base > 0:
            raise ValueError(f"{type(self).__name__}: base must be a number > 0, got {self.base!r}")

    def rates(self, base: float, width: int, train_length: int) -> tuple[Tensor, float]:
        return rotary_rates(self.base, width), 1.0


@dataclass(frozen=True)
class EntropyABF(ABF):
    """A larger base, and logits that grow with the logarithm of the query's position, so that attention stays as sharp.

        a_ij = softmax_{j <= i}(lambda_i q~_i . k~_j / sqrt(d)),  lambda_i = max(1, log i / log c)

    q~ and k~ are rotated with the new base in every layer; lambda is 1 in the first `skip` layers, whose attention is
    nearly uniform. The position is the token's own, so cached decoding gives what the whole sequence gives.

    Args:
        base: b.
        skip: layers without the factor, 2 in the paper.

    Source: Extending LLMs' Context Window with 100 Samples (2024).

    >>> EntropyABF().skip_layers, ABF().skip_layers
    (2, None)
    """

    skip: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole("EntropyABF", "skip", self.skip, 0)

    @property
    def skip_layers(self) -> int:
        return self.skip


def rotary_rates(base: float, width: int) -> Tensor:
    """theta_r = base^(-2r/width), r = 0 .. width/2 - 1, float64.

    >>> rotary_rates(10_000.0, 4)
    tensor([1.0000, 0.0100], dtype=torch.float64)
    """
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


# ---------------------------------------------------------------------------------------------------- on a model
def apply_context_extension(
    model: PreTrainedModel, method: ContextExtension, *, train_length: int | None = None
) -> ContextHandle:
    """Give a rotary model of transformers another method of positions, until the handle is removed.

    The rates are exchanged in the model's rotary module; the factor on queries is put behind the query projection (or
    behind the query norm where there is one): the rotation is linear, so it does not matter that it comes after. It
    works with any attention implementation, with `foveate.hf.apply`, with caches, and in training. Rates are not part
    of a state_dict: a tuned model is loaded by applying the method again.

    Args:
        model: with one module `rotary_emb` of the plain kind (rope type "default") and, for a factor on queries,
            attention modules that have `layer_idx` and `q_proj`.
        method: `EntropyABF`, `ABF`, `PositionInterpolation`, `NTK` or `YaRN`.
        train_length: c, default the configuration's max_position_embeddings.

    Raises:
        TypeError: not a transformers model or not a method. ValueError: a model that does not fit (the message says
            why), or one that is extended already: methods do not stack.

    >>> from foveate import organisms
    >>> model, tokenizer = organisms.load("reader")
    >>> ids = torch.tensor([tokenizer.encode("import os\\n")])
    >>> before = model(ids).logits
    >>> with apply_context_extension(model, EntropyABF(base=50_000.0)):  # its own base, a short text: no change
    ...     print(torch.equal(model(ids).logits, before))
    True
    >>> with apply_context_extension(model, PositionInterpolation(4.0)):
    ...     print(torch.equal(model(ids).logits, before))
    False
    >>> torch.equal(model(ids).logits, before)
    True
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    if not isinstance(method, ContextExtension):
        raise TypeError(f"method must be a ContextExtension, e.g. EntropyABF(), got {method!r}")
    name = type(model).__name__
    if model in _EXTENDED:
        raise ValueError(
            f"{name} is extended by {_EXTENDED[model]!r} already; remove() that first: methods do not stack"
        )
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or not isinstance(rope.get("rope_theta"), (int, float)):
        raise ValueError(
            f"{name}: accepted are plain rotary positions (rope type 'default', one base), got {rope!r}"
        )
    rotaries = [m for path, m in model.named_modules() if path.split(".")[-1] == "rotary_emb"]
    if len(rotaries) != 1 or not isinstance(getattr(rotaries[0], "inv_freq", None), Tensor):
        raise ValueError(f"{name} has {len(rotaries)} rotary_emb modules with inv_freq; accepted: one")
    c = config.max_position_embeddings if train_length is None else train_length
    c = _whole("apply_context_extension", "train_length", c, 2)
    rotary, old = rotaries[0], rotaries[0].inv_freq
    base, width = float(rope["rope_theta"]), 2 * old.numel()  # pyright: ignore
    theta, magnitude = method.rates(base, width, c)
    slower = (theta / rotary_rates(base, width)).to(old.device)  # pyright: ignore  # a ratio: where it is 1, no bit changes
    scaled: list[tuple[nn.Module, nn.Module]] = []
    if method.skip_layers is not None:
        found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
        if not found:
            raise ValueError(
                f"{name} has no attention modules with layer_idx and q_proj to put the query factor behind"
            )
        scaled = [
            (m, getattr(m, "q_norm", None) or m.q_proj)  # pyright: ignore
            for m in found
            if m.layer_idx >= method.skip_layers  # pyright: ignore
        ]
    handle = ContextHandle(model, method, rotary)
    rotary.inv_freq = (old.double() * slower).to(old)  # pyright: ignore
    rotary.attention_scaling = rotary.attention_scaling * magnitude  # pyright: ignore
    for module, projection in scaled:
        handle.hooks.extend(_scale_queries(module, projection, c))
    _EXTENDED[model] = method
    return handle


class ContextHandle:
    """A method in force on a model until `.remove()` or the end of the `with` block; then the model is as it was."""

    def __init__(self, model: PreTrainedModel, method: ContextExtension, rotary: Any) -> None:
        self.method, self.hooks = method, []
        self._model, self._rotary = weakref.ref(model), rotary
        self._before = (rotary.inv_freq, rotary.attention_scaling)
        self._active = True

    def remove(self) -> None:
        """Restore the model's own rates, bit for bit. Calling it again does nothing."""
        if not self._active:
            return
        self._active = False
        old, self._rotary.attention_scaling = self._before
        self._rotary.inv_freq = old.to(self._rotary.inv_freq.device)
        for hook in self.hooks:
            hook.remove()
        model = self._model()
        if model is not None:
            _EXTENDED.pop(model, None)

    def __enter__(self) -> ContextHandle:
        if not self._active:
            raise ValueError("this handle was removed; call apply_context_extension() again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


_EXTENDED: weakref.WeakKeyDictionary[PreTrainedModel, ContextExtension] = weakref.WeakKeyDictionary()


def _scale_queries(module: nn.Module, projection: nn.Module, train_length: int) -> list[Any]:
    """Hooks that multiply what `projection` (of attention module `module`) returns, (B, N, ...), by lambda."""
    scale: list[Tensor] = []  # of the call under way

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        position = kwargs.get("position_ids")
        if position is None:
            raise ValueError(
                f"{type(module).__name__} was called without position_ids; the query factor needs them"
            )
        scale[:] = [log_length_scale(position + 1, train_length)]

    def multiply(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        factor = scale[0].to(out.device)  # (B or 1, N)
        if out.shape[1] != factor.shape[1]:
            raise ValueError(
                f"queries must be (batch, {factor.shape[1]} tokens, ...), got {tuple(out.shape)}"
            )
        return out * factor.reshape(*factor.shape, *[1] * (out.ndim - 2)).to(out.dtype)

    return [
        module.register_forward_pre_hook(note, with_kwargs=True),
        projection.register_forward_hook(multiply),
    ]


# ------------------------------------------------------------------------------------------------------- entropy
@dataclass(frozen=True, eq=False)
class EntropyByLength:
    """Attention entropy of the last query of prefixes, in nats.

    Attributes:
        lengths: of the prefixes; layers: their numbers.
        entropy: float64 (lengths, layers, heads), mean over texts.
    """

    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    entropy: Tensor

    @property
    def by_layer(self) -> Tensor:
        """Mean over heads, (lengths, layers)."""
        return self.entropy.mean(-1)

    @property
    def below_uniform(self) -> Tensor:
        """log n - entropy, mean over heads, (lengths, layers): 0 where attention is uniform."""
        return torch.tensor(self.lengths, dtype=torch.float64).log()[:, None] - self.by_layer


@dataclass(frozen=True, eq=False)
class _Rows(Selector):
    """Keeps everything, and notes the entropy of single rows."""

    lengths: tuple[int, ...]
    layer: int = -1
    found: dict[int, Tensor] = field(default_factory=dict)

    def at_layer(self, layer: int) -> _Rows:
        return _Rows(self.lengths, layer, self.found)

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        rows = [row_entropy(q[:, :, n - 1], k[:, :, :n], scale) for n in self.lengths]  # of (B, H)
        self.found[self.layer] = torch.stack(rows).mean(1)
        everything = torch.ones(
            -(-q.shape[2] // TILE), -(-k.shape[2] // TILE), dtype=torch.bool, device=q.device
        )
        return BlockLayout.from_blocks(everything, q.shape[2], k.shape[2], causal=is_causal)


def row_entropy(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """-sum_j a_j ln a_j, a = softmax(scale q . k_j): q (B, H, D), k (B, Hkv, n, D) -> (B, H) in float64.

    >>> round(float(row_entropy(torch.zeros(1, 1, 4), torch.randn(1, 1, 8, 4)).exp()), 6)
    8.0
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.unflatten(1, (k.shape[1], -1)).double()  # (B, Hkv, G, D)
    logits = factor * grouped @ k.double().transpose(-1, -2)  # (B, Hkv, G, n)
    lse = logits.logsumexp(-1)
    return (lse - (logits.softmax(-1) * logits).sum(-1)).flatten(1)


@torch.no_grad()
def entropy_by_length(
    model: PreTrainedModel, ids: Tensor, lengths: Sequence[int], layers: Iterable[int] | None = None
) -> EntropyByLength:
    """How spread the attention of the last query is, by the length of what it reads.

    Attention is causal, so the last query of a prefix of n tokens is query n of the whole: one forward of the longest
    prefix gives all lengths, and a row of weights per length and head is all that is held.

    Args:
        model: of transformers, with a method of this module or without.
        ids: (B, N) token numbers without padding.
        lengths: 1 <= n <= N.
        layers: layer numbers; default all.

    >>> from foveate import organisms
    >>> model, tokenizer = organisms.load("reader")
    >>> found = entropy_by_length(model, torch.tensor([tokenizer.encode("import os\\n")]), [1, 10])
    >>> found.entropy.shape, found.by_layer[0].abs().max() < 1e-9  # one token: no choice
    (torch.Size([2, 4, 8]), tensor(True))
    """
    sizes = tuple(_whole("entropy_by_length", "lengths", n, 1) for n in lengths)
    if ids.ndim != 2 or ids.is_floating_point() or not sizes or max(sizes) > ids.shape[1]:
        raise ValueError(f"entropy_by_length: ids must be (batch, tokens >= {max(sizes, default=1)}), lengths not "
                         f"empty; got {ids.dtype} {tuple(ids.shape)} and {sizes}")  # fmt: skip
    listener = _Rows(sizes)
    with apply(model, listener, layers=layers):
        model(input_ids=ids[:, : max(sizes)], use_cache=False)
    numbers = tuple(sorted(listener.found))
    return EntropyByLength(sizes, numbers, torch.stack([listener.found[i] for i in numbers], 1).cpu())


def _factor(method: Any) -> None:
    if (
        isinstance(method.factor, bool)
        or not isinstance(method.factor, (int, float))
        or not method.factor >= 1
    ):
        raise ValueError(f"{type(method).__name__}: factor must be a number >= 1, got {method.factor!r}")


def _whole(owner: str, name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: {name} must be an int >= {least}, got {value!r}")
    return value
