"""Prompts for the thinkers of Qwen's omni models, with audio in various places."""

import torch

from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.omni import AUDIO, AUDIO_END, AUDIO_START, END, START

NAMES = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
VIDEO = 91
FRAMES = {"qwen2_5_omni_thinker": 240, "qwen3_omni_moe_thinker": 90}  # mel frames beside a video


def sound_of(*frames, seed=5):
    """What the audio tower eats for clips of so many mel frames."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(frames)
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in frames])
    features = torch.randn(len(frames), 16, longest, generator=generator)
    return {"input_features": features, "feature_attention_mask": mask}


def heard_of(name, frames):
    """Tokens that the audio tower makes of so many mel frames."""
    if name == "qwen2_5_omni_thinker":
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    for _ in range(3):  # three convolutions, each of stride 2; up to 100 frames are a chunk
        frames = (frames - 1) // 2 + 1
    return frames


def clip_ids(count):
    return [AUDIO_START, *[AUDIO] * count, AUDIO_END]


def in_turns(name, frames, count):
    """Ids of a video's frames of 8 tokens and its sound, a second between frames, as processors
    interleave them.
    """
    if name == "qwen2_5_omni_thinker":  # chunks of 50 positions, of which a frame takes 25
        first, rest = min(50, count), max(count - 50, 0)
        return [*[VIDEO] * 16, *[AUDIO] * first, *[VIDEO] * 8, *[AUDIO] * rest]
    video = [(13 * frame, 0, VIDEO) for frame in range(frames) for _ in range(8)]
    audio = [(position, 1, AUDIO) for position in range(count)]
    return [token for _, _, token in sorted(video + audio)]


def prompt(name, kind):
    """A row, and the columns of each of its images and clips, in order of appearance.

    `beside`: two clips and an image, `alone`: a clip, `within`: a video with its sound.
    """
    member, sound = MEMBERS[name](), sound_of(40, 28)
    counts = [heard_of(name, frames) for frames in (40, 28)]
    inputs = {}
    if kind == "alone":
        ids, sound = [5, 7, *clip_ids(counts[0]), 20, 31, 8], sound_of(40)
    elif kind == "beside":
        inputs = member.pixels(1)
        (image,) = member.counts(model_of(name), inputs)
        ids = [5, *clip_ids(counts[0]), 7, START, *[member.image_id] * image, END]
        ids += [9, *clip_ids(counts[1]), 20, 31, 8]
    else:
        inputs, sound = member.clip(), sound_of(FRAMES[name])
        turns = in_turns(name, 3, heard_of(name, FRAMES[name]))
        ids = [5, 7, START, AUDIO_START, *turns, AUDIO_END, END, 20, 31, 8]
        inputs |= {"use_audio_in_video": True, "video_second_per_grid": torch.tensor([1.0])}
    ids = torch.tensor([ids])
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sound, **inputs}
    return row, places_of(ids[0], kind)


def places_of(ids, kind):
    """Columns of each image and clip of a row."""
    if kind == "within":
        return [(ids == token).nonzero()[:, 0] for token in (VIDEO, AUDIO)]
    runs, before = [], 0
    for column, token in enumerate(ids.tolist()):
        if token in (90, AUDIO):
            if token != before:
                runs.append([])
            runs[-1].append(column)
        before = token
    return [torch.tensor(run) for run in runs]


def longer(inputs, more):
    """The inputs of a forward over a prompt and (1, N) tokens after it."""
    ids = torch.cat((inputs["input_ids"], more), 1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
