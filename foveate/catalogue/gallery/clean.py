"""Foreign markup (MathML, SVG) -> the same markup with nothing in it but what a page accepts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from xml.etree import ElementTree


def named(text: str) -> frozenset[str]:
    """The words of a text, as a set of names."""
    return frozenset(text.split())


class Unclean(ValueError):
    """Markup that is not well formed, or has an element that is not accepted."""


def parse(text: str) -> ElementTree.Element:
    """The root of an XML text without a document type; comments are left out.

    Raises:
        Unclean: it declares a document type or entities, or is not well formed.
    """
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise Unclean("markup declares a document type or an entity; accepted: elements and text")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise Unclean(f"markup is not well formed: {error}") from None


def rebuilt(
    source: ElementTree.Element,
    tags: Set[str],
    attributes: Callable[[str, Mapping[str, str]], Mapping[str, str]],
    *,
    drop: Set[str] = frozenset(),
) -> ElementTree.Element:
    """A copy made of accepted elements, without namespaces.

    Args:
        tags: local names that are kept; any other raises.
        attributes: (local name of the element, its attributes) -> those of the copy.
        drop: local names left out with all that is inside.

    Raises:
        Unclean: an element in neither `tags` nor `drop`.
    """
    name = local(source.tag)
    if name not in tags:
        raise Unclean(f"element {name!r}; accepted: {', '.join(sorted(tags))}")
    made = ElementTree.Element(name, dict(attributes(name, source.attrib)))
    made.text = source.text
    last: ElementTree.Element | None = None
    for child in source:
        if local(child.tag) in drop:
            if last is None:
                made.text = (made.text or "") + (child.tail or "")
            else:
                last.tail = (last.tail or "") + (child.tail or "")
            continue
        last = rebuilt(child, tags, attributes, drop=drop)
        last.tail = child.tail
        made.append(last)
    return made


def local(name: str) -> str:
    """The name without its namespace.

    >>> local("{http://www.w3.org/2000/svg}path")
    'path'
    """
    return name.rsplit("}", 1)[-1]


def text_of(root: ElementTree.Element) -> str:
    """All text below an element, its spaces removed."""
    return "".join("".join(root.itertext()).split())


def serialise(root: ElementTree.Element) -> str:
    """HTML text of a tree: characters as they are, empty elements closed by an end tag."""
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
