"""The command line: quick help, exit codes, one line for what the user can put right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from small_llama import cycle_text, tiny_llama

from foveate.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def follower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("follower"), follows=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "<b>cycle.txt"
    path.write_text(cycle_text(6000), encoding="utf-8")
    return path


def test_help_names_the_command_and_loads_nothing_heavy():
    code = (
        "import sys, foveate.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "compare" in shown.output
    options = runner.invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output
    for name in ("--model", "--text", "--lengths", "--mechanisms", "--tasks", "--out", "--resume", "--quick"):
        assert name in options


def test_version():
    from foveate import __version__

    shown = runner.invoke(app, ["--version"])
    assert (shown.exit_code, shown.output.strip()) == (0, f"foveate {__version__}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mechanisms", "dense,slidng_sinks"], "did you mean 'sliding_sinks'?"),
        (["--tasks", "bpb,neddle"], "did you mean 'needle'?"),
        (["--lengths", "2k"], "--lengths 2k: accepted whole numbers"),
        (["--lengths", ""], "at least one entry"),
        (["--text", "/no/such"], "--text /no/such: no such file"),
        (["--model", "/no/such"], "--model /no/such: no such directory"),
        (["--threads", "-1"], "--threads -1"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_exit_code_2(tmp_path, text, arguments, message):
    given = arguments if "--text" in arguments else ["--text", str(text), *arguments]
    shown = runner.invoke(app, ["compare", "--out", str(tmp_path / "out"), *given])
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert len(shown.stderr.strip().splitlines()) == 1
    assert shown.stderr.startswith("foveate compare: ")
    assert message in shown.stderr
    assert not (tmp_path / "out").exists()


def test_not_text_is_refused(tmp_path, follower):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    shown = runner.invoke(app, ["compare", "--model", str(follower), "--text", str(tmp_path / "x.bin")])
    assert shown.exit_code == 2
    assert "not UTF-8" in shown.stderr


def test_out_that_cannot_be_written(tmp_path, follower, text):
    (tmp_path / "file").write_text("kept")
    shown = runner.invoke(
        app,
        ["compare", "--model", str(follower), "--text", str(text), "--lengths", "512", "--mechanisms",
         "dense", "--out", str(tmp_path / "file")],
    )  # fmt: skip
    assert shown.exit_code == 2
    assert "cannot be written" in shown.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_a_whole_run_as_a_process_and_resume_of_a_finished_one(tmp_path, follower, text):
    out = tmp_path / "out"
    arguments = [
        "compare", "--model", str(follower), "--text", str(text), "--lengths", "512", "--mechanisms",
        "sliding_sinks", "--tokens", "1024", "--needles", "1", "--repeats", "1", "--out", str(out),
    ]  # fmt: skip
    command = [sys.executable, "-c", "from foveate.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("[1/2] dense at 512: density 100.0%")
    assert lines[1].startswith("needle at 512 tokens is not shown: dense reaches 0.00")
    assert max(map(len, (line for line in lines if "│" in line or "─" in line)), default=0) <= 100
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert found["complete"] is True
    assert found["command"].startswith("foveate compare --model")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<b>cycle" not in page
    assert "&lt;b&gt;cycle" in page
    again = runner.invoke(app, [*arguments, "--resume"])
    assert again.exit_code == 0
    assert "2 of 2 cells are there already" in again.output


def test_a_kill_keeps_the_finished_cells_and_resume_completes(tmp_path, follower, text, monkeypatch):
    from foveate.bench import compare

    out = tmp_path / "out"
    arguments = [
        "compare", "--model", str(follower), "--text", str(text), "--lengths", "512", "--mechanisms",
        "dense,random", "--tasks", "bpb", "--tokens", "1024", "--repeats", "1", "--out", str(out),
    ]  # fmt: skip
    whole = compare._Work.cell

    def killed(self, name, plan, dense):
        if name == "random":
            raise KeyboardInterrupt
        return whole(self, name, plan, dense)

    monkeypatch.setattr(compare._Work, "cell", killed)
    stopped = runner.invoke(app, arguments)
    assert stopped.exit_code == 130
    assert "continue with --resume" in stopped.stderr
    assert len(json.loads((out / "results.json").read_text())["cells"]) == 1
    refused = runner.invoke(app, arguments)
    assert refused.exit_code == 2
    assert "unfinished run" in refused.stderr
    monkeypatch.setattr(compare._Work, "cell", whole)
    assert runner.invoke(app, [*arguments, "--seed", "5", "--resume"]).exit_code == 2
    done = runner.invoke(app, [*arguments, "--resume"])
    assert done.exit_code == 0
    assert "1 of 2 cells are there already" in done.output
    assert [c["mechanism"] for c in json.loads((out / "results.json").read_text())["cells"]] == [
        "dense",
        "random",
    ]


def test_defaults_of_the_options_are_those_of_the_settings():
    import inspect

    from foveate.bench.compare import Settings
    from foveate.cli.compare import compare

    options = {name: p.default for name, p in inspect.signature(compare).parameters.items()}
    for name, value in vars(Settings()).items():
        if name in options:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            assert options[name] == shown, name


def test_a_terminal_gets_a_bar(follower, text, tmp_path):
    from rich.console import Console

    from foveate.bench import compare
    from foveate.cli.compare import _Bar

    console = Console(force_terminal=True, width=120, record=True)
    settings = compare.Settings(
        model=str(follower), text=str(text), lengths=(512,), mechanisms=("dense",), tasks=("bpb",),
        tokens=1024, repeats=1,
    )  # fmt: skip
    with _Bar(console) as bar:
        compare.run(settings, tmp_path, listener=bar)
    shown = console.export_text()
    assert "[1/1] dense at 512: density 100.0%" in shown
