"""The one error that the command line turns into one line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class CompareError(ValueError):
    """Something the user can put right: a path, a name, a length. The message is one complete line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def unknown(kind: str, names: Iterable[str], accepted: Sequence[str]) -> CompareError:
    """The error for unknown names, with the nearest accepted ones.

    >>> str(unknown("mechanism", ["slidng_sinks"], ["dense", "sliding_sinks"]))
    "unknown mechanism 'slidng_sinks' (did you mean 'sliding_sinks'?); accepted: dense, sliding_sinks"
    """
    parts = []
    for name in names:
        near = difflib.get_close_matches(name.lower(), list(accepted), n=2, cutoff=0.5)
        hint = " (did you mean " + " or ".join(f"'{n}'" for n in near) + "?)" if near else ""
        parts.append(f"'{name}'{hint}")
    return CompareError(f"unknown {kind} {', '.join(parts)}; accepted: {', '.join(accepted)}")
