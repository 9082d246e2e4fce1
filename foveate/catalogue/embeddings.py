"""Search by meaning with a local text encoder, beside the words: optional, slower, and nothing is downloaded.

Any encoder that transformers loads from a directory (a sentence encoder, say); a text is the mean of its last hidden
states. The two rankings are joined by reciprocal ranks: score = sum over rankings of 1 / (60 + rank).
"""

from __future__ import annotations

from pathlib import Path

from foveate.catalogue.search import Hit, Index

RANK_OFFSET = 60


def search_with(index: Index, model: Path, query: str, limit: int = 10) -> list[Hit]:
    """The best papers by words and by meaning together.

    Raises:
        ValueError: no such directory, or not a text encoder; what `Index.search` refuses.
        ImportError: without transformers, the extra `foveate[hf]`.
    """
    if not model.is_dir():
        raise ValueError(
            f"--embeddings {model}: no such directory; accepted: a local transformers text encoder"
        )
    by_words = [hit.key for hit in index.search(query, len(index.entries))]
    texts = [f"{entry.title}. {entry.idea} {entry.contribution}" for entry in index.entries]
    vectors = embed(model, [query, *texts])
    likeness = (vectors[1:] @ vectors[0]).tolist()
    order = sorted(range(len(texts)), key=lambda row: (-likeness[row], row))
    by_meaning = [index.entries[row].key for row in order]
    scores: dict[str, float] = {}
    for ranking in (by_words, by_meaning):
        for rank, key in enumerate(ranking):
            scores[key] = scores.get(key, 0.0) + 1 / (RANK_OFFSET + rank)
    best = sorted(scores, key=lambda key: (-scores[key], key))[:limit]
    return [Hit(key, round(scores[key], 6)) for key in best]


def embed(model: Path, texts: list[str], batch: int = 32):
    """Unit vectors (texts, dim) of the texts."""
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError("search by meaning needs transformers: pip install 'foveate[hf]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        encoder = AutoModel.from_pretrained(
            model, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--embeddings {model}: not a text encoder that loads: {first}") from error
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            part = tokenizer(texts[start : start + batch], padding=True, truncation=True, max_length=256,
                             return_tensors="pt")  # fmt: skip
            hidden = encoder(**part).last_hidden_state  # (batch, tokens, dim)
            kept = part["attention_mask"][..., None].to(hidden)
            found.append((hidden * kept).sum(1) / kept.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)
