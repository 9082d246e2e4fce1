"""`foveate bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from foveate.cli.common import Nothing, fail, names, typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

bench = typer.Typer(
    name="bench",
    help="Benchmarks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
            return tuple(int(part) for part in names(value))
        except ValueError:
            raise fail("bench kernels", f"{option} {value}: accepted whole numbers, as in 64,128") from None

    given = {"lengths": numbers("--lengths", lengths), "dims": numbers("--dims", dims)}
    if quick and preset:
        raise fail("bench kernels", "--quick: not with --preset, whose plan is fixed")

    from rich.console import Console

    console = Console()
    with console.status("loading") if console.is_terminal else Nothing():
        from foveate.bench import kernels as benchmark
        from foveate.bench import kernels_plot

    settings = benchmark.Settings(
        preset=preset,
        masks=names(masks) or benchmark.SWEEP,
        dtypes=names(dtypes),
        directions=names(directions),
        engines=names(engines),
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
        raise fail("bench kernels", error) from None
    except OSError as error:
        raise fail("bench kernels", f"{error.filename or out}: {error.strerror or error}") from None
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
