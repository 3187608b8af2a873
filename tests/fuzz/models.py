"""Tiny random models of any depth, and what is known of them without foveate."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

from tests.conformance.zoo import MEMBERS, Member
from tests.conformance.zoo.gridded import Gridded
from tests.conformance.zoo.llava import CLIP, TEXT
from tests.conformance.zoo.member import loud
from tests.conformance.zoo.mrope import MRopeMember

ON_GRIDS = {name for name, member in MEMBERS.items() if issubclass(member, MRopeMember)}
PLAIN = {"kimi_k25", "kimi_k25-halves"}  # grids, and positions that are numbers
MROPE = {name for name in ON_GRIDS - PLAIN if not issubclass(MEMBERS[name], Gridded)}
# Prompts that see what comes after: no forward over everything equals one turn after another.
TWO_WAY = {"paligemma", "paligemma2", "molmo2", "molmo2-o"}
BLOCKS = TWO_WAY | {"gemma3", "shieldgemma2"}  # masks are built before the text model
TILED = {"llava_next", "llava_next_video", "llava_onevision", "llava_onevision-tiles"}
OF_ONE_SIZE = {
    "ovis2",
    "idefics2",
    "idefics3",
    "granite_docling",
    "smolvlm",
    *ON_GRIDS,
}  # images of features made by hand


class Windowed(MEMBERS["llava"]):
    """LLaVA around a Mistral, every layer of which sees a window shorter than the prompts."""

    def config(self) -> Any:
        return LlavaConfig(
            vision_config=CLIPVisionConfig(**CLIP), image_token_id=self.image_id,
            text_config=MistralConfig(**TEXT, sliding_window=18),
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )  # fmt: skip


# The oracle hides what was removed at full length. A running state would still step over it, and
# layers that read the keys of earlier ones hide by these; some layers have streams of states, and
# some are given features that an input does not hold: the oracle of the conformance suite does all
# of it. Llama 4 puts features that it is handed through one more matrix, so that merged ones cannot
# be handed to the bare model. Eager attention of Unlimited-OCR wants a key head for each head. The
# layers of Dots 3 Note differ in size, so that it has no other depth. Phi-4 Multimodal reads no
# features.
ANOTHER_ORACLE = (
    "dots3_note", "gemma3n", "gemma4", "granite4", "lfm2", "lfm3", "llama4", "minicpm", "nemotron",
    "phi4_multimodal", "qwen3_5", "unlimited_ocr",
)  # fmt: skip
FAMILIES: dict[str, type[Member]] = {
    **{n: member for n, member in MEMBERS.items() if not n.startswith(ANOTHER_ORACLE)},
    "llava-window": Windowed,
}


@dataclass(frozen=True)
class Shape:
    """A model's family, and what of its text model differs from the zoo's."""

    family: str
    depth: int
    key_heads: int = 2


def member_of(shape: Shape) -> Member:
    """The zoo's member with a text model of another depth."""
    kind = FAMILIES[shape.family]

    def config(self: Any) -> Any:
        made = kind.config(self)
        text = made.get_text_config()
        text.num_hidden_layers = shape.depth
        if not hasattr(text, "kv_lora_rank"):  # latents are expanded to all heads
            text.num_key_value_heads = shape.key_heads
        for name in ("layer_types", "mlp_layer_types", "layer_rope_theta"):
            if said := getattr(text, name, None):
                setattr(text, name, (list(said) * shape.depth)[: shape.depth])
        if hasattr(getattr(made, "vision_config", None), "drop_path_rate"):
            made.vision_config.drop_path_rate = 0.0  # or two runs in training are not alike
        return made

    member: Member = type(kind.__name__, (kind,), {"config": config})()
    return member


@functools.lru_cache(maxsize=32)
def model_of(shape: Shape, attention: str) -> Any:
    """A model whose tower and projector are loud enough to matter."""
    return loud(member_of(shape).build(attention))


@functools.cache
def kinds_of(shape: Shape) -> tuple[str, ...]:
    """For each decoder layer, `full_attention` or another kind."""
    text = member_of(shape).config().get_text_config()
    return tuple(getattr(text, "layer_types", None) or ["full_attention"] * shape.depth)


@functools.cache
def planes_of(shape: Shape) -> int:
    """Decoder layers after which encoder features are added (DeepStack)."""
    vision = getattr(member_of(shape).config(), "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or [])
