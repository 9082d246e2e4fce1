"""One paper of the catalogue: the fields of its TOML file, and a strict reader.

The reader accepts nothing it does not know: an unknown field, a word outside the vocabularies, a formula with an
undefined symbol, an implemented entry without its tests are errors that name the file, the field and what is accepted.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.catalogue import vocabulary as words

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


class EntryError(ValueError):
    """An entry that breaks the schema; the message names file, field, what came and what is accepted."""


@dataclass(frozen=True)
class Relation:
    """`how` (a key of `vocabulary.RELATIONS`) this paper relates to the paper `to`."""

    how: str
    to: str


SYMBOLS = {
    "B": "batch size",
    "H": "query heads",
    "G": "key/value heads",
    "N": "queries",
    "M": "keys",
    "D": "dimension of a head",
    "C": "dimension of the model",
    "L": "layers",
    "e": "bytes per element",
}
FUNCTIONS = {
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "floor": math.floor,
    "log2": math.log2,
    "sqrt": math.sqrt,
}


@dataclass(frozen=True)
class Cost:
    """Formulas in the symbols of `SYMBOLS` and of `where`; a multiply-add counts 2.

    flops: forward work of the attention part of one layer. state_bytes: what decoding keeps, bytes. parameters:
    what the mechanism adds, or has.
    """

    flops: str = ""
    state_bytes: str = ""
    parameters: str = ""
    where: Mapping[str, str] = field(default_factory=dict)

    def evaluate(self, formula: str, **values: float) -> float:
        """The value of a formula of this cost.

        >>> Cost(flops="4*B*H*N*min(N, w)*D", where={"w": "window"}).evaluate("flops", B=1, H=2, N=8, w=4, D=3)
        768
        """
        text = getattr(self, formula)
        tree = ast.parse(text, mode="eval")
        missing = (
            {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(values) - set(FUNCTIONS)
        )
        if missing:
            raise ValueError(f"cost.{formula} = {text}: no value for {', '.join(sorted(missing))}")
        return _value(tree.body, values)


_BINARY = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Pow: lambda a, b: a**b,
}


def _value(node: ast.expr, values: Mapping[str, float]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, values)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, values), _value(node.right, values))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in FUNCTIONS
        and not node.keywords
    ):
        return FUNCTIONS[node.func.id](*(_value(a, values) for a in node.args))
    raise ValueError(
        f"{ast.unparse(node)}: accepted: + - * / // ** ( ), numbers, symbols, {', '.join(FUNCTIONS)}"
    )


@dataclass(frozen=True)
class Check:
    """One object that the common suite builds and checks: `make(**arguments)`, used as the interface `use`.

    Args of the file: make (dotted path), use (a key of `vocabulary.INTERFACES`), arguments (see
    `foveate.catalogue.conformance.subject` for lists and tensors), tokens (queries; a prime by default), heads and
    head_dim of the inputs, grid of a map or of a backbone's images (by default 13 x 11 and 64 x 64), tags (default:
    the entry's), limits: [{arguments, equals}] with equals "full" or "causal",
    for arguments, in addition to those of the check, under which the mechanism must coincide with dense attention;
    symbols: values for `cost.parameters`, which must then equal the number of parameters.
    """

    make: str
    use: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 131
    heads: int = 2
    head_dim: int = 16
    grid: tuple[int, int] | None = None
    tags: tuple[str, ...] | None = None
    limits: tuple[Mapping[str, Any], ...] = ()
    symbols: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One paper. `implementation`, `evidence` and `picture` are dotted paths; see docs/catalogue.md for every field."""

    key: str
    title: str
    name: str
    date: str
    family: str
    kind: str
    idea: str
    contribution: str
    mechanism: str
    equation: tuple[str, ...]
    symbols: Mapping[str, str]
    claim: str
    invariants: tuple[str, ...]
    experiment: str
    modality: tuple[str, ...]
    complexity: str
    tags: tuple[str, ...]
    phrases: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    notes: str = ""
    code: str = ""
    paper: str = ""
    relations: tuple[Relation, ...] = ()
    cost: Cost = Cost()
    implementation: tuple[str, ...] = ()
    evidence: str = ""
    picture: str = ""
    verification: str = ""
    verified_by: str = ""
    differs: str = ""
    snippet: str = ""
    tests: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @property
    def year(self) -> int:
        return int(self.date[:4])

    @property
    def implemented(self) -> bool:
        return bool(self.implementation)

    @property
    def direction(self) -> str:
        """causal, bidirectional, either, or none."""
        both = ("causal" in self.tags, "bidirectional" in self.tags)
        return {(True, True): "either", (True, False): "causal", (False, True): "bidirectional"}.get(
            both, "none"
        )

    @property
    def source(self) -> str:
        """Where to read the paper: its own address, else a search for its title."""
        if self.paper:
            return self.paper
        import urllib.parse

        return "https://arxiv.org/search/?searchtype=title&query=" + urllib.parse.quote_plus(self.title)


