"""Window, local and hierarchical attention for images, and the backbones built on it."""

__all__ = []
