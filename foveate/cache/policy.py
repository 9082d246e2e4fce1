"""What a cache policy is: who stays, decided from what one layer holds."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from foveate.cache.budget import Budget
from foveate.cache.store import RaggedStore
from foveate.cache.view import View

POLICIES: dict[str, type[Policy]] = {}
"""Name -> class, for `Cache(model, "snapkv")` and for `load`."""


@dataclass(frozen=True)
class Kept:
    """A policy's own decision at the end of a prefill.

    Attributes:
        keep: bool (B, Hkv, S): tokens that stay. pinned: bool (B, Hkv, S): those that age will not evict.
        limit: int64 (B, Hkv): tokens each head holds from then on; -1 = no limit.
    """

    keep: Tensor
    pinned: Tensor
    limit: Tensor


@dataclass(frozen=True)
class Policy:
    """A frozen dataclass of settings. Either `score`s tokens (higher = keep; the budget decides how many stay), or
    decides by itself in `first` and then by age."""

    name: ClassVar[str] = ""
    schedule: ClassVar[str | int] = "prefill"
    """When to evict unless the cache is told: "prefill", or every so many decoded tokens."""
    by_age: ClassVar[bool] = False
    """After the first decision the oldest token that is not pinned goes; there are no scores to share."""
    reads: ClassVar[bool] = False
    """Nothing is evicted: the policy chooses what each step reads (`attend`)."""
    needs_budget: ClassVar[bool] = True
    needs_mass: ClassVar[bool] = False
    """Attention received is accumulated for it (`View.mass`)."""
    needs_outputs: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = True
    """Its scores look at keys or values also while decoding (they are gathered for it then)."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.name:
            POLICIES[cls.name] = cls

    @property
    def window(self) -> int:
        """Last queries it wants to see (`View.queries`)."""
        return 0

    def default_recent(self, amount: int | float, sinks: int) -> int:
        """Recent tokens that are kept when the caller does not say."""
        return 32 if isinstance(amount, float) else max(1, min(32, (amount - sinks) // 2))

    def check(self, layers: int, heads: int, kv_heads: int) -> None:
        """Raise a ValueError if the policy does not fit a model of that shape."""

    def score(self, view: View) -> Tensor:
        """(B, Hkv, S), higher = keep; comparable between the heads of all layers where a budget is shared."""
        raise NotImplementedError(f"{type(self).__name__} has no scores")

    def first(self, view: View, budget: Budget) -> Kept | None:
        """The decision at the end of a prefill; None = by score, under the budget."""
        return None

    def first_tokens(self, budget: Budget) -> int:
        """With `by_age`: so many first tokens of the sequence never age, also where the prompt was shorter."""
        return budget.sinks

    def limit(self, layer: int, seen: Tensor, limit: Tensor, budget: Budget) -> Tensor:
        """Limits (B, Hkv) as they stand after ``seen`` (B,) real tokens, given those of `first`; -1 = none."""
        return limit

    # ------------------------------------------------------------------------------- saving
    def save(self, folder: str | Path) -> None:
        """Write policy.json, and policy.safetensors for settings that are tensors; each under a temporary name first.

        `foveate.cache.load` reads them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                tensors[field.name] = value.detach().cpu().contiguous()
            else:
                plain[field.name] = value
        if tensors:
            from safetensors.torch import save_file

            save_file(tensors, folder / "policy.safetensors.tmp")
            (folder / "policy.safetensors.tmp").replace(folder / "policy.safetensors")
        text = json.dumps({"policy": self.name, "settings": plain, "tensors": sorted(tensors)}, indent=1)
        (folder / "policy.json.tmp").write_text(text + "\n", encoding="utf-8")
        (folder / "policy.json.tmp").replace(folder / "policy.json")


class Reader(Policy):
    """A policy that keeps everything and reads a part of it at each step."""

    reads: ClassVar[bool] = True

    @abstractmethod
    def attend(
        self, state: Any, q: Tensor, store: RaggedStore, view: View, tokens: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Any, int]:
        """Attention of one new query (B, H, 1, D), whose own token is the last slot of each segment.

        Args:
            state: what the last call returned; None at first.
            tokens: (B,) budget of each head. arguments: for `foveate.cache.attend.attend`.

        Returns:
            Output (B, H, 1, Dv), the new state, and the number of keys read over all segments.
        """

    def begin(self, view: View, store: RaggedStore, tokens: Tensor) -> Any:
        """The state after a call with several tokens, all of them in ``store``; ``tokens`` as in `attend`."""
        return None

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """The state for rows of the batch in another order."""
        if state is None:
            return None
        raise NotImplementedError(f"{type(self).__name__} cannot reorder the rows of its state")


def load(folder: str | Path) -> Policy:
    """The policy that `Policy.save` wrote.

    Raises:
        FileNotFoundError: no policy.json there. ValueError: an unknown policy, or settings it does not have.
    """
    folder = Path(folder)
    data = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    settings = {name: _tupled(value) for name, value in data["settings"].items()}
    if data.get("tensors"):
        from safetensors.torch import load_file

        settings |= load_file(folder / "policy.safetensors")
    return make(data["policy"], settings)


def make(name: str, settings: dict[str, Any] | None = None) -> Policy:
    """A policy by its name.

    Raises:
        ValueError: no such policy, or a setting it does not have or that is missing.

    >>> make("snapkv", {"window": 16})
    SnapKV(window=16, kernel=7, pooling='max')
    """
    cls = POLICIES.get(name)
    if cls is None:
        raise ValueError(f"unknown policy {name!r}; accepted: {', '.join(sorted(POLICIES))}")
    settings = settings or {}
    known = {field.name: field for field in fields(cls)}
    wrong = sorted(set(settings) - set(known))
    if wrong:
        raise ValueError(
            f"policy {name!r} has no setting {', '.join(wrong)}; accepted: {', '.join(known) or 'none'}"
        )
    missing = [
        n
        for n, f in known.items()
        if n not in settings and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(
            f"policy {name!r} needs {', '.join(missing)}: make it with foveate.cache.{cls.__name__}(...)"
        )
    return cls(**settings)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value
