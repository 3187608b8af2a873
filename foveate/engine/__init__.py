"""The engine: attach to a model, shorten its stream of visual tokens, and leave without a trace."""
