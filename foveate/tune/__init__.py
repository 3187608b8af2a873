"""Search which methods, budgets and layers suit a model and questions of one's own."""
