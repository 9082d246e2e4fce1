"""Search over the catalogue: SQLite's full-text index (porter stems, BM25 with a weight per field) and, around it, what
people who do not know the name of a thing need: synonyms of the field, misspelt and half-typed words, compounds.

    score(paper) = sum over the words of the query of  max over the forms f of the word  weight(f) * BM25F(paper, f)
                   + the same for neighbouring words as phrases

A form is the word itself, a synonym, a word of the catalogue it may be a misspelling or the beginning of, or its two
halves. Exact names, aliases and titles come first whatever the score.
"""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from foveate.catalogue.entry import Entry, tomllib
from foveate.catalogue.store import HOME, Catalogue

# table -> (weight of its score, {field: weight of a hit in it}); what describes a paper, and what else is said of it
TABLES = {
    "front": (
        1.0,
        {"title": 3.0, "name": 3.0, "aliases": 3.0, "idea": 2.0, "phrases": 2.0, "contribution": 1.0},
    ),
    "back": (0.3, {"claim": 1.0, "mechanism": 1.0, "rest": 1.0}),
}
SYNONYM, MISSPELT, PREFIX, HALVES, PHRASE = 0.4, 0.8, 0.6, 0.8, 0.5
TERM_SYNONYM, TERM_WORD = 0.6, 0.5
COVERAGE = 0.3  # how far a paper that has only some of the words falls behind
STOP = frozenset(
    """
    a about all also an and any approach are as at be been being but by can could did do does doesn don each
    for from get gets had has have he how i if in instead into is it its itself just like made make makes
    may me method more most my need needs no not of on one only or other our out over own paper papers s she
    should so some such t than that the their them themselves then there these they thing things this those
    through to too up us use used uses using very want was way we were what when where which while who whose
    why will with within without work works would you your
    """.split()  # noqa: SIM905
)
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text.

    >>> words("Multi-scale KV_cache (2-D)")
    ['multi', 'scale', 'kv', 'cache', '2', 'd']
    """
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Hit:
    key: str
    score: float


@cache
def synonyms(path: Path = HOME / "synonyms.toml") -> Mapping[str, tuple[str, ...]]:
    """{word or phrase: the others of its groups}, from the groups of a TOML file."""
    with path.open("rb") as file:
        groups = tomllib.load(file)["group"]
    found: dict[str, list[str]] = {}
    for group in groups:
        for word in group["words"]:
            found.setdefault(word, []).extend(other for other in group["words"] if other != word)
    return {word: tuple(dict.fromkeys(others)) for word, others in found.items()}


class Index:
    """The searchable text of a catalogue.

    >>> from foveate.catalogue import load
    >>> [hit.key for hit in Index(load()).search("flexprefil", limit=1)]
    ['flexprefill']
    """

    def __init__(self, catalogue: Catalogue | Iterable[Entry]) -> None:
        self.entries = list(catalogue)
        self.texts = [_texts(entry) for entry in self.entries]
        self.db = sqlite3.connect(":memory:")
        for table, (_, fields) in TABLES.items():
            columns, places = ", ".join(fields), ", ".join("?" * len(fields))
            tokenizer = "porter unicode61 remove_diacritics 2"
            self.db.execute(f"CREATE VIRTUAL TABLE {table} USING fts5({columns}, tokenize = '{tokenizer}')")
            self.db.executemany(
                f"INSERT INTO {table}(rowid, {columns}) VALUES (?, {places})",
                [(row, *(text[field] for field in fields)) for row, text in enumerate(self.texts)],
            )
        self._hits: dict[str, dict[int, float]] = {}

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Every word of the texts, as written."""
        return frozenset(word for texts in self.texts for text in texts.values() for word in words(text))

    def search(self, query: str, limit: int = 10) -> list[Hit]:
        """The best papers for a query, best first; none when no word of it is known.

        Raises:
            ValueError: limit below 1, or a query without a word or number in it.
        """
        if limit < 1:
            raise ValueError(f"limit {limit}; accepted: 1 or more")
        said = words(query)
        if not said:
            raise ValueError(f"query {query!r}; accepted: at least one word")
        kept = [word for word in said if word not in STOP] or said
        scores: dict[int, float] = {}
        found: dict[int, float] = {}  # how much of the query, by weight, a paper has
        asked = 0.0
        single, pairs = self._forms(kept)
        for forms in single:
            best = self._best(forms)
            top = max(best.values(), default=0.0)
            asked += top
            for row, score in best.items():
                scores[row] = scores.get(row, 0.0) + score
                found[row] = found.get(row, 0.0) + top
        for forms in pairs:
            for row, score in self._best(forms).items():
                scores[row] = scores.get(row, 0.0) + score
        for row in scores:
            scores[row] *= (1 - COVERAGE) + COVERAGE * found.get(row, 0.0) / (asked or 1.0)
        for row, entry in enumerate(self.entries):
            scores[row] = scores.get(row, 0.0) + _named(entry, said)
        ranked = sorted(((s, -row) for row, s in scores.items() if s > 0), reverse=True)
        return [Hit(self.entries[-row].key, round(score, 4)) for score, row in ranked[:limit]]

    def _match(self, form: str) -> dict[int, float]:
        """{row: BM25 over the weighted fields} for a word or a phrase."""
        if form not in self._hits:
            hits: dict[int, float] = {}
            for table, (share, fields) in TABLES.items():
                weights = ", ".join(str(weight) for weight in fields.values())
                for row, score in self.db.execute(
                    f"SELECT rowid, bm25({table}, {weights}) FROM {table} WHERE {table} MATCH ?",
                    (f'"{form}"',),
                ):
                    hits[row] = hits.get(row, 0.0) - share * score
            self._hits[form] = hits
        return self._hits[form]

    def _best(self, forms: Mapping[str, float]) -> dict[int, float]:
        best: dict[int, float] = {}
        for form, weight in forms.items():
            for row, score in self._match(form).items():
                best[row] = max(best.get(row, 0.0), weight * score)
        return best

    def _forms(self, kept: list[str]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """The forms, with their weights, of each word of the query (a known term of several words counts as one), and
        of each pair of neighbours."""
        table = synonyms()
        single, read = [], []
        while kept:
            size = next((n for n in (3, 2) if n <= len(kept) and _term(kept[:n])), 1)
            unit, kept = kept[:size], kept[size:]
            if size > 1:
                forms = {" ".join(unit): 1.0, "".join(unit): 1.0, **dict.fromkeys(unit, TERM_WORD)}
                others = table[_term(unit)]
            else:
                forms = {unit[0]: 1.0}
                if not self._match(unit[0]):
                    forms |= self._guesses(unit[0])
                others = ()
            best = max((f for f in forms if self._match(f)), key=forms.__getitem__, default=unit[0])
            read += [best] if size == 1 else unit
            for other in list(forms) if size == 1 else ():
                for synonym in table.get(_term([other]), ()):
                    forms[synonym] = max(forms.get(synonym, 0.0), SYNONYM * forms[other])
            for other in others:
                forms[other] = TERM_SYNONYM
            single.append(forms)
        pairs = [{f"{a} {b}": PHRASE, a + b: PHRASE} for a, b in itertools.pairwise(read)]
        return single, pairs

    def _guesses(self, word: str) -> dict[str, float]:
        """What an unknown word may stand for: a word it begins, a near word, or two known words in one."""
        found: dict[str, float] = {}
        if len(word) >= 3:
            longer = sorted((w for w in self.vocabulary if w.startswith(word)), key=len)[:4]
            found |= dict.fromkeys(longer, PREFIX)
        for cut in range(3, len(word) - 2):
            if word[:cut] in self.vocabulary and word[cut:] in self.vocabulary:
                found[f"{word[:cut]} {word[cut:]}"] = HALVES
        if len(word) >= 4:
            import difflib

            near = [
                w
                for w in self.vocabulary
                if abs(len(w) - len(word)) <= 2 and (w[0] == word[0] or w[1:2] == word[1:2])
            ]
            for close in difflib.get_close_matches(word, sorted(near), 3, 0.75):
                found[close] = MISSPELT * difflib.SequenceMatcher(None, word, close).ratio()
        return found


def _term(unit: list[str]) -> str:
    """The entry of the synonyms for some words, with or without a plural s at the end; empty when there is none."""
    term = " ".join(unit)
    shorter = term[:-1] if len(term) > 3 and term.endswith("s") and not term.endswith("ss") else term
    return next((t for t in (term, shorter) if t in synonyms()), "")


def _texts(entry: Entry) -> dict[str, str]:
    rest = [
        entry.experiment,
        entry.notes,
        *entry.invariants,
        *entry.symbols.values(),
        *entry.tags,
        *entry.modality,
    ]
    return {
        "title": entry.title,
        "name": f"{entry.name} {entry.key.replace('_', ' ')}",
        "aliases": "\n".join(entry.aliases),
        "idea": entry.idea,
        "phrases": "\n".join(entry.phrases),
        "contribution": entry.contribution,
        "claim": entry.claim,
        "mechanism": entry.mechanism,
        "rest": "\n".join([*rest, entry.family, entry.kind]),
    }


def _named(entry: Entry, said: list[str]) -> float:
    """What the query gains by being the paper's title, key, name or an alias of it, or the beginning of its title."""
    query = "".join(said)
    title = words(entry.title)
    if query == "".join(title):
        return 1e6
    if query in ("".join(words(entry.key)), "".join(words(entry.name))):
        return 1e5
    if any(query == "".join(words(alias)) for alias in entry.aliases):
        return 1e4
    if len(said) > 1 and said == title[: len(said)]:
        return 1e3
    return 0.0


def search(catalogue: Catalogue, query: str, limit: int = 10) -> list[Hit]:
    """One search; make an `Index` for many."""
    return Index(catalogue).search(query, limit)


def ndcg(ranked: list[str], grades: Mapping[str, Any], at: int = 10) -> float:
    """Normalised discounted cumulative gain of a ranking, gains 2**grade - 1.

    >>> ndcg(["a", "b"], {"a": 3, "b": 1}), ndcg(["b", "a"], {"a": 3, "b": 1}) < 1
    (1.0, True)
    """
    import math

    def gain(values: Iterable[float]) -> float:
        return sum((2**g - 1) / math.log2(i + 2) for i, g in enumerate(list(values)[:at]))

    best = gain(sorted(grades.values(), reverse=True))
    return gain(grades.get(key, 0) for key in ranked) / best if best else 0.0
