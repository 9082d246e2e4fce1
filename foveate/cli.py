"""The command line: `foveate compare` and `foveate bench`.

Heavy imports wait until a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("foveate's command line needs typer and rich: pip install 'foveate[cli]'") from error

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

app = typer.Typer(
    name="foveate",
    help="Every published attention mechanism, defined once and executed by a few fast engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from foveate import __version__

        typer.echo(f"foveate {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `foveate` command."""
    app()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Every published attention mechanism, defined once and executed by a few fast engines."""


def _fail(command: str, message: object) -> typer.Exit:
    """One line on stderr, exit code 2."""
    typer.echo(f"foveate {command}: {message}", err=True)
    return typer.Exit(2)


def _names(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


@app.command()
def compare(
    model: Annotated[
        str, typer.Option(help="Directory of a local transformers causal LM, or 'reader'.")
    ] = "reader",
    text: Annotated[
        str, typer.Option(help="File or directory of text, or 'stdlib' (held-out modules).")
    ] = "stdlib",
    lengths: Annotated[str, typer.Option(help="Sequence lengths in tokens.")] = "2048,4096",
    mechanisms: Annotated[
        str, typer.Option(help="What to compare; dense is always measured.")
    ] = "dense,sliding_sinks,dilated,power,shards,flexprefill,random",
    tasks: Annotated[str, typer.Option(help="Quality tasks: bpb, needle.")] = "bpb,needle",
    out: Annotated[Path, typer.Option(help="Directory for results.json, report.html, tradeoff.png.")] = Path(
        "foveate-compare"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in --out.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A third of the text, one needle per depth, two timed pairs.")
    ] = False,
    density: Annotated[float, typer.Option(help="Share of the causal pairs every mechanism gets.")] = 0.25,
    tokens: Annotated[int, typer.Option(help="Text tokens scored per length.")] = 24576,
    needles: Annotated[int, typer.Option(help="Needles at each of five depths.")] = 3,
    repeats: Annotated[int, typer.Option(help="Timed pairs of dense and mechanism.")] = 4,
    gate: Annotated[
        float, typer.Option(help="Dense needle recall below which needle is not shown; 0: show all.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of needles, random blocks and intervals.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's default.")] = 0,
) -> None:
    """What restricting attention costs a model in quality, and saves in time and memory.

    Every mechanism at every length: density, prefill seconds against dense (alternating runs), peak memory,
    bits per byte on held-out text, recall of a hidden needle by depth. Results are saved after each; the end
    is a table, results.json, report.html and tradeoff.png in --out.
    """
    from foveate.bench.errors import CompareError

    try:
        numbers = tuple(int(part) for part in _names(lengths))
    except ValueError:
        raise _fail("compare", f"--lengths {lengths}: accepted whole numbers, as in 2048,4096") from None

    from rich.console import Console

    console = Console()
    with console.status("loading") if console.is_terminal else _Nothing():
        import transformers

        from foveate.bench import compare as comparison
        from foveate.bench import report

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = comparison.Settings(
        model=model,
        text=text,
        lengths=numbers,
        mechanisms=_names(mechanisms),
        tasks=_names(tasks),
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
        raise _fail("compare", error) from None
    except OSError as error:
        raise _fail(
            "compare", f"{error.filename or out}: {error.strerror or error}; finished cells are kept"
        ) from None
    except KeyboardInterrupt:
        raise _stopped(out) from None
    found = results.as_dict()
    written = report.write(found, out)
    table = report.table(found)
    (console if console.is_terminal else Console(width=100)).print(table)
    for line in found["gates"]:
        typer.echo(comparison.describe_gate(line))
    for path in [results.path, *written]:
        typer.echo(str(path))
    if out / "tradeoff.png" not in written:
        typer.echo("no tradeoff.png: it needs matplotlib (pip install 'foveate[viz]')")


def _stopped(out: Path) -> typer.Exit:
    typer.echo(f"foveate compare: stopped; finished cells are in {out}, continue with --resume", err=True)
    return typer.Exit(130)


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


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
        typer.echo(line)


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
    from foveate.bench import report

    parts = [
        f"{cell['mechanism']} at {cell['length']}: density {cell['density']:.1%}",
        f"prefill {report.seconds(cell['prefill']['seconds'])} ({cell['prefill']['speedup']:.2f}x)",
    ]
    if cell["bpb"]:
        change = f" ({report.lost(cell['bpb'], plain=True)})" if cell["bpb"]["difference"] else ""
        parts.append(f"{cell['bpb']['value']:.3f} bits/byte{change}")
    if cell["needle"]:
        parts.append(f"needle {cell['needle']['hits']}/{cell['needle']['n']}")
    return ", ".join(parts) + f"  [{report.seconds(cell['seconds'])}]"


# --------------------------------------------------------------------------------------------- bench
bench = typer.Typer(
    name="bench",
    help="Benchmarks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench)


@bench.callback()
def _bench() -> None:
    """Benchmarks of this library beside its peers."""


@bench.command()
def kernels(
    preset: Annotated[
        str, typer.Option(help="targets or linear: a fixed plan; its targets are judged.")
    ] = "",
    masks: Annotated[str, typer.Option(help="Mask names; empty: all but decode.")] = "",
    lengths: Annotated[str, typer.Option(help="Sequence lengths.")] = "1024,2048,4096,8192,16384,32768",
    dims: Annotated[str, typer.Option(help="Head dims.")] = "64,128",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32,bfloat16",
    directions: Annotated[str, typer.Option(help="fwd, and fwd_bwd: forward and backward.")] = "fwd,fwd_bwd",
    engines: Annotated[str, typer.Option(help="Who takes part; empty: all that are installed.")] = "",
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads; 0: as many as query heads.")] = 0,
    rounds: Annotated[int, typer.Option(help="Rounds in which everyone is timed once.")] = 7,
    budget: Annotated[
        float, typer.Option(help="Seconds for the rounds of a case (three are always made).")
    ] = 60.0,
    call_seconds: Annotated[
        float, typer.Option(help="Whose call takes longer is timed once, and no more at greater lengths.")
    ] = 20.0,
    mask_gib: Annotated[float, typer.Option(help="Peers whose mask needs more memory are skipped.")] = 8.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int, typer.Option(help="Torch threads; 0: torch's default.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the CSV and the plots.")] = Path("foveate-bench"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is in the file, measure the rest.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Five masks, N = 1024 and 2048, float32, three rounds.")
    ] = False,
) -> None:
    """Attention engines side by side: time, FLOP/s, share of the matrix-product rate and of the block bound, memory.

    Masks are those of the long-context attention benchmark, neighbourhoods and random blocks. Each case is in the
    CSV before the next begins; the end is a table, plots and, with a preset, every target beside what was measured.
    """
    from foveate.bench.errors import CompareError

    def numbers(option: str, value: str) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in _names(value))
        except ValueError:
            raise _fail("bench kernels", f"{option} {value}: accepted whole numbers, as in 64,128") from None

    given = {"lengths": numbers("--lengths", lengths), "dims": numbers("--dims", dims)}
    if quick and preset:
        raise _fail("bench kernels", "--quick: not with --preset, whose plan is fixed")

    from rich.console import Console

    console = Console()
    with console.status("loading") if console.is_terminal else _Nothing():
        from foveate.bench import kernels as benchmark
        from foveate.bench import kernels_plot

    settings = benchmark.Settings(
        preset=preset,
        masks=_names(masks) or benchmark.SWEEP,
        dtypes=_names(dtypes),
        directions=_names(directions),
        engines=_names(engines),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        rounds=rounds,
        budget=budget,
        call_seconds=call_seconds,
        mask_gib=mask_gib,
        device=device,
        threads=threads,
        **given,
    )
    settings = settings.quick() if quick else settings
    try:
        with _KernelBar(console) if console.is_terminal else _KernelLines() as listener:
            table = benchmark.run(settings, out, resume=resume, listener=listener)
    except CompareError as error:
        raise _fail("bench kernels", error) from None
    except OSError as error:
        raise _fail("bench kernels", f"{error.filename or out}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        typer.echo(
            f"foveate bench kernels: stopped; finished cases are in {out}, continue with --resume", err=True
        )
        raise typer.Exit(130) from None
    rows = list(table.rows.values())
    wide = console if console.is_terminal else Console(width=150)
    wide.print(benchmark.results_table(rows))
    found = benchmark.judged(preset, rows) if preset else None
    if found is not None:
        wide.print(benchmark.targets_table(found))
    typer.echo(str(table.path))
    try:
        for path in kernels_plot.plot(rows, table.path, found):
            typer.echo(str(path))
    except ImportError as error:
        typer.echo(str(error))
    failed = benchmark.failures(rows)
    for line in failed:
        typer.echo(f"foveate bench kernels: {line}", err=True)
    if failed:
        raise typer.Exit(1)


class _KernelLines:
    """Progress of `bench kernels` as plain lines: one per finished case."""

    def __enter__(self) -> _KernelLines:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, cells: int, done: int) -> None:
        if done:
            self.say(f"{done} of {cells} cases are there already")

    def step(self, what: str) -> None: ...

    def cell(self, rows: Any, number: int, cells: int) -> None:
        from foveate.bench import kernels as benchmark

        self.say(f"[{number}/{cells}] {benchmark.summary(rows)}")

    def say(self, line: str) -> None:
        typer.echo(line)


class _KernelBar(_KernelLines):
    """The same on a terminal, under it a bar with the case that runs."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        self.bar: Progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=2,  # drawing must not disturb what is timed
        )
        self.task: TaskID = self.bar.add_task("starting", total=None)

    def __enter__(self) -> _KernelBar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, cells: int, done: int) -> None:
        self.bar.update(self.task, total=cells, completed=done)
        super().start(cells, done)

    def step(self, what: str) -> None:
        self.bar.update(self.task, description=what)

    def cell(self, rows: Any, number: int, cells: int) -> None:
        self.bar.update(self.task, completed=number)
        super().cell(rows, number, cells)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