IMPLEMENTED_NEEDS = ("verification", "verified_by", "differs", "snippet", "tests", "checks")
DOTTED = re.compile(r"foveate(\.[A-Za-z_]\w*)+")
_FIELDS = {f.name: f for f in dataclasses.fields(Entry)}
_HINTS = typing.get_type_hints(Entry)


def read(path: Path) -> Entry:
    """The entry of one TOML file, whose name is its key.

    Raises:
        EntryError: anything the schema does not accept.
    """
    with path.open("rb") as file:
        try:
            found = tomllib.load(file)
        except tomllib.TOMLDecodeError as error:
            raise EntryError(f"{path.name}: not TOML: {error}") from None
    entry = from_dict(found, path.name)
    if entry.key != path.stem:
        raise EntryError(f"{path.name}: key is {entry.key!r}; accepted: the file's name, {path.stem!r}")
    return entry


def from_dict(found: Mapping[str, Any], where: str) -> Entry:
    """An entry from parsed TOML, checked; `where` is named in errors."""

    def refuse(name: str, message: str) -> typing.NoReturn:
        raise EntryError(f"{where}: {name}: {message}")

    unknown = sorted(set(found) - set(_FIELDS))
    if unknown:
        refuse(unknown[0], f"unknown field; accepted: {', '.join(_FIELDS)}")
    made: dict[str, Any] = {}
    for name, value in found.items():
        hint = _HINTS[name]
        if hint is str:
            if not isinstance(value, str):
                refuse(name, f"must be a string, got {type(value).__name__}")
            made[name] = value.strip("\n")
        elif hint == tuple[str, ...]:
            made[name] = _strings(name, value, refuse)
        elif name == "relations":
            made[name] = tuple(
                _record(Relation, f"{name}[{i}]", v, refuse) for i, v in enumerate(_list(name, value, refuse))
            )
        elif name == "checks":
            made[name] = tuple(
                _record(Check, f"{name}[{i}]", v, refuse) for i, v in enumerate(_list(name, value, refuse))
            )
        elif name == "cost":
            made[name] = _record(Cost, name, value, refuse)
        else:
            if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
                refuse(name, "must be a table of strings")
            made[name] = value
    missing = [
        f.name
        for f in _FIELDS.values()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and not made.get(f.name)
        and not (f.name in ("symbols",) and f.name in made)
    ]
    if missing:
        refuse(missing[0], "is required")
    entry = Entry(**made)
    _check_words(entry, refuse)
    _check_cost(entry, refuse)
    _check_implementation(entry, refuse)
    return entry


def _list(name: str, value: Any, refuse) -> list:
    if not isinstance(value, list):
        refuse(name, f"must be a list, got {type(value).__name__}")
    return value


def _strings(name: str, value: Any, refuse) -> tuple[str, ...]:
    if not all(isinstance(v, str) and v.strip() for v in _list(name, value, refuse)):
        refuse(name, "must be a list of strings, none empty")
    if len(set(value)) != len(value):
        refuse(name, "says something twice")
    return tuple(value)


