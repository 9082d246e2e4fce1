from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from small_llama import read_results

from foveate.bench import compare, report
from foveate.bench.errors import CompareError
from foveate.bench.subject import load_subject

NAMES = ("dense", "sliding_sinks", "random")


@pytest.fixture(scope="module")
def settings(follower, cycle_file):
    return compare.Settings(
        model=str(follower), text=str(cycle_file), lengths=(512,), mechanisms=NAMES, tokens=2048, needles=1,
        repeats=2, density=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    compare.run(settings, out, command="foveate compare")
    return out


class Told(compare.Quiet):
    def __init__(self, stop_after=None, stop_in=None):
        self.cells, self.lines, self.stop_after, self.stop_in = [], [], stop_after, stop_in

    def step(self, mechanism, length, what, share):
        assert 0 <= share <= 1
        if self.stop_in == (mechanism, what):
            raise KeyboardInterrupt

    def cell(self, cell, number, cells):
        self.cells.append((cell["mechanism"], number, cells))
        if number == self.stop_after:
            raise KeyboardInterrupt

    def say(self, line):
        self.lines.append(line)


def test_results_have_the_documented_shape(finished):
    found = read_results(finished)
    assert found["schema"] == 1
    assert found["kind"] == "foveate.compare"
    assert found["complete"] is True
    assert set(found["identity"]) == {"settings", "model", "text", "machine"}
    assert [c["mechanism"] for c in found["cells"]] == list(NAMES)
    for cell in found["cells"]:
        assert cell["prefill"]["seconds"] > 0
        assert len(cell["prefill"]["pairs"]) == 2
        assert cell["prefill"]["first_seconds"] > 0
        assert cell["prefill"]["ratio"] == pytest.approx(1 / cell["prefill"]["speedup"])
        assert cell["picture"].startswith("data:image/png;base64,")
        assert cell["bpb"]["windows"] == 4
        assert len(cell["bpb"]["by_position"]) == 8
        assert set(cell) >= {"attention_recall", "bpb", "needle"}
        assert not set(cell) & {"kv", "vt", "cwe", "fwe"}  # not asked for
    dense, window, control = found["cells"]
    assert dense["density"] == dense["tiles"] == 1.0
    assert dense["bpb"]["difference"] is None
    assert dense["prefill"]["own"]["seconds"] > 0
    assert window["density"] == pytest.approx(0.3, rel=0.02)
    assert control["density"] == pytest.approx(window["density"], rel=0.02)
    assert control["tiles"] < window["tiles"] < 1


def test_bits_of_a_mechanism_are_those_of_the_masked_model(finished, settings):
    """The window's bits per byte again, through transformers' eager attention with an explicit mask."""
    from foveate.bench import mechanisms as mechs
    from foveate.bench import tasks
    from foveate.bench.texts import load_text

    subject = load_subject(settings.model)
    policy = mechs.policy("sliding_sinks", 512, 0.3, subject.shape).policy
    mask = policy.layout(512).to_dense()
    subject.model.set_attn_implementation("eager")
    bits = size = 0.0
    for window in tasks.token_windows(subject, load_text(settings.text), 512, 4):
        bias = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
        with torch.no_grad():
            logits = subject.model(input_ids=window.ids[None], attention_mask=bias, use_cache=False).logits
        lp = logits[0, :-1].double().log_softmax(-1)
        bits -= float(lp[torch.arange(511), window.ids[1:]].sum()) / float(torch.log(torch.tensor(2.0)))
        size += window.bytes_of[1:].sum()
    cell = read_results(finished)["cells"][1]
    assert cell["bpb"]["value"] == pytest.approx(bits / size, abs=1e-4)
    dense = read_results(finished)["cells"][0]
    assert cell["bpb"]["difference"]["value"] == pytest.approx(bits / size - dense["bpb"]["value"], abs=1e-4)


def test_a_task_that_dense_cannot_do_is_named_and_not_shown(finished):
    found = read_results(finished)
    assert [(g["task"], g["length"]) for g in found["gates"]] == [("needle", 512)]
    assert all(cell["needle"] is None for cell in found["cells"])
    page = report.html(found)
    assert "needle at 512 tokens is not shown: dense reaches 0.00, needed: recall of 0.50" in page


def test_a_model_that_can_do_nothing_is_gated_on_both_tasks_unless_the_gate_is_open(
    noise, settings, tmp_path
):
    told = Told()
    one = dataclasses.replace(settings, model=str(noise), mechanisms=("dense",))
    compare.run(one, tmp_path / "gated", listener=told)
    found = read_results(tmp_path / "gated")
    assert {g["task"] for g in found["gates"]} == {"bpb", "needle"}
    assert len(told.lines) == 2
    assert found["cells"][0]["bpb"] is None
    compare.run(dataclasses.replace(one, gate=0.0), tmp_path / "open")
    cell = read_results(tmp_path / "open")["cells"][0]
    assert cell["bpb"]["value"] > 4
    assert cell["needle"] | {"low": 0, "high": 0} == {
        "recall": 0.0, "hits": 0, "n": 5, "low": 0, "high": 0,
        "by_depth": [{"depth": d, "hits": 0, "n": 1} for d in (0.0, 0.25, 0.5, 0.75, 1.0)],
    }  # fmt: skip


@pytest.mark.parametrize("stop", [{"stop_after": 1}, {"stop_in": ("sliding_sinks", "bits per byte")}])
def test_resume_measures_only_what_is_missing(settings, tmp_path, stop):
    settings = dataclasses.replace(settings, tasks=("bpb",), repeats=1)
    with pytest.raises(KeyboardInterrupt):
        compare.run(settings, tmp_path, listener=Told(**stop))
    kept = read_results(tmp_path)
    assert kept["complete"] is False
    assert [c["mechanism"] for c in kept["cells"]] == ["dense"]
    with pytest.raises(CompareError, match="unfinished run with 1 cells"):
        compare.run(settings, tmp_path)
    with pytest.raises(CompareError, match=r"other settings.*seed was 0, now 3"):
        compare.run(dataclasses.replace(settings, seed=3), tmp_path, resume=True)
    told = Told()
    compare.run(settings, tmp_path, resume=True, listener=told)
    done = read_results(tmp_path)
    assert told.cells == [("sliding_sinks", 2, 3), ("random", 3, 3)]
    assert done["cells"][0] == kept["cells"][0]
    assert done["complete"] is True
    # a finished run resumes to itself
    compare.run(settings, tmp_path, resume=True)
    assert read_results(tmp_path)["cells"] == done["cells"]


def test_the_model_is_left_with_its_own_attention(settings, follower):
    from foveate.bench import tasks
    from foveate.bench.texts import load_text

    subject = load_subject(str(follower))
    before = subject.model.config._attn_implementation
    work = compare._Work(settings, subject, load_text(settings.text), compare.Quiet())
    work.check()
    assert isinstance(work.plan(512).windows[0], tasks.Window)
    assert subject.model.config._attn_implementation == before


def test_wrong_logits_under_dense_are_refused_before_measuring(settings, tmp_path, monkeypatch):
    import foveate.hf as hf

    def wrong(self, inputs, **_):
        raise hf.CheckError("logits differ from eager")

    monkeypatch.setattr(hf.Handle, "check", wrong)
    with pytest.raises(CompareError, match="logits differ from eager"):
        compare.run(settings, tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (4096,)}, "--lengths 4096: beyond the model's context of 2048 tokens"),
        ({"lengths": (100,)}, "--lengths 100: accepted 256 or more"),
        ({"lengths": ()}, "at least one entry"),
        ({"mechanisms": ("dense", "windw")}, "unknown mechanism 'windw'"),
        ({"tasks": ("bbp",)}, r"unknown task 'bbp' \(did you mean 'bpb'\?\)"),
        ({"density": 0.001}, "--density 0.001: accepted 0.02 to 0.9"),
        ({"lengths": (256,), "density": 0.03}, "mechanism sliding_sinks at --lengths 256: density 3% cannot"),
        ({"repeats": 0}, "--repeats 0"),
        ({"gate": 2.0}, "--gate 2.0"),
        ({"seed": -1}, "--seed -1"),
        ({"dtype": "float8"}, "--dtype float8: accepted float32, bfloat16"),
        ({"text": "/no/such/file"}, "--text /no/such/file: no such file or directory"),
        ({"model": "/no/such/model"}, "--model /no/such/model: no such directory"),
        ({"model": "readr"}, "did you mean 'reader'"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(settings, tmp_path, change, message):
    with pytest.raises(CompareError, match=message) as caught:
        compare.run(dataclasses.replace(settings, **change), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results.json").exists()


def test_directories_that_are_not_models(tmp_path):
    def refused(directory, message):
        with pytest.raises(CompareError, match=message):
            load_subject(str(directory))

    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "a file; give the directory")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "no config.json")
    (empty / "config.json").write_text("{")
    refused(empty, "config.json cannot be read")
    (empty / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (empty / "pytorch_model.bin").write_bytes(b"x")
    refused(empty, r"no \*.safetensors")
    (empty / "model.safetensors").write_bytes(b"not safetensors")
    refused(empty, "cannot be loaded as a causal language model")


def test_a_model_with_its_own_attention_code_is_refused(tmp_path, settings):
    from small_llama import save_tokenizer
    from transformers import BloomConfig, BloomForCausalLM

    vocabulary = save_tokenizer(tmp_path)
    BloomForCausalLM(BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(CompareError, match="cannot switch its attention"):
        compare.run(dataclasses.replace(settings, model=str(tmp_path)), tmp_path / "out")


def test_quick_is_less_of_the_same():
    settings = compare.Settings()
    quick = settings.quick()
    assert quick.tokens * 3 == settings.tokens
    assert quick.needles == 1
    assert quick.mechanisms == settings.mechanisms


def test_attention_recall_is_that_of_the_dense_model(finished, settings):
    """The window's share of eager attention weights, formed whole, in the rows that were drawn."""
    from foveate.bench import mechanisms as mechs
    from foveate.bench import recall, tasks
    from foveate.bench.texts import load_text

    subject = load_subject(settings.model)
    dense, window, control = (cell["attention_recall"] for cell in read_results(finished)["cells"])
    assert dense["value"] == dense["least"] == 1.0
    assert window["layers"] == control["layers"] == [0, 1]
    (first,) = tasks.token_windows(subject, load_text(settings.text), 512, 4)[:1]
    subject.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = subject.model(input_ids=first.ids[None], output_attentions=True, use_cache=False).attentions
    mask = mechs.policy("sliding_sinks", 512, 0.3, subject.shape).policy.layout(512).to_dense()
    rows = recall.sampled_rows(512, compare.RECALL_ROWS, settings.seed)
    for layer, weights in zip(window["heads"], maps, strict=True):
        want = (weights * mask).sum(-1)[0, :, rows].mean(1)
        assert layer == pytest.approx(want.tolist(), abs=1e-4)
    assert window["value"] == pytest.approx(sum(map(sum, window["heads"])) / 8)
    assert window["least"] == min(map(min, window["heads"]))
    assert window["rows"] == 128


def test_all_tasks_are_asked_and_those_dense_cannot_do_are_not_shown(settings, tmp_path):
    told = Told()
    every = dataclasses.replace(
        settings, tasks=("all",), mechanisms=("blocks_mean",), lengths=(1100,), tokens=1100, repeats=1
    )
    compare.run(every, tmp_path, listener=told)
    found = read_results(tmp_path)
    assert found["identity"]["settings"]["tasks"] == list(compare.TASKS)
    assert {g["task"] for g in found["gates"]} == {"needle", "kv", "vt", "cwe", "fwe"}
    assert "vt at 1100 tokens is not shown: dense reaches 0.00, needed: recall of 0.50" in told.lines
    for cell in found["cells"]:
        assert [cell[task] for task in ("kv", "vt", "cwe", "fwe")] == [None] * 4
    page = report.html(found)
    assert "fwe at 1100 tokens is not shown" in page
    assert "Attention kept" in page


def test_questions_are_scored_by_their_parts_and_shown_where_the_gate_is_open(
    settings, tmp_path, monkeypatch
):
    from foveate.bench import tasks

    right = iter([[True, False], [True, True], [False, False], [True, True]] * 2)
    monkeypatch.setattr(tasks, "recalled", lambda logits, question: next(right))
    asked = dataclasses.replace(settings, tasks=("vt",), mechanisms=("random",), repeats=1)
    compare.run(asked, tmp_path)
    dense, control = (cell["vt"] for cell in read_results(tmp_path)["cells"])
    assert dense == control
    assert dense["recall"] == 5 / 8
    assert (dense["hits"], dense["n"], dense["questions"]) == (5, 8, 4)
    assert 0.1 < dense["low"] < 5 / 8 < dense["high"] < 1
    found = read_results(tmp_path)
    assert found["gates"] == []
    page = report.html(found)
    assert "<th>variable tracing</th>" in page
    assert "62%" in page
    assert "Variable tracing</b>: questions in the grammar of RULER" in page
