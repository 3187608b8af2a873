"""Steps inside an encoder."""
