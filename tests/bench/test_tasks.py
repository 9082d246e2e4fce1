from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_llama import CYCLE, cycle_text

from foveate.bench import tasks
from foveate.bench.errors import CompareError
from foveate.bench.mechanisms import Shape
from foveate.bench.subject import Subject, load_subject
from foveate.bench.texts import Text, order0_entropy


def byte_subject() -> Subject:
    """What the tasks need of the organism `reader`, without its weights."""
    return Subject("reader", None, None, True, 4096, Shape(4, 2), {}, True)


# -------------------- bits per byte


def test_bits_per_byte_equal_an_independent_computation(follower):
    subject = load_subject(str(follower))
    text = Text("mixed", "abc déjà vu 漢字 ", 1)
    text = Text("mixed", text.body * 40, 1)
    (window,) = tasks.token_windows(subject, text, 300, 1)
    logits = subject.logits(window.ids)[0]
    bits, size = tasks.window_bits(logits, window)
    # one softmax at a time, in Python floats
    total = 0.0
    for t in range(1, 300):
        row = logits[t - 1].double().tolist()
        top = max(row)
        norm = math.log(sum(math.exp(x - top) for x in row)) + top
        total += (norm - row[int(window.ids[t])]) / math.log(2)
    assert bits.sum() == pytest.approx(total, rel=1e-5)
    # the tokenizer has one token per byte, so 299 predicted tokens are 299 bytes, up to a cut last character
    assert abs(size.sum() - 299) <= 3
    assert tasks.Bits(bits[None], size[None]).per_byte == pytest.approx(total / size.sum(), rel=1e-5)


def test_bytes_of_tokens_are_utf8_bytes_not_characters(follower):
    subject = load_subject(str(follower))
    (window,) = tasks.token_windows(subject, Text("t", "漢" * 200, 1), 256, 1)
    assert window.bytes_of[:255].sum() == 255  # three tokens spell one character of three bytes


def test_longer_tokens_count_all_their_bytes():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, merges=[("a", "b"), ("ab", "c")])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    subject = Subject(
        "t", None, PreTrainedTokenizerFast(tokenizer_object=core), False, None, Shape(1, 1), {}, True
    )
    (window,) = tasks.token_windows(subject, Text("t", "abcab" * 500, 1), 256, 1)
    assert window.bytes_of.tolist() == [3, 2] * 128
    _, size = tasks.window_bits(torch.zeros(256, 5), window)
    assert size.sum() == 5 * 128 - 3  # the first token is given, not predicted


def test_windows_are_disjoint_and_spread_over_the_text():
    body = "".join(chr(33 + i % 90) for i in range(10_000))
    windows = tasks.token_windows(byte_subject(), Text("t", body, 1), 1000, 4)
    starts = [body.encode().find(bytes(w.ids.to(torch.uint8).tolist())) for w in windows]
    assert len(windows) == 4
    assert bytes(windows[-1].ids.to(torch.uint8).tolist()) == body.encode()[-1000:]
    assert all(len(w.ids) == 1000 for w in windows)
    assert starts[0] == 0
    assert len(tasks.token_windows(byte_subject(), Text("t", body, 1), 4000, 8)) == 2  # no more than fit


def test_windows_of_a_text_without_lines_differ(follower):
    text = Text("t", "".join(chr(33 + i * i % 89) for i in range(9000)), 1)
    one, two = tasks.token_windows(load_subject(str(follower)), text, 500, 2)
    assert not torch.equal(one.ids, two.ids)


def test_text_shorter_than_a_window_is_refused(follower):
    with pytest.raises(CompareError, match=r"--text short.*too short.*--lengths 500"):
        tasks.token_windows(byte_subject(), Text("short", "x" * 499, 1), 500, 1)
    with pytest.raises(CompareError, match="too short"):
        tasks.token_windows(load_subject(str(follower)), Text("short", "x" * 499, 1), 500, 1)


def test_paired_difference():
    dense = tasks.Bits(np.full((4, 2), 100.0), np.full((4, 2), 50.0))
    mine = tasks.Bits(dense.bits + np.array([[1.0], [2.0], [3.0], [4.0]]), dense.bytes)
    value, low, high = tasks.paired_difference(mine, dense)
    assert value == pytest.approx(2 * 10 / 400)
    assert low is not None
    assert high is not None
    assert 2 * 1 / 100 <= low < value < high <= 2 * 4 / 100
    few = tasks.Bits(dense.bits[:2], dense.bytes[:2])
    assert tasks.paired_difference(few, few) == (0.0, None, None)


