"""LaTeX of entries -> MathML, when the site is built."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from foveate.catalogue.gallery.clean import Unclean, named, parse, rebuilt, serialise, text_of

TAGS = named(
    "math mrow mi mo mn mtext mspace msub msup msubsup munder mover munderover mfrac msqrt mroot mstyle mpadded "
    "mphantom mtable mtr mtd menclose"
)
ATTRIBUTES = named(
    "mathvariant stretchy fence accent accentunder width height depth linethickness minsize maxsize "
    "lspace rspace displaystyle scriptlevel form separator movablelimits symmetric largeop columnalign"
)
OPERATORS = {r"\arg\max": r"\operatorname{argmax}", r"\arg\min": r"\operatorname{argmin}"}


@dataclass(frozen=True)
class Equation:
    """`mathml` is empty where the LaTeX could not be converted: a page then shows `latex`. `length`: characters."""

    latex: str
    mathml: str
    length: int


@functools.lru_cache(maxsize=4096)
def equation(latex: str, *, block: bool = False) -> Equation:
    """The MathML of a formula, with its LaTeX as alternative text.

    >>> equation(r"\\sqrt{d}").mathml
    '<math alttext="\\\\sqrt{d}"><mrow><msqrt><mrow><mi>d</mi></mrow></msqrt></mrow></math>'
    >>> equation(r"\\nosuch x").mathml
    ''
    """
    import latex2mathml.converter

    known = latex
    for command, replacement in OPERATORS.items():
        known = known.replace(command, replacement)
    try:
        tree = rebuilt(parse(latex2mathml.converter.convert(known)), TAGS, _attributes)
    except Exception as error:  # the converter's own errors have no common base class
        if not isinstance(error, Unclean | ValueError | IndexError) and (
            type(error).__module__ != "latex2mathml.exceptions"
        ):
            raise
        return Equation(latex, "", len(latex))
    if re.search(r"\\[A-Za-z]", text_of(tree)):  # a command that the converter does not know
        return Equation(latex, "", len(latex))
    tree.set("alttext", latex)
    if block:
        tree.set("display", "block")
    return Equation(latex, serialise(tree), len(text_of(tree)))


def _attributes(tag: str, found: Mapping[str, str]) -> Mapping[str, str]:
    return {name: value for name, value in found.items() if name in ATTRIBUTES}
