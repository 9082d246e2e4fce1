"""`Cache`: a key/value cache for transformers models that keeps, per layer and head, what a policy says."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import transformers.cache_utils as cache_utils
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.cache import Budget, Geometry, LayerCache, Policy, Pool, RaggedStore, make
from foveate.hf.apply import _attention_modules, _cannot, _require_switchable, _Switch
from foveate.hf.sealed import Sealed

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Layer types whose cache is keys and values."""


class CachedLayer(cache_utils.CacheLayerMixin):
    """One layer, as transformers sees it."""

    is_sliding = False
    is_croppable = False  # what a policy evicted cannot come back; `crop` works where nothing was
    is_compileable = False

    def __init__(self, held: LayerCache):
        super().__init__()
        self.held = held
        self.coming = 0  # tokens of a call whose attention has not come yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.coming:
            raise RuntimeError(
                f"layer {self.held.layer}: new keys before the attention of the last ones. A foveate.hf.Cache works "
                "with foveate's attention only, and belongs to one model"
            )
        self.coming = key_states.shape[2]
        length = self.held.seen + self.coming
        return Sealed.of(self, key_states, length), Sealed.of(self, value_states, length)

    def get_seq_length(self) -> int:
        return self.held.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.held.reset()
        self.coming = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.held.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.held.store is not None:
            self.held.select_rows(torch.arange(self.held.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.held.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a number of tokens to remove, as a negative int; got {tokens_to_remove}"
            )
        self.held.crop(-tokens_to_remove)

    def offload(self) -> None:
        raise ValueError("a foveate.hf.Cache cannot be offloaded")

    prefetch = offload


@dataclass(frozen=True)
class LayerHeld:
    """What one layer holds: tokens per batch row and KV head, and bytes."""

    layer: int
    tokens: tuple[tuple[int, ...], ...]
    nbytes: int
    full_bytes: int


@dataclass(frozen=True)
class Held:
    """What a cache holds.

    Attributes:
        policy, layers: see there. seen: tokens seen per batch row, padding not counted.
        nbytes: bytes allocated: keys, values, positions, free slots and what the policy keeps beside them.
        full_bytes: keys and values of a cache that keeps every token, padding included, as `DynamicCache` does.
        keys_read: keys that single-token steps looked at so far.
    """

    policy: str
    layers: tuple[LayerHeld, ...]
    seen: tuple[int, ...]
    nbytes: int
    full_bytes: int
    keys_read: int

    @property
    def share(self) -> float:
        """Bytes held over bytes of a full cache."""
        return self.nbytes / self.full_bytes if self.full_bytes else 0.0

    @property
    def tokens(self) -> float:
        """Tokens per batch row and KV head, on average over everything."""
        each = [n for layer in self.layers for row in layer.tokens for n in row]
        return sum(each) / len(each) if each else 0.0

    def __str__(self) -> str:
        seen = ", ".join(str(n) for n in self.seen)
        return (
            f"{self.policy}: {self.tokens:.1f} tokens per head of {seen} seen; {self.nbytes:,} bytes of "
            f"{self.full_bytes:,} ({self.share:.1%})"
        )


class Cache(cache_utils.Cache):
    """Keys and values under a policy, for `generate(past_key_values=cache)` or for calls of the model.

    Every KV head of every layer and row holds its own tokens, in memory that is really that small; each token keeps
    its position. Padding is never stored. Grouped heads are never expanded. While the cache lives, the model's
    attention runs through foveate (`release` ends that); what is executed is the model's own rule on the tokens held.
    It goes together with `foveate.hf.apply(..., phase="prefill")` for a sparse prefill.

    Args:
        model: a decoder-only transformers model that can switch its attention.
        policy: a name ("streaming", "h2o", "snapkv", "random", "oracle", ...) or a `foveate.cache.Policy`.
        budget: tokens per KV head (int), or the fraction (float) of the tokens seen so far. Some policies need none.
        per: "head": every KV head keeps as many; "layer" or "model": they share, by score, the sum.
        sinks: the first real tokens, always kept. recent: the last ones, always kept; default: by the policy.
        evict: "prefill": after calls with several tokens; n: also after every n single tokens; "append": each token
            is decided once, when it leaves the recent ones (budget: a fraction). Default: by the policy.
        floor: with a shared budget, what each head gets at least, as a fraction of an even share.

    Raises:
        TypeError, ValueError: not such a model, an unknown policy, or a budget out of range.

    Beams, sampling, several returned sequences and chunked prefill work. Cropping (assisted and prompt-lookup
    decoding) is refused once something was evicted. A cache serves one generation; `reset` makes it empty.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch, foveate as fv
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = fv.hf.Cache(model, "snapkv", budget=16, recent=8)
    >>> _ = model.generate(torch.arange(60)[None], past_key_values=cache, max_new_tokens=2, pad_token_id=0)
    >>> cache.held().layers[0].tokens  # 16 of the prompt and the token whose successor was generated
    ((17, 17),)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy,
        budget: int | float | None = None,
        *,
        per: str = "head",
        sinks: int = 4,
        recent: int | None = None,
        evict: str | int | None = None,
        floor: float = 0.2,
    ):
        chosen = make(policy) if isinstance(policy, str) else policy
        if not isinstance(chosen, Policy):
            raise TypeError(f"policy must be a name or a foveate.cache.Policy, got {policy!r}")
        modules = _modules(model)
        config = model.config.get_text_config()
        layers = _layers(model, config)
        heads = int(config.num_attention_heads)
        chosen.check(layers, heads, int(getattr(config, "num_key_value_heads", None) or heads))
        given = _budget(chosen, budget, per, sinks, recent, floor)
        when = _schedule(chosen, evict, given)
        pool = Pool(layers) if given.per == "model" else None
        self._pool = pool
        self.policy, self.budget, self.evict = chosen, given, when
        super().__init__(
            layers=[CachedLayer(LayerCache(chosen, given, when, n, pool)) for n in range(layers)]
        )
        self._held = [layer.held for layer in self.layers if isinstance(layer, CachedLayer)]
        self._switch = _Switch(model)
        self._switch.on()
        self._modules = modules
        self._finalizer = weakref.finalize(self, self._switch.off)

    def release(self) -> None:
        """Give the model its own attention back (if nothing else uses foveate's). The cache is useless from then on."""
        self._finalizer()

    def held(self) -> Held:
        """Tokens and bytes, now."""
        layers, full, seen = [], 0, ()
        for held in self._held:
            store = held.store
            if store is None:
                continue
            wide = store.keys.shape[1] * store.keys.element_size()
            wide += store.values.shape[1] * store.values.element_size()
            counts = store.count.view(store.batch, store.heads).tolist()
            whole = store.batch * store.heads * held.seen * wide
            layers.append(LayerHeld(held.layer, tuple(map(tuple, counts)), held.nbytes, whole))
            full += whole
            seen = tuple(held.real.tolist())
        return Held(
            self.policy.name or type(self.policy).__name__,
            tuple(layers),
            seen,
            sum(layer.nbytes for layer in layers),
            full,
            sum(held.keys_read for held in self._held),
        )

    def positions(self, layer: int) -> list[list[Tensor]]:
        """Positions held, increasing: [row][KV head]. Padding counts as a position, as in the model's inputs."""
        store = self._held[layer].store
        if store is None:
            return []
        return [[store.tokens(b * store.heads + h) for h in range(store.heads)] for b in range(store.batch)]

    def __repr__(self) -> str:
        return f"<foveate.hf.Cache {self.policy!r} {self.budget!r} evict={self.evict!r}>"


# ------------------------------------------------------------------------------- from the attention function
def settle(
    module: nn.Module,
    layer: CachedLayer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    padding: Tensor | None,
    geometry: Geometry,
) -> None:
    """The first tokens were attended to: let the layer's cache keep what it wants."""
    layer.coming = 0
    if layer.held.policy.needs_outputs:
        geometry = Geometry(
            geometry.scale, geometry.softcap, geometry.sinks, geometry.window, out_weight(module, q, v)
        )
    layer.held.prefill(q, k, v, out, _real(padding, q.shape[0], 0, k), geometry)


def proceed(
    layer: CachedLayer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    geometry: Geometry,
    allowed: Any,
) -> Tensor:
    """Attention of further tokens: to what is held, and to themselves."""
    layer.coming = 0
    pool = layer.held.pool
    if pool is not None and pool.waiting:
        pool.decide()  # the model has fewer attention layers than its config says
    return layer.held.extend(q, k, v, _real(padding, q.shape[0], layer.held.seen, k), geometry, allowed)


def gather_rows(store: RaggedStore, rows: Tensor) -> Tensor:
    """Bool (B|1, H|1, Q, M) over absolute positions -> (B, H|Hkv, Q, S) over the slots of a store."""
    at = store.padded("positions")  # (B, Hkv, S)
    batch, hkv, width = at.shape
    heads = rows.shape[1]
    at = at.repeat_interleave(max(1, heads // hkv), 1) if heads > 1 else at
    rows = rows.expand(batch, at.shape[1], rows.shape[2], rows.shape[3])
    return rows.gather(3, at[:, :, None].expand(-1, -1, rows.shape[2], width))


def out_weight(module: nn.Module, q: Tensor, v: Tensor) -> Tensor | None:
    """(H, Dv, d_model): each head's slice of the module's output projection; None where it is not found."""
    for name in ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo"):
        projection = getattr(module, name, None)
        weight = getattr(projection, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        inner = q.shape[1] * v.shape[3]
        if not isinstance(projection, nn.Linear):
            weight = weight.T  # Conv1D keeps (inputs, outputs)
        if weight.shape[1] == inner:
            return weight.T.reshape(q.shape[1], v.shape[3], weight.shape[0])
    return None


def _real(padding: Tensor | None, batch: int, start: int, k: Tensor) -> Tensor:
    n = k.shape[2]
    if padding is None:
        return torch.ones(batch, n, dtype=torch.bool, device=k.device)
    part = padding[:, start : start + n].to(k.device)
    if part.shape[1] < n:
        part = nn.functional.pad(part, (0, n - part.shape[1]), value=True)
    return part.expand(batch, n)


# ------------------------------------------------------------------------------- checking what was asked for
def _modules(model: PreTrainedModel) -> list[tuple[str, nn.Module, int, str]]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    _require_switchable(model)
    found = _attention_modules(model)
    if not found:
        raise ValueError(
            _cannot(type(model).__name__, model, "no module of it calls its attention through it")
        )
    return found


def _layers(model: PreTrainedModel, config: Any) -> int:
    """Number of layers, all of which hold keys and values."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; foveate.hf.Cache is for decoder-only models")
    types = getattr(config, "layer_types", None) or ()
    other = sorted(set(types) - set(ATTENTION))
    if other:
        raise ValueError(
            f"{name} has layers of type {', '.join(other)}, which do not hold keys and values alone"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{name} shares keys and values between layers, which foveate.hf.Cache does not support"
        )
    if not type(model)._supports_default_dynamic_cache():  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"{name} brings a cache of its own and takes no other")
    return int(config.num_hidden_layers)


def _budget(
    policy: Policy, amount: int | float | None, per: str, sinks: int, recent: int | None, floor: float
) -> Budget:
    if amount is None:
        if policy.needs_budget:
            raise ValueError(
                f"policy {policy.name!r} needs a budget: tokens (int) or a fraction (float) per KV head"
            )
        amount = 1.0
    elif not policy.needs_budget:
        raise ValueError(f"policy {policy.name!r} decides itself how much each head keeps; leave budget out")
    budget = Budget(amount, per, sinks, 0, floor)  # its errors first
    if recent is None:
        recent = policy.default_recent(amount, sinks)
    budget = Budget(amount, per, sinks, recent, floor)
    if per != "head" and (policy.by_age or policy.reads):
        raise ValueError(
            f"policy {policy.name!r} has no scores that heads could share a budget by; use per='head'"
        )
    return budget


def _schedule(policy: Policy, evict: str | int | None, budget: Budget) -> str | int:
    when = policy.schedule if evict is None else evict
    if isinstance(when, bool) or not (when in ("prefill", "append") or (isinstance(when, int) and when >= 1)):
        raise ValueError(f"evict must be 'prefill', 'append' or a number of tokens >= 1; got {evict!r}")
    if policy.reads and evict is not None:
        raise ValueError(f"policy {policy.name!r} evicts nothing; leave evict out")
    if when == "append" and not budget.fraction:
        raise ValueError(
            "evict='append' never takes back a decision, so its budget must be a fraction (float)"
        )
    if when == "append" and policy.by_age:
        raise ValueError(f"policy {policy.name!r} evicts by age; evict='append' needs a policy with scores")
    return when
