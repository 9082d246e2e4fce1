"""Questions about long inputs in the grammar of RULER: key-value pairs, variables, common and frequent words.

Seeded and offline. As for the needle, a question and its answer are one sequence of exactly `length` tokens that goes
through the model once; a part of the answer (a value, a name, a word) counts when the argmax at each of its tokens is
right given the right ones before. So answers have a fixed order, which the question states.

- kv: many lines with a key and a five-digit value, then one of the keys. `reader` gets at most the 12 pairs it was
  trained with, in real text; any other model a text of pairs alone.
- vt: `VAR A = 12345` and four lines `VAR B = VAR A` somewhere in the text, in this order; all names are asked for.
- cwe: a numbered list in which ten words come often and the others a tenth as often; the ten are asked for.
- fwe: coded words, drawn from a zeta distribution with exponent 2, whose most frequent one is a row of dots; the
  three next are asked for.

Source: RULER: What's the Real Context Size of Your Long-Context Language Models? (2024). Differs: the wording; the text
around variables is the text under comparison; common words are made of syllables; answers are ordered.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from foveate.bench.errors import CompareError
from foveate.bench.subject import Subject
from foveate.bench.tasks import Question
from foveate.bench.texts import Text

TASKS = ("kv", "vt", "cwe", "fwe")
TITLES = {
    "kv": "key-value retrieval",
    "vt": "variable tracing",
    "cwe": "common words",
    "fwe": "frequent words",
}
HOPS = 4
COMMON, OFTEN = 10, 30  # common words, and how often each comes where there is room
FREQUENT = 3
ALPHA = 2.0
READER_PAIRS = 12
_UPPER, _LOWER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


class TooShort(Exception):
    """The length holds no question of this kind."""


def questions(task: str, subject: Subject, text: Text, length: int, count: int, seed: int) -> list[Question]:
    """`count` seeded questions of a task, each exactly `length` tokens long, answer included.

    Raises:
        CompareError: the length is too short for the task.
    """
    rng = np.random.default_rng([seed, length, TASKS.index(task)])
    make = _MAKERS[task]
    try:
        return [make(subject, text, length, rng) for _ in range(count)]
    except TooShort:
        raise CompareError(f"task {task} at --lengths {length}: too short to hold a question") from None


def coder(subject: Subject) -> Callable[[str], list[int]]:
    """Text -> token ids, without what a tokenizer puts before every text."""
    if subject.bytes_are_tokens:
        return lambda part: list(part.encode("utf-8"))
    return lambda part: list(subject.tokenizer(part, add_special_tokens=False)["input_ids"])


def beginning(subject: Subject) -> list[int]:
    """What a tokenizer puts before every text, often <bos>."""
    return [] if subject.bytes_are_tokens else list(subject.tokenizer("")["input_ids"])


def ending(subject: Subject, ask: str, answers: Sequence[str]) -> tuple[list[int], Question]:
    """Ids of the question with its answers ("ask a, b, c"), and a `Question` of them alone, with its parts."""
    whole, spans = ask, []
    for answer in answers:
        whole += ", " if spans else " "
        spans.append((len(whole), len(whole) + len(answer)))
        whole += answer
    if subject.bytes_are_tokens:
        ids, offsets = list(whole.encode("utf-8")), [(i, i + 1) for i in range(len(whole.encode("utf-8")))]
    else:
        coded = subject.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(coded["input_ids"]), list(coded["offset_mapping"])
    first = next(i for i, (_, end) in enumerate(offsets) if end > len(ask))
    parts = []
    for low, high in spans:
        mine = [i for i, (a, b) in enumerate(offsets) if a < high and b > low]
        parts.append((mine[0] - first, mine[-1] + 1 - first))
    return ids, Question(torch.tensor(ids), len(ids) - first, 0.0, tuple(parts))


def framed(
    subject: Subject,
    text: Text,
    head: str,
    body: Callable[[int], list[int]],
    end: tuple[list[int], Question],
    length: int,
) -> Question:
    """Head, body, ending; `body` gives at most as many ids as it is told, and the text's first ids go in front."""
    start, begin = beginning(subject), coder(subject)(head)
    room = length - len(start) - len(begin) - len(end[0])
    if room < 1:
        raise TooShort
    middle = body(room)
    if len(middle) > room:
        raise TooShort
    ids = start + haystack(subject, text, room - len(middle), 0) + begin + middle + end[0]
    return Question(torch.tensor(ids), end[1].answer_len, 0.0, end[1].parts)


def haystack(subject: Subject, text: Text, count: int, at: int) -> list[int]:
    """Exactly `count` ids of the text from a character on; a short text is repeated."""
    hay = coder(subject)(text.body[at : at + 16 * count + 16])
    return (hay * (count // max(len(hay), 1) + 1))[:count]


def digits(rng: np.random.Generator) -> str:
    return "".join(str(d) for d in rng.integers(10, size=5))


def words(count: int, rng: np.random.Generator, syllables: int = 3) -> list[str]:
    """Different pronounceable words.

    >>> words(2, np.random.default_rng(0))
    ['tupuna', 'gokebi']
    """
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=syllables))] = None
    return list(found)


