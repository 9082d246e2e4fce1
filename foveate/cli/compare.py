"""`foveate compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.common import Interrupted, Nothing, click, fail, names

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@click.command()
@click.option(
    "--model",
    default="reader",
    show_default=True,
    help="Directory of a local transformers causal LM, or 'reader'.",
)
@click.option(
    "--text",
    default="stdlib",
    show_default=True,
    help="File or directory of text, or 'stdlib' (held-out modules).",
)
@click.option("--lengths", default="2048,4096", show_default=True, help="Sequence lengths in tokens.")
@click.option(
    "--mechanisms",
    default="dense,sliding_sinks,dilated,power,shards,flexprefill,random",
    show_default=True,
    help="What to compare, or 'all'; dense is always measured.",
)
@click.option(
    "--tasks", default="bpb,needle", show_default=True, help="bpb, needle, kv, vt, cwe, fwe; or 'all'."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="foveate-compare",
    show_default=True,
    help="Directory for results.json, report.html, tradeoff.png.",
)
@click.option("--resume", is_flag=True, help="Continue the unfinished run in --out.")
@click.option("--quick", is_flag=True, help="A third of the text, one needle per depth, two timed pairs.")
@click.option(
    "--density",
    type=float,
    default=0.25,
    show_default=True,
    help="Share of the causal pairs every mechanism gets.",
)
@click.option("--tokens", type=int, default=24576, show_default=True, help="Text tokens scored per length.")
@click.option("--needles", type=int, default=3, show_default=True, help="Needles at each of five depths.")
@click.option("--repeats", type=int, default=4, show_default=True, help="Timed pairs of dense and mechanism.")
@click.option(
    "--gate",
    type=float,
    default=0.5,
    show_default=True,
    help="Dense recall below which needles and questions are not shown; 0: show all.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of needles, random blocks and intervals."
)
@click.option("--dtype", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option("--threads", type=int, default=0, show_default=True, help="Torch threads; 0: torch's default.")
def compare(
    model: str,
    text: str,
    lengths: str,
    mechanisms: str,
    tasks: str,
    out: Path,
    resume: bool,
    quick: bool,
    density: float,
    tokens: int,
    needles: int,
    repeats: int,
    gate: float,
    seed: int,
    dtype: str,
    threads: int,
) -> None:
    """What restricting attention costs a model in quality, and saves in time and memory.

    Every mechanism at every length: density, prefill seconds against dense (alternating runs), peak memory,
    attention recall against the dense map, bits per byte on held-out text, recall of a hidden needle by depth,
    and with --tasks all key-value retrieval, variable tracing, common and frequent words. A task that the dense
    model cannot do is named and not shown. Results are saved after each cell; the end is a table, results.json,
    report.html and tradeoff.png in --out.
    """
    from foveate.bench.errors import CompareError

    try:
        numbers = tuple(int(part) for part in names(lengths))
    except ValueError:
        raise fail("compare", f"--lengths {lengths}: accepted whole numbers, as in 2048,4096") from None

    from rich.console import Console

    console = Console()
    with console.status("loading") if console.is_terminal else Nothing():
        import transformers

        from foveate.bench import compare as comparison
        from foveate.bench import report

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = comparison.Settings(
        model=model,
        text=text,
        lengths=numbers,
        mechanisms=names(mechanisms),
        tasks=names(tasks),
        density=density,
        tokens=tokens,
        needles=needles,
        repeats=repeats,
        gate=gate,
        seed=seed,
        dtype=dtype,
        threads=threads,
    )
    settings = settings.quick() if quick else settings
    listener = _Bar(console) if console.is_terminal else _Lines()
    command = "foveate " + shlex.join(sys.argv[1:])
    try:
        with listener:
            results = comparison.run(settings, out, resume=resume, command=command, listener=listener)
    except CompareError as error:
        raise fail("compare", error) from None
    except OSError as error:
        raise fail(
            "compare", f"{error.filename or out}: {error.strerror or error}; finished cells are kept"
        ) from None
    except KeyboardInterrupt:
        raise _stopped(out) from None
    found = results.as_dict()
    written = report.write(found, out)
    table = report.table(found)
    (console if console.is_terminal else Console(width=report.table_width(found))).print(table)
    for line in found["gates"]:
        click.echo(comparison.describe_gate(line))
    for path in [results.path, *written]:
        click.echo(str(path))
    if out / "tradeoff.png" not in written:
        click.echo("no tradeoff.png: it needs matplotlib (pip install 'foveate[viz]')")


def _stopped(out: Path) -> Interrupted:
    return Interrupted(f"foveate compare: stopped; finished cells are in {out}, continue with --resume")


class _Lines:
    """Progress as plain lines: one per finished cell."""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, cells: int, done: int) -> None:
        if done:
            self.say(f"{done} of {cells} cells are there already")

    def step(self, mechanism: str, length: int, what: str, share: float) -> None: ...

    def cell(self, cell: dict[str, Any], number: int, cells: int) -> None:
        self.say(f"[{number}/{cells}] {_summary(cell)}")

    def say(self, line: str) -> None:
        click.echo(line)


class _Bar:
    """Progress as a bar on a terminal, with a line above it for each finished cell."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        self.bar: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,  # drawing must not disturb what is timed
        )
        self.task: TaskID | None = None
        self.done = 0

    def __enter__(self) -> _Bar:
        self.bar.start()
        self.task = self.bar.add_task("loading the model, fitting densities", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, cells: int, done: int) -> None:
        assert self.task is not None
        self.done = done
        self.bar.update(self.task, total=cells, completed=done)
        if done:
            self.say(f"{done} of {cells} cells are there already")

    def step(self, mechanism: str, length: int, what: str, share: float) -> None:
        assert self.task is not None
        self.bar.update(
            self.task, completed=self.done + share, description=f"{mechanism} at {length}: {what}"
        )

    def cell(self, cell: dict[str, Any], number: int, cells: int) -> None:
        assert self.task is not None
        self.done = number
        self.bar.update(self.task, completed=number)
        self.say(f"[{number}/{cells}] {_summary(cell)}")

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _summary(cell: dict[str, Any]) -> str:
    from foveate.bench import report, ruler

    parts = [
        f"{cell['mechanism']} at {cell['length']}: density {cell['density']:.1%}",
        f"recall {report.kept(cell)}",
        f"prefill {report.seconds(cell['prefill']['seconds'])} ({cell['prefill']['speedup']:.2f}x)",
    ]
    if cell["bpb"]:
        change = f" ({report.lost(cell['bpb'], plain=True)})" if cell["bpb"]["difference"] else ""
        parts.append(f"{cell['bpb']['value']:.3f} bits/byte{change}")
    if cell["needle"]:
        parts.append(f"needle {cell['needle']['hits']}/{cell['needle']['n']}")
    parts += [f"{task} {cell[task]['recall']:.0%}" for task in ruler.TASKS if cell.get(task)]
    return ", ".join(parts) + f"  [{report.seconds(cell['seconds'])}]"
