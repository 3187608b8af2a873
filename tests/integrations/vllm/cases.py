"""Prompts that vLLM and transformers answer: JSON, of which both make the same inputs."""

import numpy as np
from PIL import Image

ONE = "user <image> w1 w2 w3 assistant"
TWO = "user <image> w5 <image> w6 w7 assistant"
AFTER = "w1 w2 w3 assistant"  # the text after the image of ONE


def case(
    method=None, keep=None, *, images=(0,), prompt=None, size=(80, 64), question=None, **fields
):
    """A prompt with images; `size` is that of all of them."""
    named = None if method is None else {"method": method, **fields}
    if keep is not None:
        named["keep"] = keep
    return {
        "prompt": prompt or {1: ONE, 2: TWO}[len(images)],
        "images": list(images),
        "size": list(size),
        "method": named,
        "question": question,
    }


def video(method=None, keep=None):
    """A prompt with a video of four frames."""
    made = case(method, keep, images=(), prompt="user <video> w1 w2 w3 assistant", size=(56, 56))
    return {**made, "frames": [1, 2, 3, 4]}


def images_of(case):
    return [picture(seed, case["size"]) for seed in case["images"]]


def video_of(case):
    """Frames of a video that changes little from one to the next."""
    first = np.asarray(picture(case["frames"][0], case["size"]), dtype=np.int64)
    change = [np.asarray(picture(seed, case["size"]), dtype=np.int64) for seed in case["frames"]]
    return [(first * 3 // 4 + frame // 4).astype(np.uint8) for frame in change]


def metadata_of(case):
    """What is known of a video, where models ask for it."""
    frames = len(case["frames"])
    return {
        "fps": case["fps"], "duration": frames / case["fps"], "total_num_frames": frames,
        "frames_indices": list(range(frames)), "video_backend": "opencv",
    }  # fmt: skip


def picture(seed, size):
    """A random image that is smooth enough for patches to differ a lot."""
    generator = np.random.default_rng(seed)
    width, height = size
    coarse = generator.integers(0, 200, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    noise = generator.integers(0, 55, (height, width, 3))
    return Image.fromarray((coarse + noise).astype(np.uint8))


def arguments_of(case):
    """`mm_processor_kwargs` that ask for the case's method."""
    if case["method"] is None:
        return {}
    fields = dict(case["method"])
    made = {"foveate_method": fields.pop("method")}
    if "keep" in fields:
        made["foveate_keep"] = fields.pop("keep")
    if fields:
        made["foveate_fields"] = fields
    if case["question"]:
        made["foveate_question"] = case["question"]
    return made
