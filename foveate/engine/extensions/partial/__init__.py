"""Decoder layers that compute less of their visual tokens."""
