"""Videos without an end: frames keep coming, the KV cache stays below a cap (InfiniPot-V).

Examples:
    >>> import foveate
    >>> from foveate import tiny
    >>> from foveate.streaming import Stream
    >>> model, processor = tiny.load()
    >>> scene = tiny.draw_scene(7).image
    >>> with foveate.use(model, "uniform", keep=0.25) as run:
    ...     stream = Stream(run, cap=400, reserve=20)
    ...     for number in range(12):
    ...         text = "<image>" if number else "<bos> <image>"
    ...         frame = processor(images=scene, text=text, return_tensors="pt")
    ...         stream.add(**frame)
    >>> stream.frames, stream.tokens <= 380
    (12, True)
"""

from foveate.io.videos import each_frame
from foveate.streaming.infinipot import InfiniPotV
from foveate.streaming.stream import Stream
from foveate.streaming.supported import tokens_in

__all__ = ["InfiniPotV", "Stream", "each_frame", "tokens_in"]
