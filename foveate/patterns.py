"""Static patterns: who may look at whom. Combine them with `&`, `|` and `~`."""

from foveate.core.patterns import *  # noqa: F403
from foveate.core.patterns import __all__ as __all__
