"""The packaged model for videos: LLaVA-NeXT-Video with the weights of the packaged LLaVA.

A video is one stream of visual tokens, so that methods which compare frames can be tried offline.
The weights of `tiny` were trained on one image a prompt: that model answers about what frames show,
and not about what happens from one to the next. Those of `small` know short videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BatchFeature,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaProcessor,
)

from foveate.errors import InputError
from foveate.tiny.build import CHAT_TEMPLATE, IMAGE

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
_IMAGES = "{% for part in message['content'] if part['type'] == 'image' %}{{ ' <image>' }}"
_TEMPLATE = CHAT_TEMPLATE.replace(
    _IMAGES, _IMAGES.replace("'image'", "'video'").replace("<image>", VIDEO_TOKEN)
)

Frames = Sequence[Image.Image]


class VideoProcessor(LlavaProcessor):
    """Makes inputs of texts and videos; it needs Pillow alone.

    A video is a list of frames, and all videos of a call have equally many. In a conversation it
    is `{"type": "video", "video": frames}`.
    """

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **more: Any
    ) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: none; what follows says so.
            text: a prompt or several, with `<video>` where a video stands.
            videos: a video, or several in the order of the prompts.
            **more: for the tokenizer, such as `return_tensors`.

        Returns:
            The tokenizer's output, and `pixel_values_videos` (videos, frames, 3, 128, 128).

        Raises:
            InputError: there are images or no text, videos of unequal lengths, or more or fewer
                videos than the text has places for; or a video is no list of Pillow images.
        """
        if text is None:
            raise InputError("videos come with a text, which has <video> where each stands")
        prompts = [text] if isinstance(text, str) else list(text)
        if images is not None or any(IMAGE_TOKEN in prompt for prompt in prompts):
            raise InputError("the packaged model for videos takes no images; `small` and `tiny` do")
        clips = _videos(videos)
        places = sum(prompt.count(VIDEO_TOKEN) for prompt in prompts)
        if places != len(clips) or len({len(clip) for clip in clips}) > 1:
            raise InputError(
                f"the text has {places} {VIDEO_TOKEN}, and there are videos of "
                f"{[len(clip) for clip in clips]} frames; give as many videos, of equal lengths"
            )
        if not clips:
            return BatchFeature(dict(self.tokenizer(prompts, **more)))
        pixels = torch.stack([self._pixels(clip) for clip in clips])
        height, width = (side // self.patch_size for side in pixels.shape[-2:])
        tokens = VIDEO_TOKEN * (pixels.shape[1] * height * width)
        filled = [prompt.replace(VIDEO_TOKEN, tokens) for prompt in prompts]
        return BatchFeature({**self.tokenizer(filled, **more), "pixel_values_videos": pixels})

    @property
    def video_processor(self) -> Any:
        """What prepares frames; that there is one says that videos are taken."""
        return self.image_processor

    def _pixels(self, clip: Frames) -> Tensor:
        """(frames, 3, height, width) what the encoder is fed."""
        return self.image_processor(list(clip), return_tensors="pt")["pixel_values"]


def _videos(given: Any) -> list[Frames]:
    """The videos of a call, which may be one, or in a list for each prompt.

    Raises:
        InputError: something is no list of images, or one of none.
    """
    if given is None:
        return []
    if _is_video(given):
        return [given]
    clips: list[Frames] = []
    for entry in given if isinstance(given, list | tuple) else [given]:
        of_prompt = isinstance(entry, list | tuple) and not _is_video(entry)
        clips += entry if of_prompt else [entry]
    if not all(map(_is_video, clips)):
        raise InputError("a video is a list of its frames, which are images of Pillow")
    return clips


def _is_video(found: Any) -> bool:
    """Whether something is a list of frames, and not of videos."""
    several = isinstance(found, list | tuple) and len(found) > 0
    return several and all(isinstance(frame, Image.Image) for frame in found)


def for_videos(
    image_model: LlavaForConditionalGeneration, plain: LlavaProcessor
) -> tuple[LlavaNextVideoForConditionalGeneration, VideoProcessor]:
    """The packaged model and its processor, for videos; nothing is pooled, as the weights know it.

    Args:
        image_model: the packaged model; the weights are copied.
        plain: its processor, whose tokenizer is taken over.
    """
    plain.tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]})
    model: Any = LlavaNextVideoForConditionalGeneration(
        _config(image_model.config, len(plain.tokenizer))
    )
    state = image_model.state_dict()
    words = state["model.language_model.embed_tokens.weight"]
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat((words, words[IMAGE : IMAGE + 1]))  # of a token never answered
    state["model.image_newline"] = torch.zeros_like(words[0])
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(**image_model.generation_config.to_diff_dict())
    processor = VideoProcessor(
        plain.image_processor,
        plain.tokenizer,
        patch_size=plain.patch_size,
        vision_feature_select_strategy=plain.vision_feature_select_strategy,
        chat_template=_TEMPLATE,
        num_additional_image_tokens=plain.num_additional_image_tokens,
    )
    return model.eval(), processor


def _config(image: Any, words: int) -> LlavaNextVideoConfig:
    """The configuration of the packaged LLaVA for videos, with the video's token as last word."""
    return LlavaNextVideoConfig(
        vision_config=image.vision_config.to_dict(),
        text_config=image.text_config.to_dict() | {"vocab_size": words},
        image_token_index=IMAGE,
        video_token_index=words - 1,
        vision_feature_layer=image.vision_feature_layer,
        vision_feature_select_strategy=image.vision_feature_select_strategy,
        spatial_pool_stride=1,
        tie_word_embeddings=True,
    )
