"""The closed vocabularies of catalogue entries, each word with its meaning.

Tags say what a mechanism is; those of `CHECKED` also decide which generic checks run on it (`tests/common`), besides
those that its interface brings: `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    "shared-heads": "query heads that share a key head decide together",
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
    "map": "a module (batch, height, width, dim) -> the same shape",
    "backbone": "a `foveate.vision.Backbone`: images (batch, channels, height, width) -> scores, and maps",
    "gate": "a module (batch, channels, height, width) -> the same shape",
    "tool": "anything else: it must resolve, and has tests of its own",
}

_BATCH = "a batch row alone gives what it gives among others"
_STRIDES = "any strides of the inputs give the same"
_UNCHANGED = "the inputs are not written to"
_FORWARD = "every engine that accepts it computes the float64 definition, within the rounding budget"
_GRADIENTS = "so does the gradient of every input and of every tensor it holds"
_FLEX = "so does FlexAttention, compiled (slow)"
_PREFIX = "later tokens do not change earlier results; a prefix alone gives the prefix of the result"
_LIMITS = "under the arguments of `limits` it equals full or causal attention"
_MODULE = {
    "shape_and_dtype": "the input's shape and dtype come back, finite",
    "batch_rows": _BATCH,
    "state_dict_round_trip": "a module loaded from another's state_dict gives the same",
    "parameter_gradients": "every parameter and the input get a gradient in train mode",
    "seeded": "one seed gives one module and one result in train mode",
    "eval_deterministic": "twice the same in eval mode",
    "parameter_count": "has as many parameters as cost.parameters says for the check's symbols",
    "inputs_unchanged": _UNCHANGED,
    "strides": _STRIDES,
}

# interface -> {check: what it demands}; `foveate.catalogue.conformance` has a function of the same name for each
CHECKS: dict[str, dict[str, str]] = {
    "pattern": {
        "layout_is_contains": "the layout holds just the pairs that `contains` allows, at prime and ragged sizes",
        "classification": "rectangles that `classify` calls EMPTY or FULL are",
        "equality": "equal arguments give equal patterns with equal hashes, and `repr` evaluates to an equal one",
        "engines_forward": _FORWARD,
        "engines_gradients": _GRADIENTS,
        "flex_engine": _FLEX,
        "unseen_rows": "a query that sees nothing gives 0 and gradient 0",
        "masked_nan": "NaN and Inf in keys and values that a query does not see do not reach it",
        "grouped_heads": "several query heads may share a key head",
        "strides": _STRIDES,
        "batch_rows": _BATCH,
        "no_later_key": "no query sees a key after itself",
        "prefix_causality": _PREFIX,
        "shift": "queries away from the borders see the same offsets",
        "limits": _LIMITS,
    },
    "selector": {
        "valid_layout": "the layout is valid and canonical, also for ragged sizes, bfloat16 and float64",
        "deterministic": "the same queries and keys give the same layout",
        "inputs_unchanged": _UNCHANGED,
        "batch_rows": "a batch row alone gets the set that it gets among others",
        "strides": _STRIDES,
        "engines_forward": _FORWARD,
        "engines_gradients": _GRADIENTS,
        "grouped_heads": "several query heads may share a key head",
        "flex_engine": _FLEX,
        "no_later_key": "no query sees a key after itself",
        "limits": _LIMITS,
    },
    "score": {
        "engines_forward": _FORWARD,
        "engines_gradients": _GRADIENTS,
        "flex_engine": _FLEX,
        "strides": _STRIDES,
        "prefix_causality": f"under a causal mask {_PREFIX}",
    },
    "normalizer": {
        "engines_forward": _FORWARD,
        "engines_gradients": _GRADIENTS,
        "flex_engine": _FLEX,
        "strides": _STRIDES,
        "prefix_causality": f"under a causal mask {_PREFIX}",
    },
    "operator": {
        "shape_and_dtype": "the result has the shape and dtype of the queries (and the width of the values), finite",
        "precision": "float32 and bfloat16 differ from float64 by no more than its conditioning explains",
        "gradients": "gradients of q, k and v pass gradcheck in float64",
        "batch_rows": _BATCH,
        "strides": _STRIDES,
        "grouped_heads": "fewer key heads than query heads give what repeated ones give (tag `shared-heads`: where the "
        "query heads of a key head are equal), or are refused by name",
        "extreme_logits": "very large, very small and zero queries and keys give finite results",
        "deterministic": "the same inputs give the same bits",
        "inputs_unchanged": _UNCHANGED,
        "prefix_causality": _PREFIX,
        "other_lengths": "more or fewer keys than queries are accepted",
        "permutation": "permuted tokens give the permuted result",
        "segments": "the sequence in segments, or token by token, gives what it gives as a whole",
        "limits": _LIMITS,
    },
    "layer": {
        **_MODULE,
        "prefix_causality": _PREFIX,
        "permutation": "permuted tokens give the permuted result",
        "segments": "the sequence in segments, or token by token, gives what it gives as a whole",
    },
    "map": {**_MODULE},
    "backbone": {
        **_MODULE,
        "shape_and_dtype": "scores (batch, classes) of the input's dtype come back, finite",
        "maps": "its maps have the channels and strides that it declares; features_only gives them, num_classes=0 the "
        "pooled features",
        "any_size": "images with prime sides are accepted, or refused with a ValueError that names sizes",
    },
    "gate": {**_MODULE, "weight_range": "what it multiplies by stays in the range that it declares"},
    "tool": {"resolves": "the dotted path leads to an object"},
}

# tag -> the checks that run on objects with this tag only; a check that no tag names runs on every object
CHECKED: dict[str, tuple[str, ...]] = {
    "causal": ("no_later_key", "prefix_causality"),
    "cross": ("other_lengths",),
    "permutation-equivariant": ("permutation",),
    "shift-equivariant": ("shift",),
    "stateful": ("segments",),
}

# interfaces for which a check of `CHECKED` runs whatever the tags
ALWAYS: dict[str, tuple[str, ...]] = {"score": ("prefix_causality",), "normalizer": ("prefix_causality",)}


def checks_of(use: str, tags: Iterable[str]) -> list[str]:
    """Names of the checks that an object with this interface and these tags gets, in order.

    `limits` and `parameter_count` also need a check that gives limits or symbols.

    >>> [name for name in checks_of("selector", ["causal"]) if name not in checks_of("selector", [])]
    ['no_later_key']
    """
    asked = {name for tag in tags for name in CHECKED.get(tag, ())} | set(ALWAYS.get(use, ()))
    optional = {name for names in CHECKED.values() for name in names}
    return [name for name in CHECKS[use] if name in asked or name not in optional]
