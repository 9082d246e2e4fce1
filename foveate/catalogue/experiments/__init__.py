"""One module per experiment: `run(lab)` measures a claim, `picture()` shows the mechanism on a small input."""