def test_order0_entropy_is_that_of_the_byte_frequencies():
    assert order0_entropy(bytes(range(256))) == pytest.approx(8.0)
    assert order0_entropy(b"aaab") == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


# -------------------- needle


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_reader_questions_are_exact_in_length_seeded_and_at_their_depth(depth):
    text = Text("t", "x = 1\n" * 1000, 1)
    make = lambda seed: tasks.questions(byte_subject(), text, 700, [depth], 3, seed)  # noqa: E731
    asked = make(0)
    assert [len(q.ids) for q in asked] == [700] * 3
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(asked, make(0), strict=True))
    assert not torch.equal(asked[0].ids, make(1)[0].ids)
    body = bytes(asked[0].ids.to(torch.uint8).tolist())
    question, answer = body[-20:-5].rsplit(b"\n", 1)[-1], body[-asked[0].answer_len :]
    assert answer.isdigit()
    at = body.find(question + answer)  # where the key was defined
    assert at < 680
    assert abs(at / 680 - depth) < 0.15


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_passkey_questions_hold_the_key_and_end_with_it(follower, depth):
    subject = load_subject(str(follower))
    for question in tasks.questions(subject, Text("t", cycle_text(9000), 1), 600, [depth], 2, 0):
        body = subject.tokenizer.decode(question.ids)
        answer = subject.tokenizer.decode(question.ids[-question.answer_len :])
        assert len(question.ids) == 600
        assert answer.strip().isdigit()
        assert body.endswith("The pass key is" + answer)
        assert f"The pass key is {answer.strip()}. Remember it" in body
        first = body.index("\nThe pass key is")
        assert abs((first - 58) / (600 - 58 - 120) - depth) < 0.1


def test_too_short_for_a_passkey_is_refused(follower):
    with pytest.raises(CompareError, match="task needle at --lengths 100"):
        tasks.questions(load_subject(str(follower)), Text("t", CYCLE * 50, 1), 100, [0.5], 1, 0)


def test_recall_needs_every_answer_token_at_its_own_position():
    question = tasks.Question(torch.tensor([9, 9, 9, 1, 2, 3]), 3, 0.5)

    def logits(*predicted: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(predicted), 10).float()

    assert tasks.is_recalled(logits(1, 2, 3, 7), question)  # the last row predicts what comes after
    assert not tasks.is_recalled(logits(1, 2, 4, 3), question)
    assert not tasks.is_recalled(logits(7, 1, 2, 3), question)  # shifted by one


def test_needle_counts_of_a_model_that_knows_half_of_the_answers(monkeypatch):
    """A model by hand: it predicts the next token it is given, but only when that token's id is even."""
    from contextlib import nullcontext

    from foveate.bench import compare

    class Half:
        device = torch.device("cpu")

        def __call__(self, input_ids, use_cache, logits_to_keep):
            following = torch.roll(input_ids, -1, 1)
            rows = torch.nn.functional.one_hot(following, 256).float()
            rows[following % 2 == 1] = 0  # argmax is then id 0, which is never a digit
            return SimpleNamespace(logits=rows[:, -logits_to_keep:])

    subject = Subject("hand", Half(), None, True, None, Shape(1, 1), {}, True)
    settings = compare.Settings(depths=(0.0, 1.0), needles=40)
    work = compare._Work(settings, subject, Text("t", "x = 1\n" * 1000, 1), compare.Quiet())
    monkeypatch.setattr(work, "_applied", lambda policy: nullcontext())
    monkeypatch.setattr(compare.recall, "samples", lambda *_: [])
    plan = work.plan(300)
    found = work._needle("dense", plan, lambda what, share: None)
    even = [all(int(i) % 2 == 0 for i in q.ids[-5:]) for q in plan.questions]
    assert found["hits"] == sum(even)
    assert 0 < found["hits"] < found["n"] == 80
    assert [d["hits"] for d in found["by_depth"]] == [sum(even[:40]), sum(even[40:])]
    assert found["low"] < found["recall"] < found["high"]
