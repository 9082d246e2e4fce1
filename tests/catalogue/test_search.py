"""Search quality on labelled queries, and what people may type."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.catalogue import load
from foveate.catalogue.entry import tomllib
from foveate.catalogue.search import STOP, Index, ndcg, synonyms, words

HERE = Path(__file__).parent / "search"


def toml(name: str):
    with (HERE / name).open("rb") as file:
        return tomllib.load(file)


QUERIES = toml("queries.toml")["query"]
PARAPHRASES = {name: toml(f"{name}.toml") for name in ("paraphrases", "paraphrases_plain")}


@pytest.fixture(scope="module")
def catalogue():
    return load()


@pytest.fixture(scope="module")
def index(catalogue):
    return Index(catalogue)


def keys(index, query, limit=10):
    return [hit.key for hit in index.search(query, limit)]


def test_the_labelled_sets_cover_the_catalogue(catalogue):
    assert len(QUERIES) >= 60
    for query in QUERIES:
        assert set(query["relevant"]) <= set(catalogue.entries), query["text"]
        assert set(query["relevant"].values()) <= {1, 2, 3}
        assert query["split"] in ("dev", "test")
    for name, sentences in PARAPHRASES.items():
        assert set(sentences) == set(catalogue.entries), name


def test_every_paper_is_found_first_by_its_title(catalogue, index):
    wrong = {e.key: keys(index, e.title, 1) for e in catalogue if keys(index, e.title, 1) != [e.key]}
    assert not wrong


def test_every_paper_is_found_first_by_its_name_and_its_key(catalogue, index):
    for entry in catalogue:
        assert keys(index, entry.name, 1) == [entry.key]
        assert keys(index, entry.key, 1) == [entry.key]
        assert keys(index, entry.key.replace("_", "-").upper(), 1) == [entry.key]


@pytest.mark.parametrize("name", PARAPHRASES)
def test_every_paper_is_among_the_first_three_for_a_paraphrase_of_its_idea(index, name, record_property):
    places = {}
    for key, sentence in PARAPHRASES[name].items():
        found = keys(index, sentence, 200)
        places[key] = found.index(key) + 1 if key in found else 999
    record_property("first", sum(p == 1 for p in places.values()))
    assert {key: place for key, place in places.items() if place > 3} == {}


@pytest.mark.parametrize(
    ("kind", "least"), [("topic", 0.73), ("known", 0.95), ("typo", 0.90), ("synonym", 0.70), ("", 0.81)]
)
def test_ndcg_of_labelled_queries(index, kind, least, record_property):
    """Mean nDCG@10 of the half that was never looked at while the weights and synonyms were chosen."""
    gains = {
        q["text"]: ndcg(keys(index, q["text"]), q["relevant"])
        for q in QUERIES
        if q["split"] == "test" and kind in ("", q["kind"])
    }
    mean = sum(gains.values()) / len(gains)
    record_property("ndcg", mean)
    print(f"nDCG@10, {kind or 'all'}: {mean:.3f} over {len(gains)} queries")
    assert mean >= least, sorted(gains.items(), key=lambda item: item[1])[:5]


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ("FlexPrefil", "flexprefill"),  # a letter short
        ("flex prefill", "flexprefill"),  # two words for one
        ("swin", "swin"),
        ("heirarchical self atention", "hierarchical_self_attention"),
        ("halo net", "halonet"),
        ("lightningattention 2", "lightning_attention_2"),
        ("DUO-ATTENTION", "duo_attention"),
        ("biform", "biformer"),  # half typed
    ],
)
def test_typos_compounds_and_beginnings(index, query, key):
    assert keys(index, query, 1) == [key]


def test_a_misspelt_word_finds_what_the_right_one_finds(index):
    right, wrong = keys(index, "hierarchical pruning", 5), keys(index, "hierarchcal prunning", 5)
    assert len(set(right) & set(wrong)) >= 4


def test_synonyms_widen_a_query(index, monkeypatch):
    with_them = keys(index, "natten", 5)
    assert "fused_neighborhood_attention" in with_them
    long = keys(index, "large multimodal models that invent objects", 10)
    monkeypatch.setattr("foveate.catalogue.search.synonyms", dict)
    assert long != keys(index, "large multimodal models that invent objects", 10)


def test_the_synonyms_are_written_as_they_are_read():
    for word, others in synonyms().items():
        assert others, f"{word} stands alone"
        for term in (word, *others):
            assert term == " ".join(words(term)), f"{term!r}: lower-case words, one space between them"
            assert set(words(term)) - STOP, f"{term!r} is never looked up"


@pytest.mark.parametrize("query", ["", "   ", "?!", "—"])
def test_a_query_without_words_is_refused(index, query):
    with pytest.raises(ValueError, match="at least one word"):
        index.search(query)


def test_limit_is_checked_and_kept(index):
    with pytest.raises(ValueError, match="1 or more"):
        index.search("attention", 0)
    assert len(index.search("attention", 7)) == 7


def test_nothing_is_found_for_nonsense(index):
    assert index.search("zzqx vvkwp") == []


@pytest.mark.parametrize(
    "query", ['windows" OR *', "a NEAR/2 b", "title:swin", "((( a", "x'; DROP TABLE front; --", "^swin*"]
)
def test_query_syntax_of_the_index_is_only_text(index, query):
    index.search(query)
    assert keys(index, "swin", 1) == ["swin"]


def test_stop_words_alone_are_still_looked_up(index):
    assert isinstance(index.search("what is it"), list)


def test_scores_fall_and_searching_twice_gives_the_same(index, catalogue):
    found = index.search("sparse attention for long prompts", 20)
    scores = [hit.score for hit in found]
    assert scores == sorted(scores, reverse=True)
    assert found == Index(catalogue).search("sparse attention for long prompts", 20)


def test_ndcg_is_what_the_textbook_says():
    grades = {"a": 3, "b": 2, "c": 1}
    assert ndcg(["a", "b", "c"], grades) == 1
    assert ndcg(["x", "y"], grades) == 0
    # (7/log2(3)) / (7 + 3/log2(3) + 1/2)
    assert ndcg(["x", "a"], grades) == pytest.approx((7 / 1.5849625) / (7 + 3 / 1.5849625 + 0.5), rel=1e-6)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A text encoder of random weights that knows a few words."""
    transformers = pytest.importorskip("transformers")
    import torch

    path = tmp_path_factory.mktemp("encoder")
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w for q in QUERIES for w in words(q["text"])}),
    ]
    (path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    return path


def test_embeddings_from_a_local_encoder_join_the_ranking(index, encoder):
    from foveate.catalogue.embeddings import embed, search_with

    found = search_with(index, encoder, "windows that move", 5)
    assert len(found) == 5
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    vectors = embed(encoder, ["windows that move", "windows that move", "hallucination"])
    assert vectors[0].allclose(vectors[1], atol=1e-6)
    assert not vectors[0].allclose(vectors[2], atol=1e-3)
    # padding in a batch does not change a text's vector
    alone = embed(encoder, ["hallucination"])
    assert alone[0].allclose(vectors[2], atol=1e-5)


def test_embeddings_need_a_directory_with_an_encoder(index, tmp_path):
    from foveate.catalogue.embeddings import search_with

    with pytest.raises(ValueError, match="no such directory"):
        search_with(index, tmp_path / "nothing", "windows")
    with pytest.raises(ValueError, match="not a text encoder"):
        search_with(index, tmp_path, "windows")