def letters(count: int, size: int, alphabet: str, rng: np.random.Generator) -> list[str]:
    """Different random strings."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(alphabet[i] for i in rng.integers(len(alphabet), size=size))] = None
    return list(found)


# -------------------- key-value retrieval


def _kv(subject: Subject, text: Text, length: int, rng: np.random.Generator) -> Question:
    if subject.bytes_are_tokens:
        from foveate.organisms.reader import data

        pairs = min(READER_PAIRS, length // (2 * data.LINE))
        if pairs < 2 or length > len(text.data):
            raise TooShort
        ids, answer = data.needle(length, float(rng.random()), rng, text.data, distractors=pairs - 1)
        return Question(torch.from_numpy(ids), answer.stop - answer.start, 0.0)
    code = coder(subject)
    names = words(max(16, length // 4), rng)
    values = [digits(rng) for _ in names]
    line = "The value of {} is {}.\n"
    head, ask = (
        "Below are names and their values. Remember them.\n\n",
        "\nWhat is the value of {0}? The value of {0} is",
    )
    lines = [code(line.format(n, v)) for n, v in zip(names, values, strict=True)]
    longest = max(len(code(ask.format(n) + " " + v)) for n, v in zip(names, values, strict=True)) + 4
    room = length - len(beginning(subject)) - len(code(head)) - longest
    count = int(np.searchsorted(np.cumsum([len(x) for x in lines]), room, "right"))
    if count < 2:
        raise TooShort
    asked = int(rng.integers(count))
    end = ending(subject, ask.format(names[asked]), [values[asked]])

    def body(room: int) -> list[int]:
        return [i for part in lines[:count] for i in part]

    return framed(subject, text, head, body, end, length)


# -------------------- variable tracing


def _vt(subject: Subject, text: Text, length: int, rng: np.random.Generator) -> Question:
    code = coder(subject)
    names, value = letters(HOPS + 1, 5, _UPPER, rng), digits(rng)
    lines = [f"\nVAR {names[0]} = {value}\n"]
    lines += [f"\nVAR {b} = VAR {a}\n" for a, b in itertools.pairwise(names)]
    coded = [code(line) for line in lines]
    ask = f"\n\nWhich variables have the value {value}? All of them, in the order in which they got it:"
    end = ending(subject, ask, names)

    def body(room: int) -> list[int]:
        fill = room - sum(map(len, coded))
        if fill < 0:
            raise TooShort
        hay = haystack(subject, text, fill, int(rng.integers(max(len(text.body) - 16 * fill, 0) + 1)))
        cuts = [0, *np.sort(rng.integers(fill + 1, size=len(coded))).tolist(), fill]
        out = []
        for i, low in enumerate(cuts[:-1]):
            out += hay[low : cuts[i + 1]] + (coded[i] if i < len(coded) else [])
        return out

    head = "Variables are set in the text below. Keep track of them.\n\n"
    return framed(subject, text, head, body, end, length)


# -------------------- common and frequent words


def _cwe(subject: Subject, text: Text, length: int, rng: np.random.Generator) -> Question:
    code = coder(subject)
    head = "Below is a numbered list of words. Some of them come often. Memorize these.\n\n"
    pool = words(COMMON + max(8, length // 4), rng)
    common = sorted(pool[:COMMON])
    ask = f"\n\nWhich {COMMON} words come most often in the list? In alphabetical order they are:"

    def body(room: int) -> list[int]:
        per = max(len(code(f"{length}. {word} ")) for word in pool[:200])
        entries = room // per
        often = min(OFTEN, 2 * entries // (3 * COMMON))
        if often < 4:
            raise TooShort
        seldom = max(1, often // 10)
        rest = [w for w in pool[COMMON:] for _ in range(seldom)][: entries - often * COMMON]
        listed = common * often + rest
        order = rng.permutation(len(listed))
        parts = [code(f"{i + 1}. {listed[j]} ") for i, j in enumerate(order)]
        return [x for part in parts for x in part]

    return framed(subject, text, head, body, ending(subject, ask, common), length)


def _fwe(subject: Subject, text: Text, length: int, rng: np.random.Generator) -> Question:
    code = coder(subject)
    head = "Below is a text of coded words. Find out which come most often. Dots mean nothing.\n\n"
    ask = f"\n\nWhich {FREQUENT} coded words come most often? The most frequent one first, they are:"
    names = ["...", *letters(300, 6, _LOWER, rng)]
    coded = [code(f" {name}") for name in names]
    longest = sorted(names[1:], key=lambda name: -len(code(f", {name}")))[:FREQUENT]
    room = length - len(beginning(subject)) - len(code(head)) - len(ending(subject, ask, longest)[0])
    for _ in range(500):
        ranks = rng.zipf(ALPHA, size=length) - 1
        ranks = ranks[ranks < len(names)]
        fit = int(np.searchsorted(np.cumsum([len(coded[r]) for r in ranks]), room, "right"))
        counts = Counter(ranks[:fit].tolist())
        counts.pop(0, None)
        top = counts.most_common(FREQUENT + 1)
        if len(top) > FREQUENT and all(a[1] > b[1] for a, b in itertools.pairwise(top)):
            break
    else:
        raise TooShort
    end = ending(subject, ask, [names[r] for r, _ in top[:FREQUENT]])

    def body(room: int) -> list[int]:
        return [x for r in ranks[:fit] for x in coded[r]]

    return framed(subject, text, head, body, end, length)


_MAKERS = {"kv": _kv, "vt": _vt, "cwe": _cwe, "fwe": _fwe}
