"""Train with fewer visual tokens: prepare a model, or run a recipe."""
