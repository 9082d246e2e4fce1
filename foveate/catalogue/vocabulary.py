"""The closed vocabularies of catalogue entries, each word with its meaning.

Tags say what a mechanism is; those of `CHECKED` also decide which generic checks run on it (`tests/common`).
"""

from __future__ import annotations

FAMILIES = {
    "pattern": "a fixed set of (query, key) pairs",
    "selector": "a set of pairs computed from the content",
    "score": "changed logits, positions or normalisers",
    "linear": "feature maps, recurrent state, state-space hybrids",
    "compress": "attention to fewer, summarised tokens",
    "window": "windows, neighbourhoods and hierarchies on grids",
    "gate": "channel and spatial re-weighting of feature maps",
    "cross": "attention between views, entities, modalities, scales",
    "cache": "policies for the key-value cache",
    "steer": "training-free interventions in a model's attention",
    "probe": "measurements of what attention does",
    "model": "whole models and training recipes built on attention",
    "bench": "protocols and benchmarks",
    "dist": "attention over several devices",
}

KINDS = {
    "operator": "a function of queries, keys and values",
    "layer": "a module with parameters",
    "backbone": "a network that gives features",
    "policy": "a rule for a model at inference",
    "intervention": "a change of a trained model's computation",
    "training-recipe": "a way to train",
    "probe": "a measurement",
    "benchmark": "a protocol with data and metric",
    "simulator": "a model of cost",
    "system": "several parts that work together",
    "survey": "an overview with a taxonomy",
    "theory": "an analysis",
}

MODALITIES = {
    "text": "text",
    "image": "images",
    "video": "video",
    "audio": "audio and speech",
    "points": "3-D data: points, meshes, volumes",
    "graph": "graphs",
    "table": "tables and click logs",
    "series": "time series",
    "any": "any sequence",
}

COMPLEXITIES = {
    "linear": "work grows as the number of tokens",
    "subquadratic": "work grows faster than the number of tokens, slower than its square",
    "quadratic": "work grows as the square of the number of tokens",
    "none": "no attention operator, or no such statement",
}

TAGS = {
    "causal": "has a form in which a query never reads a later key",
    "bidirectional": "has a form without order",
    "self": "queries and keys come from the same tokens",
    "cross": "queries and keys come from different tokens",
    "1d": "tokens on a line",
    "2d": "tokens on a grid",
    "3d": "tokens in a volume, or a video",
    "static": "a fixed set of pairs",
    "content": "the set of pairs depends on the content",
    "window": "a query sees a window around it",
    "global-tokens": "some tokens see, or are seen by, all",
    "blocks": "works on blocks of keys",
    "hierarchical": "coarse first, then fine",
    "multi-scale": "tokens of several resolutions",
    "per-head": "heads differ",
    "pooled": "summaries, latents or agents stand for tokens",
    "regions": "masks from boxes, segments or entities",
    "score": "changes the logits",
    "normalizer": "replaces or changes the softmax",
    "positions": "changes the positions",
    "gate": "re-weights channels or places",
    "low-rank": "factors a projection or the map",
    "temperature": "changes how sharp the weights are",
    "stateful": "carries a state from call to call",
    "kv-cache": "manages the key-value cache",
    "chunked": "works chunk by chunk",
    "training-free": "works in a trained model as it is",
    "trainable": "adds parameters or needs training",
    "distilled": "learns from a dense teacher",
    "intervention": "changes a trained model's computation",
    "probe": "measures",
    "benchmark": "a protocol with data and metric",
    "survey": "an overview",
    "system": "several parts that work together",
    "diffusion": "made for diffusion models",
    "backbone": "a network that gives features",
    "exact": "equals attention over its set of pairs",
    "approximate": "approximates dense attention",
    "shift-equivariant": "shifted input gives the shifted output",
    "permutation-equivariant": "permuted input gives the permuted output",
}

VERIFICATIONS = {
    "official-code": "compared with the authors' code",
    "published-numbers": "reproduces figures of the paper (counts, costs, scores)",
    "equations": "compared with an independent implementation of the paper's equations",
    "smoke": "runs, shapes are right",
}

STATUSES = {
    "works": "implementation resolves, invariants pass, evidence holds on a fresh run",
    "not-reproduced": "implemented; its evidence ran and does not show the claim at this scale",
    "implemented": "implemented; its evidence is missing or older than the code",
    "planned": "not implemented yet",
}

RELATIONS = {  # how -> how the other side puts it
    "special case of": "generalises",
    "generalises": "special case of",
    "extends": "extended by",
    "combines with": "combines with",
    "alternative to": "alternative to",
    "evaluated by": "evaluates",
}

INTERFACES = {
    "pattern": "a Pattern: `contains`, `classify`, `layout`",
    "selector": "a Selector: called with q and k, returns a BlockLayout",
    "score": "a score for `attention(score=)`",
    "normalizer": "a normaliser for `attention(normalizer=)`",
    "operator": "a function (q, k, v) -> out",
    "layer": "a module (batch, tokens, dim) -> the same shape",
    "gate": "a module (batch, channels, height, width) -> the same shape",
    "tool": "anything else: it must resolve, and has tests of its own",
}
