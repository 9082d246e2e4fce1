"""The core: one attention op, exact layouts, patterns, selectors, scores, engines. Knows nothing of papers' models."""
