"""Search the numbers of a method for a model."""