def _record(kind: type, name: str, value: Any, refuse) -> Any:
    if not isinstance(value, dict):
        refuse(name, f"must be a table, got {type(value).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        refuse(f"{name}.{unknown[0]}", f"unknown field; accepted: {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    made = {}
    for inner, v in value.items():
        hint = hints[inner]
        if hint in (str, int) and type(v) is not hint:
            refuse(f"{name}.{inner}", f"must be {hint.__name__}, got {v!r}")
        if hint == tuple[str, ...] | None:
            v = _strings(f"{name}.{inner}", v, refuse)
        elif inner == "limits":
            v = tuple(_list(f"{name}.{inner}", v, refuse))
        elif inner in ("arguments", "symbols", "where") and not isinstance(v, dict):
            refuse(f"{name}.{inner}", f"must be a table, got {type(v).__name__}")
        made[inner] = v
    required = [
        f.name
        for f in known.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for inner in required:
        if inner not in made:
            refuse(f"{name}.{inner}", "is required")
    return kind(**made)


def _check_words(entry: Entry, refuse) -> None:
    def within(name: str, given, accepted) -> None:
        for word in (given,) if isinstance(given, str) else given:
            if word not in accepted:
                refuse(name, f"got {word!r}; accepted: {', '.join(accepted)}")

    within("family", entry.family, words.FAMILIES)
    within("also", entry.also, words.FAMILIES)
    within("kind", entry.kind, words.KINDS)
    within("modality", entry.modality, words.MODALITIES)
    within("complexity", entry.complexity, words.COMPLEXITIES)
    within("tags", entry.tags, words.TAGS)
    for relation in entry.relations:
        within("relations", relation.how, words.RELATIONS)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", entry.key):
        refuse("key", f"got {entry.key!r}; accepted: lower-case letters, digits, underscores")
    if not re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", entry.date):
        refuse("date", f"got {entry.date!r}; accepted: YYYY-MM-DD or YYYY-MM")
    if len(entry.name) > 40:
        refuse("name", f"has {len(entry.name)} characters; accepted: at most 40")
    wide = [line for line in entry.snippet.splitlines() if len(line) > 78]
    if wide:
        refuse("snippet", f"line {wide[0]!r} has {len(wide[0])} columns; accepted: at most 78")
    if len(entry.idea) > 200:
        refuse("idea", f"has {len(entry.idea)} characters; accepted: one sentence of at most 200")
    for name in ("code", "paper"):
        address = getattr(entry, name)
        if address and not re.fullmatch(r"https://[^\s\"<>]+", address):
            refuse(name, f"got {address!r}; accepted: an https address, or nothing")


def _check_cost(entry: Entry, refuse) -> None:
    cost = entry.cost
    for symbol, meaning in cost.where.items():
        if (
            symbol in SYMBOLS
            or symbol in FUNCTIONS
            or not symbol.isidentifier()
            or not isinstance(meaning, str)
        ):
            refuse("cost.where", f"{symbol} = {meaning!r}; accepted: new names, each with its meaning")
    some = dict.fromkeys([*SYMBOLS, *cost.where], 3.0)
    for name in ("flops", "state_bytes", "parameters"):
        if getattr(cost, name):
            try:
                cost.evaluate(name, **some)
            except (ValueError, SyntaxError, TypeError) as error:
                refuse(f"cost.{name}", f"{getattr(cost, name)}: {error}")
            except ZeroDivisionError:
                pass  # a formula that happens to divide by zero at these made-up values


def _check_implementation(entry: Entry, refuse) -> None:
    paths = [("implementation", p) for p in entry.implementation]
    paths += [(name, getattr(entry, name)) for name in ("evidence", "picture") if getattr(entry, name)]
    paths += [("checks", check.make) for check in entry.checks]
    for name, path in paths:
        if not DOTTED.fullmatch(path):
            refuse(name, f"got {path!r}; accepted: a dotted path below foveate")
    for check in entry.checks:
        if check.use not in words.INTERFACES:
            refuse("checks", f"use = {check.use!r}; accepted: {', '.join(words.INTERFACES)}")
        if check.make not in entry.implementation:
            refuse("checks", f"make = {check.make!r}; accepted: one of implementation")
        if check.tags is not None and not set(check.tags) <= set(words.TAGS):
            refuse(
                "checks",
                f"tags {sorted(set(check.tags) - set(words.TAGS))}; accepted: those of the vocabulary",
            )
        for name in ("tokens", "heads", "head_dim"):
            if getattr(check, name) < 1:
                refuse("checks", f"{name} = {getattr(check, name)}; accepted: at least 1")
        if check.grid is not None and (len(check.grid) != 2 or min(check.grid) < 1):
            refuse("checks", f"grid = {check.grid}; accepted: two sides, each at least 1")
        if check.grid is not None and check.use not in ("map", "backbone"):
            refuse("checks", f"grid of a {check.use}; accepted: grid of map, backbone")
        for limit in check.limits:
            if (
                not isinstance(limit, dict)
                or set(limit) != {"arguments", "equals"}
                or not isinstance(limit["arguments"], dict)
                or limit["equals"] not in ("full", "causal")
            ):
                refuse("checks", f"limits {limit}; accepted: arguments, and equals = 'full' or 'causal'")
        if check.limits and "limits" not in words.CHECKS[check.use]:
            may = ", ".join(use for use, names in words.CHECKS.items() if "limits" in names)
            refuse("checks", f"limits of a {check.use}; accepted: limits of {may}")
        if check.symbols and "parameter_count" not in words.CHECKS[check.use]:
            refuse("checks", f"symbols of a {check.use}; accepted: symbols of layer, map, backbone, gate")
        for symbol, number in check.symbols.items():
            known = [*SYMBOLS, *entry.cost.where]
            if symbol not in known or type(number) not in (int, float):
                refuse("checks", f"symbols: {symbol} = {number!r}; accepted: numbers for {', '.join(known)}")
        if check.symbols:
            if not entry.cost.parameters:
                refuse("checks", "symbols are given, but there is no cost.parameters to evaluate")
            try:
                entry.cost.evaluate("parameters", **check.symbols)
            except (ValueError, ZeroDivisionError) as error:
                refuse("checks", f"symbols: {error}")
    if entry.implementation:
        for name in IMPLEMENTED_NEEDS:
            if not getattr(entry, name):
                refuse(name, "is required of an implemented entry")
        if entry.verification not in words.VERIFICATIONS:
            refuse("verification", f"got {entry.verification!r}; accepted: {', '.join(words.VERIFICATIONS)}")
    else:
        for name in ("evidence", "picture", *IMPLEMENTED_NEEDS):
            if getattr(entry, name):
                refuse(name, "is given, but there is no implementation")
