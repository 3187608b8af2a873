"""Recoverable Compression: a recorded CLIP encoder, alone and inside a LLaVA around it."""

from functools import partial

import torch
from golden_case import Case, Check, Watch, assert_close, assert_same
from golden_encoder import IMAGE, TEXT, build
from torch import Tensor

import foveate
from foveate.core import Reduction, VisualTokens
from foveate.families import find_family
from foveate.methods.recoverablecompression import RecoverableCompression
from foveate.ops.outliers import local_outliers
from foveate.signals.clip import ClipQuestions
from foveate.signals.cls_attention import class_row

METHOD = RecoverableCompression(relevance="clip", as_released=True)


def checks(case: Case) -> dict[str, Check]:
    return {
        "outliers": partial(_check_outliers, case),
        "reduction": partial(_check_reduction, case),
        "model": partial(_check_model, case),
    }


def _clip(case: Case) -> ClipQuestions:
    """The recorded projection and question, and a norm that the release does not use."""
    weight = case.arrays["visual_projection.weight"]
    projection = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.load_state_dict({"weight": weight})
    norm = torch.nn.LayerNorm(weight.shape[1])
    torch.nn.init.normal_(norm.weight)
    text = (case.arrays["text_feature"],)
    return ClipQuestions(text, projection.requires_grad_(False), norm)


def _check_outliers(case: Case) -> None:
    """How many outliers each filter found."""
    seen, asked = case.arrays["cls_attention"], case.arrays["text_score"][0]
    kept = torch.zeros_like(seen, dtype=torch.bool)
    kept = kept.scatter(1, case.arrays["visual_kept_in_order"], True)
    rest = torch.ones_like(kept).scatter(1, case.arrays["kept_sorted"], False)
    lowered = torch.where(kept, asked.amin(), asked)
    among = [torch.ones_like(kept), torch.ones_like(kept), rest]
    recorded = zip((seen, lowered, seen), among, case.facts["lof_calls_k_n_ratio"], strict=True)
    for values, part, (neighbours, total, ratio) in recorded:
        assert part.sum() == total
        found = local_outliers(values, neighbours, part).sum()
        assert found == round(ratio * total), (neighbours, total)


def _tokens(case: Case) -> VisualTokens:
    """What the method is shown, from the encoder's own modules."""
    model = build(case)
    tower, special = model.model.vision_tower, 1
    seen: dict[str, Tensor] = {}
    last = find_family(model).encoder.layers[-1].self_attn
    handles = [
        getattr(last, name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        out = tower(case.arrays["pixel_values"], output_hidden_states=True)
    for handle in handles:
        handle.remove()
    attention = class_row(seen["q_proj"], seen["k_proj"], 1, special)
    assert_close(attention[:, 0], case.arrays["cls_attention"], 1e-5, "attention")
    clip = _clip(case)
    text, mask = clip.of((0,))
    states = out.hidden_states[-1][:, special:]
    signals = {
        "joint_cls_attention": attention,
        "encoder_keys": seen["k_proj"][:, None, None, special:],
        "clip_plain_patches": clip.patches(states, normed=False)[:, None],
        "clip_questions": text,
        "clip_questions_mask": mask,
    }
    features = out.hidden_states[-2][:, special:]
    index = torch.arange(features.shape[1])[None]
    return VisualTokens(lambda: features, index, (1, index.shape[1]), (0,), signals)


def _check_reduction(case: Case) -> None:
    """The method alone: scores, survivors and their values."""
    tokens = _tokens(case)
    assert_close(METHOD.text_scores(tokens), case.arrays["text_score"][0], 1e-5, "text scores")
    (((_, reduction)),) = METHOD.reduce_each(tokens)
    _check_places(case, reduction, tokens.count)
    assert_close(reduction.apply(tokens.x), case.arrays["output"], 1e-4, "output")


def _check_places(case: Case, reduction: Reduction, total: int) -> None:
    main = case.arrays["kept_sorted"][0]
    assert_same(reduction.index[0, : len(main)], main, "survivors of the filters")
    rest = torch.ones(total, dtype=torch.bool).scatter(0, main, False).nonzero()[:, 0]
    centres = rest[case.arrays["cluster_centres_relative_to_remaining"][0]]
    found = reduction.index[0, len(main) : len(main) + len(centres)]
    assert_same(found, centres, "centres")


def _check_model(case: Case) -> None:
    """The whole model: pixels in, and the sequence that the language model reads out."""
    model = build(case)
    total = case.arrays["cls_attention"].shape[1]
    ids = torch.tensor([[TEXT, *[IMAGE] * total, TEXT]])
    language, seen = model.model.language_model, {}
    with foveate.use(model, METHOD, clip=_clip(case)), torch.no_grad():
        handle = Watch(
            language.layers[0],
            lambda module, args, kwargs: seen.update(hidden=args[0][0], **kwargs),
        )
        model(input_ids=ids, pixel_values=case.arrays["pixel_values"])
        handle.remove()
    text = language.embed_tokens.weight[TEXT].detach()[None]
    sequence = torch.cat((text, case.arrays["output"][0], text))
    assert_close(seen["hidden"], sequence, 1e-4, "sequence")
    consecutive = torch.arange(len(sequence))[None]
    wanted = language.rotary_emb(sequence, consecutive)
    for got, part in zip(seen["position_embeddings"], wanted, strict=True):
        assert_close(got, part, 1e-5, "positions")
