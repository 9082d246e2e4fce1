"""The kernel benchmark: counts, refusals, guards, the CSV and its resumption, targets, plots. Nothing is timed here."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from foveate.bench import kernels, kernels_peers, kernels_table
from foveate.bench.errors import CompareError
from foveate.bench.kernels import Settings
from foveate.bench.kernels_measure import Guards, difference, measure
from foveate.bench.kernels_peers import PEERS, Cell, Peer, Ready
from foveate.bench.kernels_plot import plot
from foveate.bench.kernels_table import COLUMNS, Table, read
from foveate.bench.kernels_targets import PRESETS, Rows, plan_of, slope
from foveate.cli import app

runner = CliRunner()
FEW = Guards(rounds=3)
SMALL = Settings(
    masks=("causal", "document_full"), lengths=(128,), dims=(16,), dtypes=("float32",), directions=("fwd",),
    engines=("native", "sdpa", "sdpa_mask"), heads=2, rounds=3, device="cpu",
)  # fmt: skip


def invented(cell, engines, known, **_):
    """Rows as `measure` makes them, with figures that follow from the case instead of a clock."""
    rows = []
    for place, engine in enumerate(engines):
        step = cell.length**1.0 * (1 + place) / 100
        rows.append(
            {
                "case": cell.name, "engine": engine, "mask": cell.mask, "direction": cell.direction,
                "dtype": cell.dtype, "batch_size": cell.batch, "heads": cell.heads, "kv_heads": cell.kv_heads,
                "q_len": cell.q_len, "k_len": cell.length, "head_dim": cell.dim, "status": "ok",
                "step_time": step, "step_time_q1": step, "step_time_q3": step, "rounds": 3,
                "gflops_per_sec": 100.0 / (1 + place), "matmul_gflops_per_sec": 120.0, "share_of_matmul": 0.875,
                "share_of_block_bound": 0.8, "tile_share": 1.0, "peak_mem": cell.length / 64,
                "process_mem": 9000.0,
            }
        )  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------------- one case
def by_engine(rows):
    return {row["engine"]: row for row in rows}


def test_flops_are_those_of_the_allowed_pairs():
    cell = Cell("sliding_window_causal_512", 1024, dim=32, heads=4, kv_heads=2, batch=3)
    area = sum(min(i + 1, 512) for i in range(1024))
    assert cell.gflops(area) == pytest.approx(4 * 32 * area * 4 * 3 / 1e9)
    both = replace(cell, direction="fwd_bwd")
    assert both.gflops(area) == pytest.approx(3.5 * cell.gflops(area))


def test_a_measured_case_has_every_figure_and_the_same_results():
    cell = Cell("document_full", 200, dim=16, heads=4, kv_heads=2)
    rows = by_engine(measure(cell, ("native", "sdpa_mask", "sdpa"), [], guards=FEW))
    native, masked = rows["native"], rows["sdpa_mask"]
    lengths = kernels.MASKS["document_full"](200, "cpu")[0].layout(200)
    assert native["status"] == masked["status"] == "ok"
    assert native["area"] == lengths.area == int(lengths.to_dense().sum())
    assert native["density"] == pytest.approx(lengths.area / 200**2)
    assert native["tile_share"] == lengths.nnz / 16
    assert native["rounds"] == 3
    assert native["step_time_q1"] <= native["step_time"] <= native["step_time_q3"]
    assert native["gflops_per_sec"] == pytest.approx(native["gflops"] / native["step_time"] * 1e3)
    for column in (
        "share_of_matmul",
        "share_of_block_bound",
        "dense_step_time",
        "mask_time",
        "first_step_time",
    ):
        assert native[column] > 0, column
    assert "share_of_block_bound" not in masked
    assert masked["difference"] < 1e-5
    assert native["inputs_mem"] == pytest.approx(4 * 16 * (4 * 200 + 2 * 2 * 200) / 2**20)
    assert rows["sdpa"]["status"].startswith("refused: without a mask")
    assert set(native) <= set(COLUMNS)


def test_backward_of_all_inputs_is_run_and_compared():
    rows = by_engine(
        measure(Cell("causal", 100, 8, direction="fwd_bwd", heads=2, kv_heads=2), ("sdpa",), [], guards=FEW)
    )
    assert rows["sdpa"]["status"] == "ok"
    assert rows["sdpa"]["gflops"] == pytest.approx(3.5 * 4 * 8 * 5050 * 2 / 1e9)


def test_decoding_has_one_query():
    cell = Cell("decode", 300, 16, heads=4, kv_heads=2)
    rows = by_engine(measure(cell, ("native", "sdpa"), [], guards=FEW))
    assert cell.q_len == 1
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["native"]["area"] == 300
    assert rows["sdpa"]["difference"] < 1e-5


def test_refusals_carry_the_engine_s_own_reason(monkeypatch):
    from foveate.core.engines import native

    monkeypatch.setattr(native, "why_not", lambda request: "it is resting today")
    rows = by_engine(
        measure(
            Cell("causal", 64, 8, heads=2, kv_heads=2), ("native", "sdpa_mask", "natten", "sdpa_flash"), [],
            guards=FEW,
        )
    )  # fmt: skip
    assert rows["native"]["status"] == "refused: it is resting today"
    assert "step_time" not in rows["native"]
    assert rows["sdpa_mask"]["status"].startswith("refused: a mask would only hide")
    assert rows["natten"]["status"] == "refused: natten is not installed"
    assert rows["sdpa_flash"]["status"] == "refused: it does not run on cpu"
    flex = by_engine(measure(Cell("causal", 64, 8, direction="fwd_bwd"), ("torch_flex",), [], guards=FEW))
    assert flex["torch_flex"]["status"] == "refused: FlexAttention has no backward on CPU"


def test_results_that_differ_and_failures_are_told_and_not_timed(monkeypatch):
    def wrong(task):
        return Ready(lambda: torch.zeros_like(task.q))

    def broken(task):
        raise KeyError("no such thing")

    def nan(task):
        return Ready(lambda: torch.full_like(task.q, torch.nan))

    for name, prepare in (("wrong", wrong), ("broken", broken), ("nan", nan)):
        monkeypatch.setitem(PEERS, name, Peer(name, "", prepare, ours=True))
    rows = by_engine(measure(Cell("full", 64, 8), ("sdpa", "wrong", "broken", "nan"), [], guards=FEW))
    assert rows["sdpa"]["status"] == "ok"
    assert rows["wrong"]["status"].startswith("differs: by 1 ")
    assert rows["nan"]["status"].startswith("differs")
    assert rows["broken"]["status"] == "failed: KeyError: 'no such thing'"
    assert not any("step_time" in rows[name] for name in ("wrong", "broken", "nan"))
    texts = [{name: kernels_table.cell_text(row.get(name)) for name in COLUMNS} for row in rows.values()]
    assert [line.split(": ")[1] for line in kernels.failures(texts)] == ["wrong", "broken", "nan"]


def test_difference_is_relative_to_each_result():
    a = [torch.tensor([0.0, 100.0]), torch.tensor([1.0])]
    b = [torch.tensor([1.0, 100.0]), torch.tensor([1.0])]
    assert difference(a, b) == pytest.approx(0.01)


def test_guards_leave_out_what_would_take_too_long_or_too_much():
    cell = Cell("sliding_window_causal_512", 2048, 8, heads=2, kv_heads=2)
    rows = by_engine(measure(cell, ("sdpa_mask",), [], guards=replace(FEW, mask_gib=0.001)))
    assert rows["sdpa_mask"]["status"].startswith("skipped: its mask needs about")
    shorter = [
        {name: kernels_table.cell_text(row.get(name)) for name in COLUMNS}
        for row in invented(replace(cell, length=1024), ("sdpa_mask", "native"), [])
    ]
    for row in shorter:
        row["step_time"] = "8000"
    shorter += [{**row, "k_len": "256", "q_len": "256", "step_time": "1"} for row in shorter]  # less like it
    rows = by_engine(measure(cell, ("sdpa_mask", "native"), shorter, guards=FEW))
    assert rows["sdpa_mask"]["status"] == "skipped: a call would take about 32 s, the guard is 20 s"
    assert rows["native"]["status"] == "ok"  # by visited tiles: 8 s * 0.24 * 4
    once = by_engine(measure(cell, ("sdpa_mask",), [], guards=replace(FEW, call_seconds=1e-9)))["sdpa_mask"]
    assert (once["status"], once["rounds"]) == ("ok", 1)


# -------------------------------------------------------------------------------------- the CSV
def start(tmp_path, resume=False, **changes):
    return kernels.run(replace(SMALL, **changes), tmp_path, resume=resume, measure=invented)


def test_the_csv_has_timm_s_columns_first_and_its_environment(tmp_path):
    table = start(tmp_path)
    with table.path.open(newline="") as file:
        lines = list(csv.reader(file))
    assert tuple(lines[0]) == COLUMNS
    assert lines[0][0] == "case"
    assert {"batch_size", "step_time", "cpu", "threads", "isa", "torch", "commit", "date"} <= set(lines[0])
    assert len(lines) == 1 + 2 * 3
    assert table.path.name.startswith("benchmark-kernels-pt")
    row = next(iter(table.rows.values()))
    assert row["device"] == "cpu"
    assert row["torch"] == torch.__version__
    assert row["cpu"]


def test_an_unresumed_run_does_not_touch_a_file(tmp_path):
    table = start(tmp_path)
    before = table.path.read_bytes()
    with pytest.raises(CompareError, match="is there with 6 rows; add --resume"):
        start(tmp_path)
    assert table.path.read_bytes() == before


def test_resume_measures_only_what_is_missing(tmp_path):
    start(tmp_path)
    seen = []

    def watched(cell, engines, known, **rest):
        seen.append(cell.name)
        return invented(cell, engines, known)

    kernels.run(SMALL, tmp_path, resume=True, measure=watched)
    assert seen == []
    more = replace(SMALL, masks=("causal", "document_full", "full"))
    table = kernels.run(more, tmp_path, resume=True, measure=watched)
    assert seen == ["full-fwd-float32-b1-h2-n128-d16"]
    assert len(table.rows) == len(read(table.path)) == 9


def test_a_torn_line_is_dropped_and_its_case_measured_again(tmp_path):
    table = start(tmp_path)
    text = table.path.read_text()
    lines = text.splitlines(keepends=True)
    table.path.write_text("".join(lines[:5]) + lines[5][:40])
    seen = []

    def watched(cell, engines, known, **rest):
        seen.append(cell.mask)
        return invented(cell, engines, known)

    again = kernels.run(SMALL, tmp_path, resume=True, measure=watched)
    assert seen == ["document_full"]
    assert len(read(again.path)) == 6
    assert again.path.read_text().count("\n") == 7


def test_a_torn_header_is_refused(tmp_path):
    table = start(tmp_path)
    table.path.write_text("case,engine")
    with pytest.raises(CompareError, match="columns are not those"):
        start(tmp_path, resume=True)


def test_a_stopped_run_keeps_its_finished_cases(tmp_path):
    def stops(cell, engines, known, **rest):
        if cell.mask == "document_full":
            raise KeyboardInterrupt
        return invented(cell, engines, known)

    with pytest.raises(KeyboardInterrupt):
        kernels.run(SMALL, tmp_path, measure=stops)
    path = next(tmp_path.glob("*.csv"))
    assert {case.split("-")[0] for case, _ in read(path)} == {"causal"}


def test_resume_says_that_rows_are_of_another_commit(tmp_path):
    table = start(tmp_path)
    for row in table.rows.values():
        row["commit"] = "0123abc"
    table.append([])  # nothing changes on disk
    assert "0123abc" not in table.path.read_text()
    table._rewrite()
    said = []

    class Listener(kernels.Silent):
        def say(self, line):
            said.append(line)

    kernels.run(SMALL, tmp_path, resume=True, measure=invented, listener=Listener())
    assert "holds rows measured at 0123abc, now" in said[0]


def test_resume_refuses_another_machine(tmp_path):
    table = start(tmp_path)
    table.path.write_text(table.path.read_text().replace(torch.__version__, "1.0"))
    with pytest.raises(CompareError, match=r"measured elsewhere \(torch was '1.0'"):
        start(tmp_path, resume=True)


def test_a_row_is_one_line_and_knows_its_columns(tmp_path):
    table = Table.open(tmp_path / "x.csv", {}, resume=False)
    table.append([{"case": "a", "engine": "b", "status": 'failed: "x",\n y'}])
    assert table.path.read_text().count("\n") == 2
    assert read(table.path)["a", "b"]["status"] == 'failed: "x", y'
    with pytest.raises(ValueError, match="unknown columns"):
        table.append([{"case": "a", "engine": "b", "speed": 1}])


def test_a_measured_run_from_end_to_end(tmp_path):
    table = kernels.run(SMALL, tmp_path)
    assert [row["status"].split(":")[0] for row in table.rows.values()] == [
        "ok", "ok", "refused", "ok", "refused", "ok",
    ]  # fmt: skip
    assert not kernels.failures(table.rows.values())


# ------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": ("causl",)}, "unknown name in --masks 'causl' (did you mean 'causal'"),
        ({"dtypes": ("float",)}, "unknown name in --dtypes 'float'"),
        ({"directions": ("bwd",)}, "unknown name in --directions 'bwd'"),
        ({"engines": ("nativ",)}, "unknown name in --engines 'nativ' (did you mean 'native'"),
        ({"preset": "target"}, "unknown name in --preset 'target' (did you mean 'targets'?)"),
        ({"lengths": (32,)}, "--lengths 32: accepted whole numbers of at least 64"),
        ({"lengths": ()}, "--lengths: nothing named"),
        ({"heads": 6, "kv_heads": 4}, "--kv-heads 4: accepted divisors of --heads 6"),
        ({"rounds": 0}, "--rounds 0: accepted"),
        ({"budget": 0.0}, "--budget 0: accepted numbers above 0"),
        ({"device": "tpu"}, "unknown name in --device 'tpu'"),
    ],
)
def test_errors_name_the_option_and_what_is_accepted(changes, message, tmp_path):
    with pytest.raises(CompareError) as error:
        replace(SMALL, **changes).check()
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(CompareError, match="torch sees no CUDA device"):
        replace(SMALL, device="cuda").check()


def test_the_sweep_covers_the_product_and_decodes_only_forward():
    settings = replace(
        SMALL, masks=("causal", "decode"), lengths=(64, 128), dims=(64, 128), directions=("fwd", "fwd_bwd")
    )
    cells = [cell for cell, _ in settings.check().plan()]
    assert len(cells) == 2 * 2 * 3
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.length for cell in cells] == sorted(cell.length for cell in cells)


def test_peers_by_device():
    assert kernels_peers.defaults("cpu")[:3] == ("native", "sdpa", "sdpa_mask")
    assert {"flex", "sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "torch_flex"} <= set(
        kernels_peers.defaults("cuda")
    )


# -------------------------------------------------------------------------------------- targets
def texts(plan):
    return [
        {name: kernels_table.cell_text(row.get(name)) for name in COLUMNS}
        for cell, engines in plan
        for row in invented(cell, engines, [])
    ]


def test_targets_read_the_rows_that_the_preset_writes():
    plan = Settings(preset="targets", device="cpu").check().plan()
    assert len({cell.name for cell, _ in plan}) == len(plan)
    found = kernels.judged("targets", texts(plan))
    assert all(value is not None for _, value in found)
    by_text = {target.what: (target, value) for target, value in found}
    target, value = by_text["dense forward float32, D=64: share of the matrix-product rate"]
    assert (value, target.met(value)) == (87.5, True)
    target, value = by_text["window 512 forward+backward, N=8192: over SDPA with a mask"]
    assert (value, target.met(value)) == (pytest.approx(2.0), False)
    target, value = by_text["dense forward+backward float32: over SDPA"]
    assert (value, target.met(value)) == (pytest.approx(2.0), True)
    target, value = by_text["window 512: growth of time, 8192 to 1048576 tokens"]
    assert (value, target.met(value), target.met(1.2), target.met(0.8)) == (
        pytest.approx(1),
        True,
        False,
        False,
    )
    target, value = by_text["window 512: peak memory of the process at 1048576 tokens"]
    assert (value, target.met(value)) == (pytest.approx(9000 * 2**20 / 1e9), True)
    assert target.met(12.5) is False


def test_a_target_whose_case_was_refused_is_not_measured():
    rows = texts(plan_of(PRESETS["linear"]()))
    rows[0]["status"] = "refused: x"
    values = [value for _, value in kernels.judged("linear", rows)]
    assert values[:3] == [None, None, None]
    assert values[3] is not None
    assert Rows(rows).get(Cell("causal", 64), "native", "step_time") is None
    shown = [target.met(value) for target, value in kernels.judged("linear", rows)]
    assert shown == [None, None, None, True]


def test_growth_in_matrix_products_is_free_of_the_machine_s_drift():
    rows = texts(plan_of(PRESETS["linear"]()))
    for place, row in enumerate(rows):  # ever slower
        drift = 1.1**place
        row["step_time"] = str(float(row["step_time"]) * drift)
        row["matmul_gflops_per_sec"] = str(float(row["matmul_gflops_per_sec"]) / drift)
    raw, free = (value for _, value in kernels.judged("linear", rows)[:2])
    assert raw > 1.1
    assert free == pytest.approx(1.0)


def test_the_slope_is_an_exponent():
    assert slope([1, 10, 100], [5, 500, 50000]) == pytest.approx(2)


# ---------------------------------------------------------------------------------------- plots
def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_a_sweep_is_drawn_per_direction_dtype_and_dim(tmp_path):
    settings = replace(SMALL, masks=("causal", "full", "document_full"), lengths=(128, 256), dims=(16, 32))
    rows = texts(settings.plan())
    rows[0]["status"] = "refused: x"
    written = plot(rows, tmp_path / "a.csv")
    assert [path.name for path in written] == ["a-fwd-float32-d16.png", "a-fwd-float32-d32.png"]
    assert all(is_png(path) for path in written)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name for path in written]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_is_drawn_beside_its_targets(tmp_path, preset):
    rows = texts(plan_of(PRESETS[preset]()))
    written = plot(rows, tmp_path / "b.csv", kernels.judged(preset, rows))
    assert [path.name for path in written] == ["b.png"]
    assert is_png(written[0])


def test_nothing_measured_draws_nothing(tmp_path):
    assert plot([], tmp_path / "c.csv") == []


# ----------------------------------------------------------------------------------- the command
ARGUMENTS = [
    "bench", "kernels", "--masks", "causal,document_full", "--lengths", "128", "--dims", "16", "--dtypes",
    "float32", "--directions", "fwd", "--engines", "native,sdpa,sdpa_mask", "--heads", "2", "--rounds", "3",
    "--device", "cpu",
]  # fmt: skip


def test_the_command_writes_csv_and_plot_and_resumes(tmp_path):
    out = tmp_path / "out"
    done = runner.invoke(app, [*ARGUMENTS, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "[2/2] document_full-fwd-float32-b1-h2-n128-d16: native" in done.output
    assert "sdpa refused" in done.output
    assert len(list(out.glob("*.csv"))) == 1
    assert len(list(out.glob("*.png"))) == 1
    refused = runner.invoke(app, [*ARGUMENTS, "--out", str(out)])
    assert refused.exit_code == 2
    assert "add --resume" in refused.stderr
    again = runner.invoke(app, [*ARGUMENTS, "--out", str(out), "--resume"])
    assert again.exit_code == 0
    assert "2 of 2 cases are there already" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "causl"], "did you mean 'causal'"),
        (["--lengths", "2k"], "--lengths 2k: accepted whole numbers"),
        (["--preset", "linear", "--quick"], "--quick: not with --preset"),
        (["--engines", "natve"], "did you mean 'native'"),
    ],
)
def test_what_the_user_can_put_right_is_one_line_and_exit_code_2(arguments, message, tmp_path):
    shown = runner.invoke(app, ["bench", "kernels", *arguments, "--out", str(tmp_path)])
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_a_preset_prints_every_target(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.run, "__kwdefaults__", {**kernels.run.__kwdefaults__, "measure": invented})
    done = runner.invoke(
        app, ["bench", "kernels", "--preset", "targets", "--device", "cpu", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    flat = " ".join(done.output.split())
    for target in PRESETS["targets"]():
        assert target.what in flat
    assert "missed" in flat
    assert "met" in flat
    assert [path.name[:25] for path in tmp_path.glob("*.csv")] == ["benchmark-kernels-targets"]


def test_a_failing_engine_of_ours_fails_the_command(tmp_path, monkeypatch):
    def fails(cell, engines, known, **_):
        rows = invented(cell, engines, known)
        rows[0]["status"] = "failed: RuntimeError: x"
        return rows

    monkeypatch.setattr(kernels.run, "__kwdefaults__", {**kernels.run.__kwdefaults__, "measure": fails})
    done = runner.invoke(app, [*ARGUMENTS, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "native: failed: RuntimeError: x" in done.stderr


def test_help_names_the_options_and_loads_nothing_heavy():
    code = "import sys, foveate.cli; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shown = runner.invoke(app, ["bench", "kernels", "--help"], env={"COLUMNS": "200"}).output
    for name in ("--masks", "--lengths", "--dims", "--dtypes", "--directions", "--engines", "--rounds", "--out",
                 "--resume", "--quick", "--preset"):  # fmt: skip
        assert name in shown


def test_a_terminal_gets_a_bar(tmp_path):
    from rich.console import Console

    from foveate.cli.bench import _KernelBar

    console = Console(force_terminal=True, width=120, record=True)
    with _KernelBar(console) as bar:
        kernels.run(SMALL, tmp_path, listener=bar, measure=invented)
    assert "[2/2] document_full" in console.export_text()


def test_defaults_of_the_options_are_those_of_the_settings():
    import inspect

    from foveate.cli.bench import kernels as command

    options = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    for name, value in vars(Settings()).items():
        if name in options and name != "masks":
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            assert options[name] == shown, name
