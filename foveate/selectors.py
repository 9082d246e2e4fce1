"""Selectors: patterns computed from the content of queries and keys."""

from foveate.core.selectors import *  # noqa: F403
from foveate.core.selectors import __all__ as __all__
