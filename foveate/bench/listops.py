"""ListOps: nested operations on lists of digits, the one task of Long Range Arena that any machine can make."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

OPERATIONS = ("MIN", "MAX", "MED", "SM")
TOKENS = ("PAD", *map(str, range(10)), *(f"[{name}" for name in OPERATIONS), "]")
Tree = int | tuple[str, tuple["Tree", ...]]

PUBLISHED = {
    "Transformer": 36.37, "BigBird": 36.05, "Longformer": 35.63, "Linformer": 35.70, "Reformer": 37.27,
    "Local": 15.82, "Linear": 16.13, "Performer": 18.01,
}  # fmt: skip
"""Accuracy in percent from Long Range Arena (2020). The most frequent answer alone has about 17: below it nothing was
learnt, so compare bands, not points."""


@dataclass(frozen=True)
class ListOps:
    """Expressions like [MAX 4 [MIN 2 7] 0], the answer a digit.

    MIN, MAX; MED, the median rounded down; SM, the sum modulo 10. Below the root a tree is a digit with probability
    3/4, at the greatest depth always, else an operation on `args` values; trees of another length than
    `shortest` < tokens < `longest` are drawn again.

    Args:
        depth: levels of a tree, its digits included, >= 2; 10 in the benchmark: nine operations inside one another.
        args: fewest and most arguments, (2, 10).
        shortest, longest: bounds of the number of tokens, both excluded, (500, 2000); brackets count.
        digit: probability of a digit below the root.

    Source: ListOps (2018) in the form of Long Range Arena: A Benchmark for Efficient Transformers (2020). Differs:
    seeded, and independent of hash order (the released rows are collected in a set, whose order changes from run to
    run); rows are drawn with repetition.

    >>> task = ListOps(depth=3, args=(2, 3), shortest=3, longest=12)
    >>> tree = next(task.trees(0))
    >>> written(tree), value(tree)
    ('[SM 8 4 [MED 8 2 ] ]', 7)
    """

    depth: int = 10
    args: tuple[int, int] = (2, 10)
    shortest: int = 500
    longest: int = 2000
    digit: float = 0.75

    def __post_init__(self) -> None:
        if self.depth < 2 or not 1 <= self.args[0] <= self.args[1]:
            raise ValueError(
                f"ListOps: depth must be >= 2 and args (fewest, most), got {self.depth} and {self.args}"
            )
        if not 0 <= self.digit <= 1 or self.shortest + 1 >= self.longest:
            raise ValueError(
                f"ListOps: digit must be a probability and shortest + 1 < longest, got {self.digit}, {self.shortest} "
                f"and {self.longest}"
            )

    def trees(self, seed: int) -> Iterator[Tree]:
        """Trees without end; a seed gives the same ones on every machine.

        Raises:
            ValueError: 100,000 draws in a row are of a wrong length.
        """
        r = random.Random(seed)
        missed = 0
        while missed < 100_000:
            tree = self._draw(r, 1)
            if self.shortest < size(tree) < self.longest:
                missed = 0
                yield tree
            else:
                missed += 1
        raise ValueError(f"ListOps: no tree of {self.shortest} < tokens < {self.longest} in 100,000 draws")

    def rows(self, count: int, seed: int) -> tuple[list[list[int]], list[int]]:
        """(token numbers of each expression, answers); numbers are places in `TOKENS`."""
        number = {token: i for i, token in enumerate(TOKENS)}
        trees = self.trees(seed)
        drawn = [next(trees) for _ in range(count)]
        return [[number[t] for t in written(tree).split()] for tree in drawn], [value(tree) for tree in drawn]

    def _draw(self, r: random.Random, level: int) -> Tree:
        if level >= self.depth or (level > 1 and r.random() < self.digit):
            return r.randrange(10)
        name = OPERATIONS[r.randrange(len(OPERATIONS))]
        return name, tuple(self._draw(r, level + 1) for _ in range(r.randint(*self.args)))


def value(tree: Tree) -> int:
    """What an expression comes to.

    >>> value(("SM", (7, ("MED", (9, 2, 4, 1)), 4)))
    4
    """
    if isinstance(tree, int):
        return tree
    name, arguments = tree
    found = sorted(value(a) for a in arguments)
    if name == "MED":
        middle = len(found) // 2
        return found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) // 2
    return {"MIN": found[0], "MAX": found[-1], "SM": sum(found) % 10}[name]


def written(tree: Tree) -> str:
    """An expression with a space between tokens."""
    return str(tree) if isinstance(tree, int) else " ".join((f"[{tree[0]}", *map(written, tree[1]), "]"))


def size(tree: Tree) -> int:
    """Number of tokens."""
    return 1 if isinstance(tree, int) else 2 + sum(map(size, tree[1]))
