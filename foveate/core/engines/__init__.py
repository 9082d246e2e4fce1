"""The engines and how one is chosen. Each is a module with `name`, `why_not(request)` and `run(request)`."""

from __future__ import annotations

from types import ModuleType

from foveate.core.engines import flex, native, reference, sdpa
from foveate.core.request import AttentionRequest, EngineRefusal

ENGINES: dict[str, ModuleType] = {engine.name: engine for engine in (native, flex, sdpa, reference)}


def choose(request: AttentionRequest, engine: str = "auto", *, return_lse: bool = False) -> ModuleType:
    """The engine module for a request.

    `auto`: on CPU native; on CUDA SDPA for plain full and causal attention, else FlexAttention; reference (with its
    size guard) for whatever they decline; on the meta device SDPA, then reference.

    Raises:
        EngineRefusal: the named engine declines, or all do; the message carries every reason.
        ValueError: an unknown name.
    """
    if engine != "auto":
        if engine not in ENGINES:
            raise ValueError(f"engine must be 'auto' or one of {', '.join(ENGINES)}; got {engine!r}")
        reason = refusal(engine, request, return_lse)
        if reason is not None:
            raise EngineRefusal(
                f"engine {engine!r} cannot run this: {reason}\n{describe(request, return_lse)}"
            )
        return ENGINES[engine]
    orders = {"cuda": ("sdpa", "flex", "reference"), "meta": ("sdpa", "reference")}
    order = orders.get(request.q.device.type, ("native", "reference"))
    for name in order:
        if refusal(name, request, return_lse) is None:
            return ENGINES[name]
    raise EngineRefusal(f"no engine can run this\n{describe(request, return_lse)}")


def refusal(name: str, request: AttentionRequest, return_lse: bool) -> str | None:
    """Why the engine `name` declines, or None."""
    if name == "sdpa" and return_lse:
        return "it does not return lse"
    reason = ENGINES[name].why_not(request)
    return flex.why_not_lse(request) if reason is None and return_lse and name == "flex" else reason


def describe(request: AttentionRequest, return_lse: bool = False) -> str:
    """One line per engine: what it says to this request."""
    lines = []
    for name in ENGINES:
        reason = refusal(name, request, return_lse)
        lines.append(f"  {name:<10} {'yes' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)
