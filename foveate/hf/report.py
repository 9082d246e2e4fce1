"""What a handle measured, and the outcome of its check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One attention module.

    Attributes:
        path, layer, kind: module path in the model, layer number, "self" or "cross".
        calls, restricted: attention calls, and how many of them ran under the policy.
        tokens: query tokens, batch included.
        density: executed pairs / pairs that the model's own rule allows, over all calls; 1.0 = nothing was
            left out.
        nbytes: largest layout of one call, in bytes (0 when full, causal or a slice needed none).
    """

    path: str
    layer: int
    kind: str
    calls: int
    restricted: int
    tokens: int
    area: float
    rule_area: float
    nbytes: int

    @property
    def density(self) -> float:
        return self.area / self.rule_area if self.rule_area else 1.0


@dataclass(frozen=True)
class Report:
    """Measured since `apply()`; `str(report)` is a table."""

    model: str
    policy: str
    phase: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[
        str, ...
    ] = ()  # attention-like classes in the model that do not dispatch and stay as they are

    @property
    def density(self) -> float:
        """Executed pairs / pairs of the model's own rules, over all layers and calls."""
        allowed = sum(layer.rule_area for layer in self.layers)
        return sum(layer.area for layer in self.layers) / allowed if allowed else 1.0

    @property
    def nbytes(self) -> int:
        """Largest layout of one call, in bytes."""
        return max((layer.nbytes for layer in self.layers), default=0)

    def __str__(self) -> str:
        head = ("layer", "kind", "calls", "restricted", "tokens", "density", "layout bytes", "module")
        rows = [
            (
                str(x.layer),
                x.kind,
                str(x.calls),
                str(x.restricted),
                str(x.tokens),
                f"{x.density:.4f}",
                str(x.nbytes),
                x.path,
            )
            for x in self.layers
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

        def line(row: tuple[str, ...]) -> str:
            cells = [
                c.ljust(w) if i in (1, 7) else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        out = [
            f"{self.model}: {self.policy} in {self.phase}, density {self.density:.4f}",
            line(head),
            *map(line, rows),
        ]
        if self.skipped:
            out.append("not dispatching, unchanged: " + ", ".join(self.skipped))
        return "\n".join(out)


@dataclass(frozen=True)
class Check:
    """Eager against foveate with the dense policy, on real tokens.

    Attributes:
        max_error: largest absolute difference of the outputs.
        mean_error: mean absolute difference.
        positions: how many token positions were compared.
        output: which output of the model was compared.
        tolerance: the limit that `max_error` kept.
    """

    max_error: float
    mean_error: float
    positions: int
    output: str
    tolerance: float


class CheckError(RuntimeError):
    """The model computes something else through foveate than eagerly."""
