"""`foveate caches`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from foveate.cli.common import Interrupted, click, fail, names


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
@click.option(
    "--length", type=int, default=2048, show_default=True, help="Tokens of each prompt, answer included."
)
@click.option(
    "--policies",
    default="streaming,h2o,snapkv,recycled,oracle,random",
    show_default=True,
    help="Cache policies; a cache that keeps everything is always measured.",
)
@click.option(
    "--budgets", default="0.125,0.25", show_default=True, help="Shares of the tokens that each KV head keeps."
)
@click.option("--per", default="head", show_default=True, help="Who shares a budget: head, layer or model.")
@click.option(
    "--before",
    type=int,
    default=32,
    show_default=True,
    help="Cut the cache so many tokens before the answer; 0: after the question was read.",
)
@click.option("--needles", type=int, default=2, show_default=True, help="Needles at each of five depths.")
@click.option("--windows", type=int, default=4, show_default=True, help="Windows of text.")
@click.option(
    "--decoded", type=int, default=64, show_default=True, help="Tokens decoded at the end of each window."
)
@click.option(
    "--gate",
    type=float,
    default=0.5,
    show_default=True,
    help="Dense needle recall below which needles are not shown.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="foveate-caches",
    show_default=True,
    help="Directory for the results.",
)
@click.option("--resume", is_flag=True, help="Continue the unfinished run in --out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the needles.")
@click.option("--dtype", default="float32", show_default=True, help="float32 or bfloat16.")
@click.option("--threads", type=int, default=0, show_default=True, help="Torch threads; 0: torch's default.")
def caches(
    model: str,
    text: str,
    length: int,
    policies: str,
    budgets: str,
    per: str,
    before: int,
    needles: int,
    windows: int,
    decoded: int,
    gate: float,
    out: Path,
    resume: bool,
    seed: int,
    dtype: str,
    threads: int,
) -> None:
    """What a smaller key/value cache costs a model while it decodes.

    Every policy at every budget: needles found, bits per byte lost on held-out text, bytes held, keys read and
    seconds per token. Results are saved after each; the end is a table, results.json, results.csv and caches.png
    in --out.
    """
    from foveate.bench.errors import CompareError

    try:
        shares = tuple(float(part) for part in names(budgets))
    except ValueError:
        raise fail("caches", f"--budgets {budgets}: accepted numbers, as in 0.125,0.25") from None
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    import transformers

    from foveate.bench import decode

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = decode.Settings(
        model=model,
        text=text,
        length=length,
        policies=names(policies),
        budgets=shares,
        per=per,
        before=before,
        needles=needles,
        windows=windows,
        decoded=decoded,
        gate=gate,
        seed=seed,
        dtype=dtype,
        threads=threads,
    )
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=1.0)

            def say(what: str, share: float) -> None:
                progress.update(bar, description=what, completed=share)

            results = decode.run(settings, out, resume=resume, command=shlex.join(sys.argv), say=say)
    except KeyboardInterrupt:
        raise Interrupted(
            f"foveate caches: stopped; finished cells are in {out}, continue with --resume"
        ) from None
    except (CompareError, ValueError) as error:
        raise fail("caches", error) from None
    _table(console, results, decode.shown(results))
    console.print(str(out))


def _table(console: Any, results: dict[str, Any], shown: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("policy")
    for name in ("budget", "needles", "bits lost", "tokens", "bytes", "keys read", "ms", "speed-up"):
        table.add_column(name, justify="right")
    for cell in results["cells"]:
        table.add_row(
            cell["policy"],
            f"{cell['budget']:.1%}",
            f"{cell['needles']:.2f}" if shown else "-",
            "" if cell["bits_per_byte_lost"] is None else f"{cell['bits_per_byte_lost']:+.3f}",
            f"{cell['tokens_per_head']:.0f}",
            f"{cell['bytes'] / cell['bytes_full']:.1%}",
            f"{cell['keys_read_per_token']:.0f}",
            f"{1000 * cell['seconds_per_token']:.1f}",
            f"{cell['speedup']:.2f}x",
        )
    console.print(table)
    console.print(
        "[dim]bits lost: per byte of text; tokens: per KV head; keys read and ms: per decoded token[/dim]"
    )
    if not shown:
        dense = results["cells"][0]["needles"]
        console.print(f"needles are not shown: with everything kept the model finds {dense:.2f} of them")
