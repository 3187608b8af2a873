"""foveate inside other people's programs."""
