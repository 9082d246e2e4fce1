"""Equations of entries, written in LaTeX, as one line of text for a terminal."""

from __future__ import annotations

import re
from functools import cache
from typing import Any


@cache
def _converter() -> Any:
    try:
        from pylatexenc import latex2text
    except ImportError as error:
        raise ImportError("equations need pylatexenc: pip install 'foveate[cli]'") from error

    def frac(node: Any, l2tobj: Any) -> str:
        a, b = (_whole(l2tobj.nodelist_to_text(getattr(p, "nodelist", [p])).strip()) for p in node.nodeargs)
        return f"{a}/{b}"

    context = latex2text.get_default_latex_context_db()
    own = [("frac", frac), ("|", "‖"), ("bmod", " mod "), ("mid", " | ")]
    macros = [latex2text.MacroTextSpec(name, simplify_repl=made) for name, made in own]
    context.add_context_category("foveate", prepend=True, macros=macros)
    return latex2text.LatexNodes2Text(
        latex_context=context, math_mode="text", keep_braced_groups=True, keep_braced_groups_minlen=2
    )


def _whole(part: str) -> str:
    """In brackets, when a slash beside it would be misread."""
    plain = re.sub(r"\([^()]*\)|\{[^{}]*\}|\[[^\[\]]*\]", "", part)
    return f"({part})" if re.search(r"[\s+\-/·×=]", plain.strip()) else part


def text(latex: str) -> str:
    r"""A formula in characters.

    >>> text(r"a = \frac{q \cdot k}{\sqrt{D}} + h_{t-1}")
    'a = (q ·k)/√(D) + h_{t-1}'
    """
    found = " ".join(_converter().latex_to_text(latex).split())
    return re.sub(r"(?<![_^])\{(\w+)\}", r"\1", found)  # braces around an operator's name
