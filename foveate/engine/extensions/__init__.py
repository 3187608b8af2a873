"""What one or two methods need of the engine beyond removing tokens."""
