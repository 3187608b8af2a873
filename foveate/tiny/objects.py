"""The objects that scenes show, and the boxes they lie in."""

from dataclasses import dataclass

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are exclusive."""


@dataclass(frozen=True)
class SceneObject:
    """One drawn object.

    Args:
        kind: a shape name, a number or a written word (`foveate.tiny.words.KINDS`).
        colour: a colour name.
        box: left, top, right, bottom in pixels; right and bottom are exclusive.
    """

    kind: str
    colour: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2
