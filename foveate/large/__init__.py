"""Questions about images of any size, read by windows (LRS-VQA's Dynamic Image Pyramid).

Examples:
    >>> from foveate import large, tiny
    >>> model, processor = tiny.load()
    >>> scene = tiny.draw_scene(7, size=768)
    >>> reading = large.Reader(model, processor).read(scene.image, "<image> what number is red ?")
    >>> reading.tiles <= 1 + 9 + 36
    True
    >>> answer = model.generate(**reading.inputs, max_new_tokens=4)
"""

from foveate.large.focus import Distillation, RegionFocus
from foveate.large.image import Held, LargeImage, Stored, open_image
from foveate.large.pyramid import Level, Local, levels
from foveate.large.reader import Reader, Reading, Round

__all__ = [
    "Distillation",
    "Held",
    "LargeImage",
    "Level",
    "Local",
    "Reader",
    "Reading",
    "RegionFocus",
    "Round",
    "Stored",
    "levels",
    "open_image",
]
