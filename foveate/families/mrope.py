"""What families with M-RoPE share: positions in time, height and width, made from grids."""

from __future__ import annotations

from foveate.families.gridded import Gridded


class MRope(Gridded):
    """Base of families that number tokens along three axes, so that survivors keep their places."""

    one_dimensional = False
