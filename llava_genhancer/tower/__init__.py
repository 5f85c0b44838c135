"""The adapter for LLaVA and its forks. ``register()`` is all that a fork's own script needs."""

from llava_genhancer.tower.forks import register

__all__ = ["register"]
