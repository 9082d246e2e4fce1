"""The questions in RULER's grammar: answers worked out again from the text alone."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch

from foveate.bench import ruler, tasks
from foveate.bench.errors import CompareError
from foveate.bench.mechanisms import Shape
from foveate.bench.subject import Subject, load_subject
from foveate.bench.texts import Text

TEXT = Text("t", "".join(f"line {i} holds nothing of note\n" for i in range(3000)), 1)


def byte_subject() -> Subject:
    return Subject("reader", None, None, True, 4096, Shape(4, 2), {}, True)


def merging_subject() -> Subject:
    """A tokenizer with long tokens and one token in front of every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    words = " ".join(ruler.words(200, np.random.default_rng(5)))
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(
        [TEXT.body[:4000], words, "VAR The value of is 12345. Which words come"], trainer
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return Subject(
        "t", None, PreTrainedTokenizerFast(tokenizer_object=core), False, None, Shape(1, 1), {}, True
    )


SUBJECTS = {"bytes": byte_subject(), "merges": merging_subject()}


def decoded(subject: Subject, ids) -> str:
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return bytes(ids).decode() if subject.bytes_are_tokens else subject.tokenizer.decode(ids)


def answers(subject: Subject, question: tasks.Question) -> list[str]:
    answer = question.ids[-question.answer_len :]
    return [decoded(subject, answer[a:b]).strip(" ,") for a, b in question.parts or ((0, len(answer)),)]


def truth(task: str, body: str) -> list[str]:
    """What a careful reader of the whole text before the answer would say."""
    if task == "kv":
        asked = re.search(r"The value of (\w+) is$", body)
        if asked is None:  # the organism's grammar
            key = re.search(r"# key (\w+)=$", body)[1]
            return [re.search(rf"# key {key}=(\d+)\n", body)[1]]
        return [re.search(rf"The value of {asked[1]} is (\d+)\.\n", body)[1]]
    if task == "vt":
        value = re.search(r"have the value (\d+)\?", body)[1]
        found = [re.search(rf"VAR (\w+) = {value}\n", body)[1]]
        while step := re.search(rf"VAR (\w+) = VAR {found[-1]}\n", body):
            found.append(step[1])
        return found
    if task == "cwe":
        counts = Counter(re.findall(r"\d+\. ([a-z]+) ", body)).most_common()
        assert counts[9][1] > counts[10][1]
        return sorted(word for word, _ in counts[:10])
    list_of = body[body.index("mean nothing.\n\n") : body.rindex("\n\nWhich")]
    counts = Counter(w for w in list_of.split() if re.fullmatch(r"[a-z]{6}", w)).most_common(4)
    assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]
    assert list_of.count("...") > counts[0][1]
    return [word for word, _ in counts[:3]]


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.parametrize("length", [1021, 2053])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_answer_is_what_the_text_says(task, length, kind):
    subject = SUBJECTS[kind]
    asked = ruler.questions(task, subject, TEXT, length, 3, 0)
    assert [len(q.ids) for q in asked] == [length] * 3
    for question in asked:
        body = decoded(subject, question.ids[: -question.answer_len])
        assert answers(subject, question) == truth(task, body.removeprefix("<bos>"))
        if kind == "merges":
            assert question.ids[0] == subject.tokenizer("")["input_ids"][0]
    again = ruler.questions(task, subject, TEXT, length, 3, 0)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(asked, again, strict=True))
    assert not torch.equal(asked[0].ids, ruler.questions(task, subject, TEXT, length, 1, 1)[0].ids)
    assert not torch.equal(asked[0].ids, asked[1].ids)


def test_the_variables_stand_in_order_and_spread_over_the_text():
    found = []
    for question in ruler.questions("vt", byte_subject(), TEXT, 4000, 20, 3):
        body = decoded(byte_subject(), question.ids[: -question.answer_len])
        at = [m.start() / 4000 for m in re.finditer("VAR [A-Z]+ = ", body)]
        assert len(at) == 5
        found.append(at)
    found = torch.tensor(found)
    assert bool((found.diff(dim=1) > 0).all())
    assert found[:, 0].mean() < 0.35
    assert found[:, -1].mean() > 0.65


def test_common_words_come_thirty_times_where_there_is_room():
    (question,) = ruler.questions("cwe", byte_subject(), TEXT, 9000, 1, 0)
    body = decoded(byte_subject(), question.ids)
    counts = Counter(re.findall(r"\d+\. ([a-z]+) ", body))
    assert sorted(counts.values())[-10:] == [30] * 10
    assert max(sorted(counts.values())[:-10]) == 3


def test_a_kv_question_of_a_tokenizer_is_full_of_pairs():
    subject = SUBJECTS["merges"]
    (question,) = ruler.questions("kv", subject, TEXT, 2000, 1, 0)
    body = decoded(subject, question.ids)
    pairs = re.findall(r"The value of (\w+) is (\d{5})\.\n", body)
    assert len(dict(pairs)) == len(pairs) > 60
    assert len(body[: body.index("Below are")]) < 200  # hardly any other text


@pytest.mark.parametrize("task", ruler.TASKS)
def test_too_short_is_one_line(task):
    with pytest.raises(CompareError, match=f"task {task} at --lengths 50: too short"):
        ruler.questions(task, byte_subject(), TEXT, 50, 1, 0)


def test_parts_are_counted_one_by_one():
    question = tasks.Question(torch.tensor([9, 9, 1, 2, 0, 3, 4]), 5, 0.0, ((0, 2), (3, 5)))

    def logits(*predicted: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(predicted), 10).float()

    assert tasks.recalled(logits(1, 2, 0, 3, 4, 7), question) == [True, True]
    assert tasks.recalled(logits(1, 2, 9, 3, 4, 7), question) == [
        True,
        True,
    ]  # the separator is not asked for
    assert tasks.recalled(logits(1, 2, 0, 3, 5, 7), question) == [True, False]
    assert tasks.recalled(logits(9, 1, 2, 0, 3, 4), question) == [False, False]  # shifted by one
    assert tasks.is_recalled(logits(1, 2, 9, 3, 4, 7), question)
    assert not tasks.is_recalled(logits(1, 2, 0, 3, 5, 7), question)


def test_a_byte_tokenizer_of_transformers_reads_the_same(follower):
    subject = load_subject(str(follower))
    (question,) = ruler.questions("vt", subject, TEXT, 700, 1, 0)
    body = decoded(subject, question.ids)
    assert answers(subject, question) == truth("vt", body)
