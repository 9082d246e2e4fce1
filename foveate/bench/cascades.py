"""Attention as a cascade of Einsums: how often its keys must be read, what stays on chip, what it costs on an array.

Ranks: e width of queries and keys, f of values, p queries, m keys; m is cut into m1 blocks of m0 keys. A tensor whose
first rank is written "m1+1" runs: step m1 of it is the value after that block, and reading it at "m1" gives the value
before. After "FuseMax" (2024). Nothing here is fast: the evaluator exists to check cascades, the rest counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

KINDS = ("naive", "naive_delayed", "three_pass", "two_pass", "one_pass")
OPS = {
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "div": lambda a, b: a / b,
    "max": torch.maximum,
    "exp": torch.exp,
    "exp_diff": lambda a, b: (a - b).exp(),
    "copy": lambda a: a,
}  # how elements meet; "exp_diff" is exp(a - b)
REDUCE = {"sum": lambda x, dims: x.sum(dims), "max": lambda x, dims: x.amax(dims)}
RUNNING = "m1+1"


@dataclass(frozen=True)
class Einsum:
    """One step of a cascade: out[ranks] = reduce over the missing ranks of op(ins).

    Args:
        name: of the tensor that it makes.
        out: its ranks, e.g. ("m", "p").
        ins: (tensor, ranks) of one or two inputs.
        op: one of `OPS`.
        reduce: "sum" or "max" over ranks of the inputs that out lacks; None where it lacks none.
        start: value before the first block, of a running tensor.
        unit: "2d" or "1d": the array of the machine that computes it.
    """

    name: str
    out: tuple[str, ...]
    ins: tuple[tuple[str, tuple[str, ...]], ...]
    op: str = "mul"
    reduce: str | None = None
    start: float | None = None
    unit: str = "2d"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"Einsum {self.name}: op must be one of {', '.join(OPS)}, got {self.op!r}")
        if len(self.ins) != (1 if self.op in ("exp", "copy") else 2):
            raise ValueError(f"Einsum {self.name}: {len(self.ins)} inputs for {self.op!r}")
        missing = self.space - {_plain(r) for r in self.out}
        if self.reduce not in (None, *REDUCE) or bool(missing) != (self.reduce is not None):
            raise ValueError(
                f"Einsum {self.name}: reduce must be {'sum or max' if missing else 'None'}, got {self.reduce!r}"
            )
        if (self.start is not None) != (RUNNING in self.out):
            raise ValueError(
                f"Einsum {self.name}: start is for tensors with rank {RUNNING!r}, and needed there"
            )

    @property
    def iterative(self) -> bool:
        """Whether it runs over blocks: made from its own value before."""
        return RUNNING in self.out

    @property
    def space(self) -> set[str]:
        """The ranks over which it iterates."""
        return {_plain(r) for ranks in (self.out, *(ranks for _, ranks in self.ins)) for r in ranks}


def _plain(rank: str) -> str:
    return rank.removesuffix("+1")


def _holds(ranks: tuple[str, ...], rank: str) -> bool:
    """Whether a tensor keeps rank, whole or by blocks."""
    return any(_plain(r) in (rank, f"{rank}1") for r in ranks)


class Cascade(tuple[Einsum, ...]):
    """Einsums in an order in which each reads only inputs, earlier results and running tensors.

    >>> attention_cascade("three_pass").passes("m"), attention_cascade("one_pass").passes("m")
    (3, 1)
    """

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """Tensors that no Einsum makes, with their ranks as they are read first."""
        made, found = {x.name for x in self}, {}
        for x in self:
            for name, ranks in x.ins:
                if name not in made:
                    found.setdefault(name, ranks)
        return found

    def schedule(self, rank: str = "m") -> dict[str, int]:
        """Einsum -> the pass over `rank` in which it is computed, or after which, if it does not iterate over it.

            pass(X) = max over inputs: pass(made) where the input keeps the rank, pass(made) + 1 where it was reduced

        An input of the cascade is there in pass 1; a running tensor keeps the rank.
        """
        made = {x.name: x for x in self}
        when: dict[str, int] = {}
        for x in self:
            over = bool(x.space & {rank, f"{rank}1", f"{rank}0"})
            found = 1 if over else 0
            for name, ranks in x.ins:
                if name not in made or (name not in when and made[name].iterative):
                    continue  # given, or the running value of the block before
                if name not in when:
                    raise ValueError(f"Cascade: {x.name} reads {name} before it is made")
                complete = not _holds(ranks, rank) and when[name] > 0
                found = max(found, when[name] + (over and complete))
            when[x.name] = found
        return when

    def passes(self, rank: str = "m") -> int:
        """How often every element of a fibre along `rank` must be visited."""
        when = self.schedule(rank)
        return max(when[x.name] for x in self if x.space & {rank, f"{rank}1", f"{rank}0"})

    def live_footprint(self, shapes: Mapping[str, int], rank: str = "m", per: str = "p") -> dict[str, int]:
        """Elements per `per` (a query) that must outlive a step along `rank`, by tensor.

        These are results that a later pass reads again, whole fibres long, and what a pass accumulates: reductions that
        a later Einsum needs within or after the passes, and running tensors. The last Einsum's result leaves the chip.
        """
        when, found = self.schedule(rank), {}
        last = self[-1].name
        for x in self:
            readers = [y for y in self for name, _ in y.ins if name == x.name]
            if x.name == last or not readers:
                continue
            sizes = [shapes[_plain(r)] for r in x.out if _plain(r) != per]
            if x.iterative:
                found[x.name] = prod(shapes[r] for r in x.out if _plain(r) not in (per, "m1"))
            elif _holds(x.out, rank):
                if any(when[y.name] > when[x.name] and y.space & {rank, f"{rank}1"} for y in readers):
                    found[x.name] = prod(sizes)
            elif x.space & {rank, f"{rank}1"}:
                found[x.name] = prod(sizes)
        return found

    def operations(self, shapes: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Einsum -> {"mac" | "mul" | "add" | "max" | "div" | "exp": how many}; a sum of products counts as mac."""
        found: dict[str, dict[str, int]] = {}
        for x in self:
            space = prod(_size(x.space, shapes))
            counts = {"exp": {"add": space, "exp": space}}.get(x.op.removesuffix("_diff"), {x.op: space})
            if x.op == "exp":
                counts = {"exp": space}
            if x.op == "copy":
                counts = {}
            if x.reduce == "sum":
                counts = {"mac": space} if x.op == "mul" else {**counts, "add": counts.get("add", 0) + space}
            elif x.reduce == "max":
                counts = {**counts, "max": counts.get("max", 0) + space}
            found[x.name] = counts
        return found

    def flops(self, shapes: Mapping[str, int]) -> dict[str, int]:
        """Einsum -> arithmetic operations; a mac counts 2, an exp 1."""
        return {
            name: sum(n * (2 if kind == "mac" else 1) for kind, n in counts.items())
            for name, counts in self.operations(shapes).items()
        }

    def evaluate(
        self,
        tensors: Mapping[str, Tensor],
        *,
        block: int | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run it: {tensor: its value}, running tensors with their last value; what lives within a block is left out.

        Args:
            tensors: the inputs, with ranks as in `inputs`, m1 and m0 as one axis m.
            block: keys of a block (the last may be shorter); needed where the cascade has m1.
            state: running tensors to go on from, as an earlier call returned them.

        Raises:
            ValueError: a missing input, or no block.
        """
        missing = set(self.inputs) - set(tensors)
        if missing:
            raise ValueError(
                f"Cascade: inputs {sorted(missing)} are missing; accepted: {sorted(self.inputs)}"
            )
        looped = [x for x in self if "m1" in x.space]
        done: dict[str, Tensor] = {}
        if looped:
            if block is None or block < 1:
                raise ValueError(f"Cascade: block must be an int >= 1, got {block!r}")
            done = self._loop(looped, tensors, block, state or {})
        for x in self:
            if "m1" not in x.space:
                done[x.name] = _apply(x, [(done.get(n, tensors.get(n)), ranks) for n, ranks in x.ins])
        return done

    def _loop(
        self, looped: list[Einsum], tensors: Mapping[str, Tensor], block: int, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        sizes = {r: t.shape[i] for n, ranks in self.inputs.items()
                 for i, r in enumerate(r for r in ranks if r != "m1") for t in (tensors[n],)}  # fmt: skip
        any_input = next(iter(tensors.values()))
        running: dict[str, Tensor] = {}
        for x in looped:
            if x.start is not None:
                shape = [sizes[r] for r in x.out if r != RUNNING]
                running[x.name] = state.get(x.name, any_input.new_full(shape, x.start))
        axes = {
            n: [r for r in ranks if r != "m1"].index("m0")
            for n, ranks in self.inputs.items()
            if "m1" in ranks
        }
        chunks = {n: tensors[n].split(block, axis) for n, axis in axes.items()}
        for step in range(len(next(iter(chunks.values())))):
            before, now = dict(running), {}
            for x in looped:
                ins = []
                for name, ranks in x.ins:
                    held = tuple(r for r in ranks if _plain(r) != "m1")
                    if name in chunks:
                        value = chunks[name][step]
                    elif name in running:
                        value = (now if RUNNING in ranks else before)[name]
                    else:
                        value = now[name] if name in now else tensors[name]
                    ins.append((value, held))
                out = tuple(r for r in x.out if _plain(r) != "m1")
                now[x.name] = _apply(x, ins, out)
                if x.iterative:
                    running[x.name] = now[x.name]
        return running


def _apply(x: Einsum, ins: list, out: tuple[str, ...] | None = None) -> Tensor:
    """Align by ranks, map, reduce."""
    out = x.out if out is None else out
    space = [*out, *dict.fromkeys(r for _, ranks in ins for r in ranks if r not in out)]
    if x.op == "mul" and x.reduce == "sum":
        letters = {r: chr(97 + i) for i, r in enumerate(space)}
        left = ",".join("".join(letters[r] for r in ranks) for _, ranks in ins)
        return torch.einsum(f"{left}->{''.join(letters[r] for r in out)}", *(t for t, _ in ins))
    wide = []
    for t, ranks in ins:
        have = [r for r in space if r in ranks]
        t = t.permute([ranks.index(r) for r in have])
        wide.append(t.reshape([t.shape[have.index(r)] if r in have else 1 for r in space]))
    value = OPS[x.op](*wide)
    return value if x.reduce is None else REDUCE[x.reduce](value, tuple(range(len(out), len(space))))


def _size(ranks: set[str], shapes: Mapping[str, int]) -> list[int]:
    """Sizes of ranks; m1 and m0 together are m, whose last block may be short."""
    both = {"m1", "m0"} <= ranks
    return [shapes["m"] if both and r == "m1" else shapes[r] for r in ranks if not (both and r == "m0")]


def attention_shapes(queries: int, keys: int, dim: int, values: int, block: int = 256) -> dict[str, int]:
    """Rank -> size, for `live_footprint`, `operations` and `accelerator_cost`."""
    return {"e": dim, "f": values, "p": queries, "m": keys, "m1": ceil(keys / block), "m0": min(block, keys)}


def attention_cascade(kind: str) -> Cascade:
    """Softmax attention AV[f, p] from Q[e, p], K[e, m], V[f, m] (scale left to Q), written in one of five ways.

    Args:
        kind: "naive" exp without a maximum; "naive_delayed" divides after the sum over keys; "three_pass" as softmax
            is usually written; "two_pass" divides late; "one_pass" runs over blocks with a running maximum.

    >>> {kind: attention_cascade(kind).passes() for kind in KINDS}
    {'naive': 2, 'naive_delayed': 1, 'three_pass': 3, 'two_pass': 2, 'one_pass': 1}
    """
    if kind not in KINDS:
        raise ValueError(f"attention_cascade: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "one_pass":
        return _one_pass()
    mp, p, fp, m_f = ("m", "p"), ("p",), ("f", "p"), ("f", "m")
    logits = Einsum("QK", mp, (("Q", ("e", "p")), ("K", ("e", "m"))), "mul", "sum")
    largest = [Einsum("GM", p, (("QK", mp),), "copy", "max", unit="1d")]
    numerator = Einsum("SN", mp, (("QK", mp), ("GM", p)), "exp_diff", unit="1d")
    if kind.startswith("naive"):
        largest, numerator = [], Einsum("SN", mp, (("QK", mp),), "exp", unit="1d")
    total = Einsum("SD", p, (("SN", mp),), "copy", "sum", unit="1d")
    if kind in ("naive", "three_pass"):
        rest = [
            Einsum("A", mp, (("SN", mp), ("SD", p)), "div", unit="1d"),
            Einsum("AV", fp, (("A", mp), ("V", m_f)), "mul", "sum"),
        ]
    else:
        rest = [
            Einsum("SNV", fp, (("SN", mp), ("V", m_f)), "mul", "sum"),
            Einsum("AV", fp, (("SNV", fp), ("SD", p)), "div", unit="1d"),
        ]
    return Cascade([logits, *largest, numerator, total, *rest])


def _one_pass() -> Cascade:
    tile, row, after, p, fp = ("m1", "m0", "p"), ("m1", "p"), (RUNNING, "p"), ("p",), ("f", "p")
    wide, wide_after = ("m1", "f", "p"), (RUNNING, "f", "p")
    return Cascade([
        Einsum("BQK", tile, (("Q", ("e", "p")), ("K", ("e", "m1", "m0"))), "mul", "sum"),
        Einsum("LM", row, (("BQK", tile),), "copy", "max"),
        Einsum("RM", after, (("RM", row), ("LM", row)), "max", start=-torch.inf, unit="1d"),
        Einsum("SLN", tile, (("BQK", tile), ("RM", after)), "exp_diff"),
        Einsum("SLD", row, (("SLN", tile),), "copy", "sum"),
        Einsum("SLNV", wide, (("SLN", tile), ("V", ("f", "m1", "m0"))), "mul", "sum"),
        Einsum("PRM", row, (("RM", row), ("RM", after)), "exp_diff", unit="1d"),
        Einsum("SPD", row, (("RD", row), ("PRM", row)), "mul", unit="1d"),
        Einsum("RD", after, (("SLD", row), ("SPD", row)), "add", start=0.0, unit="1d"),
        Einsum("SPNV", wide, (("RNV", wide), ("PRM", row)), "mul", unit="1d"),
        Einsum("RNV", wide_after, (("SLNV", wide), ("SPNV", wide)), "add", start=0.0, unit="1d"),
        Einsum("AV", fp, (("RNV", fp), ("RD", p)), "div", unit="1d"),
    ])  # fmt: skip


def merge_running(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The running state (RM, RD, RNV) of one_pass over two sets of keys, from the states over each."""
    top = torch.maximum(a["RM"], b["RM"])
    left, right = ((s["RM"] - torch.where(top > -torch.inf, top, 0.0)).exp() for s in (a, b))
    return {"RM": top, "RD": a["RD"] * left + b["RD"] * right, "RNV": a["RNV"] * left + b["RNV"] * right}


class KeyBuffer:
    """A buffer of a fixed size between memory and chip: least recently used blocks make room; counts what is loaded.

    >>> buffer = KeyBuffer(2)
    >>> for block in (0, 1, 0, 2, 1):
    ...     buffer.read("K", block, size=1)
    >>> buffer.loaded
    {'K': 4}
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.held: OrderedDict[tuple[str, int], int] = OrderedDict()
        self.loaded: dict[str, int] = {}

    def read(self, tensor: str, block: int, size: int) -> None:
        """Have a block of `size` elements at hand."""
        key = (tensor, block)
        if key in self.held:
            self.held.move_to_end(key)
            return
        self.loaded[tensor] = self.loaded.get(tensor, 0) + size
        self.held[key] = size
        self.used += size
        while self.used > self.size and len(self.held) > 1:
            self.used -= self.held.popitem(last=False)[1]


def key_traffic(cascade: Cascade, shapes: Mapping[str, int], buffer: int) -> dict[str, int]:
    """Elements of each input along m that a group of queries loads, when nothing of rank m is kept but inputs.

    Every pass goes through the blocks of m0 keys in order and reads, through a `KeyBuffer` of `buffer` elements, the
    inputs from which the Einsums of that pass follow, those of earlier passes along m being computed again.
    """
    when, made = cascade.schedule("m"), {x.name: x for x in cascade}

    def needed(x: Einsum, seen: set[str]) -> set[str]:
        found: set[str] = set()
        for name, ranks in x.ins:
            if not _holds(ranks, "m") or name in seen:
                continue
            seen.add(name)
            found |= needed(made[name], seen) if name in made else {name}
        return found

    store, block, m = KeyBuffer(buffer), shapes["m0"], shapes["m"]
    for number in range(1, cascade.passes("m") + 1):
        read = set().union(*(
            needed(x, {x.name}) for x in cascade if when[x.name] == number and x.space & {"m", "m1"}
        ))  # fmt: skip
        for i in range(ceil(m / block)):
            for name in sorted(read):
                width = prod(shapes[r] for r in cascade.inputs[name] if r not in ("m", "m1", "m0"))
                store.read(name, i, width * min(block, m - i * block))
    return store.loaded


@dataclass(frozen=True)
class SpatialMachine:
    """An array of multipliers beside a line of them, with one buffer.

    Args:
        pe_2d, pe_1d: processing elements; each does one operation per cycle.
        buffer_bytes: on chip, for inputs and what is live.
        bandwidth: bytes per cycle from memory.
        word: bytes of an element.
        exp_cycles: of one exponential, beside the subtraction.
        queries: held on chip at a time.
    """

    pe_2d: tuple[int, int] = (256, 256)
    pe_1d: int = 256
    buffer_bytes: int = 16 << 20
    bandwidth: float = 430.0
    word: int = 2
    exp_cycles: int = 6
    queries: int = 256


def accelerator_cost(
    cascade: Cascade, shapes: Mapping[str, int], machine: SpatialMachine | None = None
) -> dict[str, object]:
    """Cycles of a cascade on a machine: {"cycles": {Einsum: n}, "compute", "traffic" (bytes), "total", "utilisation"
    (of the 2-D array), "spilled" (bytes of it), "bound": "compute" | "memory"}.

    one_pass overlaps as the accelerator's mapping does,

        max(QK + LM, RD + RNV + AV) + RM + max(SLN + SLD, PRM + SPD) + max(SLNV, SPNV),

    other cascades overlap the two arrays wholly, which favours them. Q, K, V and AV cross the pins once; where the live
    fibres of `queries` queries do not fit into the buffer, those tensors are written out and read once in each later
    pass that needs them.
    """
    machine = machine or SpatialMachine()
    width = {"2d": prod(machine.pe_2d), "1d": machine.pe_1d}
    cycles: dict[str, float] = {}
    for x, counts in zip(cascade, cascade.operations(shapes).values(), strict=True):
        work = sum(n * (machine.exp_cycles if kind == "exp" else 1) for kind, n in counts.items())
        cycles[x.name] = work / width[x.unit]
    c = cycles
    sums = {unit: sum(cycles[x.name] for x in cascade if x.unit == unit) for unit in width}
    if any(x.iterative for x in cascade):
        compute = (
            max(c["BQK"] + c["LM"], c["RD"] + c["RNV"] + c["AV"]) + c["RM"]
            + max(c["SLN"] + c["SLD"], c["PRM"] + c["SPD"]) + max(c["SLNV"], c["SPNV"])
        )  # fmt: skip
    else:
        compute = max(sums.values())
    live = cascade.live_footprint(shapes)
    spilled = 0
    if machine.queries * sum(live.values()) * machine.word > machine.buffer_bytes:
        when = cascade.schedule("m")
        for x in cascade:
            if x.name in live and not x.iterative and _holds(x.out, "m"):
                later = {when[y.name] for y in cascade for name, _ in y.ins if name == x.name} - {
                    when[x.name]
                }
                spilled += (1 + len(later)) * live[x.name] * shapes["p"] * machine.word
    io = shapes["p"] * (shapes["e"] + shapes["f"]) + shapes["m"] * (shapes["e"] + shapes["f"])
    traffic = io * machine.word + spilled
    memory = traffic / machine.bandwidth
    total = max(compute, memory)
    return {
        "cycles": cycles,
        "compute": compute,
        "traffic": traffic,
        "spilled": spilled,
        "total": total,
        "utilisation": sums["2d"] / total,
        "bound": "compute" if compute >= memory else "memory",
    }
