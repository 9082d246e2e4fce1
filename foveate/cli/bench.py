"""`foveate bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.common import Nothing, click, fail, names

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@click.group()
def bench() -> None:
    """Benchmarks of this library beside its peers."""


@bench.command()
@click.option("--preset", default="", help="targets or linear: a fixed plan; its targets are judged.")
@click.option("--masks", default="", help="Mask names; empty: all but decode.")
@click.option(
    "--lengths", default="1024,2048,4096,8192,16384,32768", show_default=True, help="Sequence lengths."
)
@click.option("--dims", default="64,128", show_default=True, help="Head dims.")
@click.option("--dtypes", default="float32,bfloat16", show_default=True, help="float32, bfloat16, float16.")
@click.option(
    "--directions", default="fwd,fwd_bwd", show_default=True, help="fwd, and fwd_bwd: forward and backward."
)
@click.option("--engines", default="", help="Who takes part; empty: all that are installed.")
@click.option("--batch", type=int, default=1, show_default=True, help="Batch size.")
@click.option("--heads", type=int, default=8, show_default=True, help="Query heads.")
@click.option(
    "--kv-heads",
    type=int,
    default=0,
    show_default=True,
    help="Key and value heads; 0: as many as query heads.",
)
@click.option(
    "--rounds", type=int, default=7, show_default=True, help="Rounds in which everyone is timed once."
)
@click.option(
    "--budget",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds for the rounds of a case (three are always made).",
)
@click.option(
    "--call-seconds",
    type=float,
    default=20.0,
    show_default=True,
    help="Whose call takes longer is timed once, and no more at greater lengths.",
)
@click.option(
    "--mask-gib",
    type=float,
    default=8.0,
    show_default=True,
    help="Peers whose mask needs more memory are skipped.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@click.option("--threads", type=int, default=0, show_default=True, help="Torch threads; 0: torch's default.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="foveate-bench",
    show_default=True,
    help="Directory for the CSV and the plots.",
)
@click.option("--resume", is_flag=True, help="Keep what is in the file, measure the rest.")
@click.option("--quick", is_flag=True, help="Five masks, N = 1024 and 2048, float32, three rounds.")
def kernels(
    preset: str,
    masks: str,
    lengths: str,
    dims: str,
    dtypes: str,
    directions: str,
    engines: str,
    batch: int,
    heads: int,
    kv_heads: int,
    rounds: int,
    budget: float,
    call_seconds: float,
    mask_gib: float,
    device: str,
    threads: int,
    out: Path,
    resume: bool,
    quick: bool,
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
        click.echo(
            f"foveate bench kernels: stopped; finished cases are in {out}, continue with --resume", err=True
        )
        raise click.exceptions.Exit(130) from None
    rows = list(table.rows.values())
    wide = console if console.is_terminal else Console(width=150)
    wide.print(benchmark.results_table(rows))
    found = benchmark.judged(preset, rows) if preset else None
    if found is not None:
        wide.print(benchmark.targets_table(found))
    click.echo(str(table.path))
    try:
        for path in kernels_plot.plot(rows, table.path, found):
            click.echo(str(path))
    except ImportError as error:
        click.echo(str(error))
    failed = benchmark.failures(rows)
    for line in failed:
        click.echo(f"foveate bench kernels: {line}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


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
        click.echo(line)


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
