"""What methods ask for: each signal computed once, without eager attention maps.

A step declares `Need(name, layers)`; the engine delivers the tensor under that name. Signals taken
at layers have the layer axis second, in the order of `Need.layers`, and their V columns are the
tokens alive at the step.

Shapes: `G` images, `L` layers, `H` heads, `V` visual tokens, `Q` text tokens behind the image up to
the end of the prompt, `D` hidden of the language model, `C` of the encoder, `d` of a head,
`M` segments of a question, `E` of the space that CLIP compares images and texts in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Signal:
    """What a signal is, and where it can be had.

    Args:
        what: shape and meaning.
        source: `encoder` (taken at encoder layers), `prompt` (known before the language model
            runs) or `decoder` (taken at decoder layers).
        layered: whether a need must name layers.
        attention: whether the layers must see the whole sequence.
        class_token: whether the encoder must have a class token.
        newline: what tokens have that are no patches, such as newlines between rows of tiles.
        inside: whether a step inside the encoder can have it of its own layer; of earlier layers
            a step before a layer can have all.
        asks: whether it depends on what the prompt asks.
        packed: whether it can be had where pictures lie in one sequence, behind one another.
    """

    what: str
    source: Literal["encoder", "prompt", "decoder"]
    layered: bool = True
    attention: bool = False
    class_token: bool = False
    newline: float = 0.0
    inside: bool = False
    packed: bool = True
    asks: bool = False


_NONE = float("-inf")
SIGNALS = {
    "cls_attention": Signal(
        "(G, L, H, V): attention of the encoder's class token to the patches",
        "encoder",
        class_token=True,
        newline=_NONE,
        inside=True,
    ),
    "joint_cls_attention": Signal(
        "(G, L, V): attention of the class token with the heads taken as one",
        "encoder",
        class_token=True,
        newline=_NONE,
    ),
    "received_attention": Signal(
        "(G, L, V): attention that a patch receives, mean over heads and all queries",
        "encoder",
        newline=_NONE,
    ),
    "global_attention": Signal(
        "(G, L, V): attention that a patch receives from global patches, which receive more than "
        "`Need.global_threshold` times the mean themselves; where there are none, from all",
        "encoder",
        newline=_NONE,
        packed=False,
    ),
    "given_attention": Signal(
        "(G, L, V): share of its attention that a patch gives to patches, mean over heads",
        "encoder",
        newline=_NONE,
    ),
    "information_flow": Signal(
        "(G, L, V): how much a patch tells the class token, by attention and values (FlowCut)",
        "encoder",
        class_token=True,
    ),
    "encoder_keys": Signal(
        "(G, L, H, V, d): keys of the patches, without rotary positions", "encoder", inside=True
    ),
    "encoder_features": Signal("(G, L, V, C): output states of encoder layers", "encoder"),
    "clip_patches": Signal(
        "(G, L, V, E): output states of encoder layers in CLIP's space, under CLIP's last norm",
        "encoder",
        packed=False,
    ),
    "clip_plain_patches": Signal(
        "(G, L, V, E): output states of encoder layers in CLIP's space, without its last norm",
        "encoder",
        packed=False,
    ),
    "clip_questions": Signal(
        "(G, M, E), and (G, M) `clip_questions_mask`: segments of the question in CLIP's space",
        "prompt",
        layered=False,
    ),
    "question_embeddings": Signal(
        "(G, Q, D), and (G, Q) `question_mask`: input embeddings of the text behind the image; "
        "`paired_mask` is that of the text before the next image",
        "prompt",
        layered=False,
        asks=True,
    ),
    "text_attention": Signal(
        "(G, L, H, V): attention of the last prompt token to the visual tokens",
        "decoder",
        attention=True,
        asks=True,
    ),
    "content_attention": Signal(
        "(G, L, H, V): the same without rotary positions, over the image's tokens alone",
        "decoder",
        attention=True,
        asks=True,
    ),
    "question_attention": Signal(
        "(G, L, H, Q, V), and (G, Q) `question_mask`: attention of the text behind the image to "
        "the visual tokens",
        "decoder",
        attention=True,
        asks=True,
    ),
    "question_closeness": Signal(
        "(G, L, Q, V), and (G, Q) `question_mask`: how close the rotary positions of the text "
        "behind the image are to those of the visual tokens, at most 1",
        "decoder",
        asks=True,
    ),
    "llm_states": Signal("(G, L, V, D): input states of decoder layers", "decoder"),
    "llm_keys": Signal("(G, L, Hkv, V, d): keys of decoder layers, rotated", "decoder"),
    "llm_values": Signal("(G, L, Hkv, V, d): values of decoder layers", "decoder"),
    "value_attention": Signal(
        "(G, L, Hkv, V): softmax, over the image's tokens alone, of the products of the last "
        "prompt token's values with theirs",
        "decoder",
        asks=True,
    ),
    "normed_states": Signal(
        "(G, L, V, D): input states of decoder layers under the language model's final norm",
        "decoder",
    ),
    "question_states": Signal(
        "(G, L, Q, D), and (G, Q) `question_mask`: input states of the text behind the image",
        "decoder",
        asks=True,
    ),
    "question_keys": Signal(
        "(G, L, Hkv, Q, d), and (G, Q) `question_mask`: its keys, rotated",
        "decoder",
        asks=True,
    ),
    "question_normed_states": Signal(
        "(G, L, Q, D), and (G, Q) `question_mask`: its states under the final norm",
        "decoder",
        asks=True,
    ),
    "question_relevance": Signal(
        "(G, Q), and (G, Q) `question_mask`: how much the image's input embeddings attend to each "
        "text token, mean over visual tokens",
        "decoder",
        layered=False,
        asks=True,
    ),
    "prompt_positions": Signal(
        "(G, V): place of each visual token in its prompt, padding not counted",
        "decoder",
        layered=False,
    ),
    "question_positions": Signal(
        "(G, Q), and (G, Q) `question_mask`: place in the prompt of the text behind the image",
        "decoder",
        layered=False,
        asks=True,
    ),
    "transition": Signal(
        "(G, L, V): how much attention and MLP of a decoder layer change a token (TransPrune)",
        "decoder",
        asks=True,
    ),
}
