"""Train with fewer visual tokens: prepare a model, or run a recipe."""

from foveate.training import prepare

__all__ = ["prepare"]
