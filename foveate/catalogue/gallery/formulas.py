"""Cost formulas of entries: as LaTeX, and evaluated on an example."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from foveate.catalogue.entry import FUNCTIONS, SYMBOLS, Cost, Entry

BASE = {"B": 1, "H": 8, "G": 8, "D": 64, "C": 512, "L": 1, "e": 2}
LENGTHS = (4096, 32768)
DENSE = "4*B*H*N*N*D"
GUESSES = (  # meaning of a symbol -> an example value; a value in parentheses in the meaning goes first
    (r"\(\w*?(\d+)\)", None),
    (r"\bshare\b|\bkeep_ratio\b", 0.1),
    (r"\bradius\b", 3),
    (r"\bsides?\b|\bkernel", 7),
    (r"\bkeys kept per query\b|\bkeys per query\b|\bbudget\b|^attn_length$|^recent$|\bexact window\b", 512),
    (r"^sink\b|^sink tokens", 4),
    (r"^(block|chunk|group)\b", 64),
    (r"\brank\b", 16),
    (r"^topk?\b|^top_k\b", 8),
)


@dataclass(frozen=True)
class Symbol:
    """A symbol of a formula: its meaning, and the value of the example (None where nothing is obvious)."""

    name: str
    meaning: str
    value: float | None
    own: bool  # of this mechanism, not of all


@dataclass(frozen=True)
class Formula:
    """One formula of a cost, the field it stands in, and its symbols."""

    title: str
    field: str
    text: str
    latex: str
    symbols: tuple[str, ...]


TITLES = {
    "flops": "Work of a layer, forward",
    "state_bytes": "Kept while decoding, bytes",
    "parameters": "Parameters of its own",
}


def formulas(cost: Cost) -> list[Formula]:
    """The formulas that a cost has."""
    found = []
    for name, title in TITLES.items():
        text = getattr(cost, name)
        if text:
            tree = ast.parse(text, mode="eval").body
            names = sorted(
                {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(FUNCTIONS)
            )
            found.append(Formula(title, name, text, latex(text), tuple(names)))
    return found


def symbols(entry: Entry) -> list[Symbol]:
    """Every symbol in the formulas of an entry: those of all first, then its own."""
    used = {name for formula in formulas(entry.cost) for name in formula.symbols}
    base = [Symbol(s, m, BASE.get(s), own=False) for s, m in SYMBOLS.items() if s in used]
    own = [Symbol(s, m, guess(m), own=True) for s, m in entry.cost.where.items() if s in used]
    return base + own


def guess(meaning: str) -> float | None:
    """An example value for a symbol that means this, or None.

    >>> guess("window: side of a window (7)"), guess("share of pairs computed"), guess("latent frames")
    (7, 0.1, None)
    """
    for pattern, value in GUESSES:
        found = re.search(pattern, meaning)
        if found:
            return int(found[1]) if value is None else value
    return None


def example(entry: Entry) -> list[tuple[int, float, float]]:
    """[(N, work, share of dense attention's work)] at `BASE` and the guessed values; empty where a value is missing.

    Only where the formula grows with N and speaks of attention among N tokens.
    """
    if not entry.cost.flops:
        return []
    values: dict[str, float] = dict(BASE)
    needed = _names(entry.cost.flops)
    for name in entry.cost.where:
        value = guess(entry.cost.where[name])
        if name in needed and value is None:
            return []
        if value is not None:
            values[name] = value
    if "N" not in needed or "M" in needed:
        return []
    rows = []
    for n in LENGTHS:
        work = entry.cost.evaluate("flops", **{**values, "N": n})
        dense = Cost(flops=DENSE).evaluate("flops", **BASE, N=n)
        rows.append((n, work, work / dense))
    return rows


def _names(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}


# ------------------------------------------------------------------------------------------ LaTeX
_ATOM, _POWER, _PRODUCT, _SUM = 4, 3, 2, 1


def latex(text: str) -> str:
    r"""A formula as LaTeX.

    >>> latex("4*B*H*N*min(N, w)*D")
    '4\\,B\\,H\\,N\\,\\min(N,\\, w)\\,D'
    >>> latex("2*(a + b)**2/ceil(N/c)")
    '\\frac{2\\,(a + b)^{2}}{\\lceil \\frac{N}{c} \\rceil}'
    """
    return _latex(ast.parse(text, mode="eval").body)[0]


def _latex(node: ast.expr) -> tuple[str, int]:
    if isinstance(node, ast.Constant):
        return str(node.value), _ATOM
    if isinstance(node, ast.Name):
        head, _, tail = node.id.partition("_")
        name = head if len(head) == 1 else rf"\mathrm{{{head}}}"
        return (rf"{name}_{{\mathrm{{{tail.replace('_', ' ')}}}}}" if tail else name), _ATOM
    if isinstance(node, ast.UnaryOp):
        return f"-{_within(node.operand, _PRODUCT)}", _SUM
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        inner = [_latex(argument)[0] for argument in node.args]
        fences = {"ceil": r"\lceil {} \rceil", "floor": r"\lfloor {} \rfloor", "sqrt": r"\sqrt{{{}}}"}
        if node.func.id in fences:
            return fences[node.func.id].format(*inner), _ATOM
        names = {"log2": r"\log_{2}", "min": r"\min", "max": r"\max"}
        separated = r",\, ".join(inner)
        return f"{names[node.func.id]}({separated})", _ATOM
    assert isinstance(node, ast.BinOp)
    if isinstance(node.op, ast.Pow):
        return f"{_within(node.left, _ATOM)}^{{{_latex(node.right)[0]}}}", _POWER
    if isinstance(node.op, ast.Mult):
        left, right = _within(node.left, _PRODUCT), _within(node.right, _PRODUCT)
        sign = r" \cdot " if right[:1].isdigit() else r"\,"
        return f"{left}{sign}{right}", _PRODUCT
    if isinstance(node.op, ast.Div):
        return rf"\frac{{{_latex(node.left)[0]}}}{{{_latex(node.right)[0]}}}", _PRODUCT
    if isinstance(node.op, ast.FloorDiv):
        fraction = rf"\frac{{{_latex(node.left)[0]}}}{{{_latex(node.right)[0]}}}"
        return rf"\lfloor {fraction} \rfloor", _ATOM
    sign = "+" if isinstance(node.op, ast.Add) else "-"
    return f"{_within(node.left, _SUM)} {sign} {_within(node.right, _SUM + (sign == '-'))}", _SUM


def _within(node: ast.expr, at_least: int) -> str:
    text, binding = _latex(node)
    return text if binding >= at_least else f"({text})"
