"""A drawn scene for robots: two fixed cameras see a small arm move, a third one is at its wrist."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE, CAMERAS, STRIDE = 224, 3, 4  # pixels of an image; cameras; pixels that the arm moves a step


def film(frames: int, *, noise: float = 0.0, arm: bool = True) -> Tensor:
    """(frames, CAMERAS, 3, SIDE, SIDE) images from -1 to 1, of 8 bits, like those of a processor.

    Args:
        frames: how many; the arm goes forth, and back when half of them are over.
        noise: standard deviation of each pixel, in levels of 256, drawn anew for each frame.
        arm: whether the fixed cameras see the arm; the wrist's moves either way.
    """
    generator = torch.Generator().manual_seed(2)
    made = torch.empty(frames, CAMERAS, 3, SIDE, SIDE)
    rooms = [_room(generator) for _ in range(CAMERAS)]
    for number in range(frames):
        at = STRIDE * min(number, frames - number)
        for camera, room in enumerate(rooms[:-1]):
            picture = room.clone()
            if arm:
                left, top = 40 + at, 60 + 30 * camera
                picture[:, top : top + 56, left : left + 14] = 0.85  # the upper arm
                picture[:, top + 42 : top + 56, left : left + 42] = 0.25  # the hand
            made[number, camera] = picture
        made[number, -1] = rooms[-1].roll(at, -1)
    if noise:
        made = made + torch.randn(made.shape, generator=generator) * noise / 255
    return (made.clamp(0, 1) * 255).round() / 127.5 - 1


def _room(generator: torch.Generator) -> Tensor:
    """(3, SIDE, SIDE) a wall whose colour shades, and boxes on a table; from 0 to 1."""
    shade = torch.linspace(0.3, 0.7, SIDE)
    room = shade[None, :, None] + 0.2 * torch.rand(3, 1, 1, generator=generator) + shade / 8
    for _ in range(12):
        top, left = torch.randint(0, SIDE - 40, (2,), generator=generator).tolist()
        high, wide = torch.randint(12, 40, (2,), generator=generator).tolist()
        colour = torch.rand(3, 1, 1, generator=generator)
        room[:, top : top + high, left : left + wide] = colour
    return room
