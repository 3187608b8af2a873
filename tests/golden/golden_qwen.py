"""HiPrune on a recorded Qwen2.5-VL encoder, whose tokens are cells of 2 x 2 patches."""

from collections.abc import Iterator
from functools import partial

import torch
from golden_case import Case, Check, Watch, assert_close, assert_same
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import foveate
from foveate.core import Method, Need, Reduction, Step, VisualTokens
from foveate.methods.hiprune import HiPrune


def checks(case: Case) -> dict[str, Check]:
    found = {"selection": _check_selection, "scores": _check_scores, "model": _check_model}
    return {name: partial(check, case) for name, check in found.items()}


def _runs(case: Case) -> Iterator[tuple[str, HiPrune, dict[str, Tensor]]]:
    for run, expected in case.runs():
        method = HiPrune(
            keep=run["retention"],
            alpha=run["alpha"],
            layer=run["object_layer_1based"] - 1,
            as_released="qwen",
        )
        yield str(run), method, expected


def _check_selection(case: Case) -> None:
    """The method alone, on the recorded sums over queries, of which it is given means."""
    scores = case.arrays["merged_token_scores_per_block"]
    ((_, height, width),) = case.arrays["image_grid_thw"].tolist()
    total = scores.shape[1]
    for name, method, expected in _runs(case):
        signal = torch.stack((scores[method.layer], scores[-1]))[None] / (height * width)
        tokens = VisualTokens(
            lambda: torch.empty(0),
            torch.arange(total)[None],
            (height // 2, width // 2),
            signals={"received_attention": signal},
        )
        kept = method.reduce(tokens, round(method.keep * total)).index
        assert_same(kept[0], expected["kept"], f"kept of {name}")


def _build(case: Case) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with the recorded encoder and a random text model."""
    vision = case.facts["vision_config"]
    text = {
        "vocab_size": 64, "hidden_size": vision["out_hidden_size"], "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]
        },
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=int(case.facts["image_token_id"]),
        video_token_id=61,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    weights = {
        name.removeprefix("visual."): array
        for name, array in case.arrays.items()
        if name.startswith("visual.")
    }
    model.model.visual.load_state_dict(weights)
    return model


def _inputs(case: Case) -> dict[str, Tensor]:
    ids = case.arrays["input_ids"]
    inputs = {name: case.arrays[name] for name in ("pixel_values", "image_grid_thw", "input_ids")}
    image = ids == int(case.facts["image_token_id"])
    return {**inputs, "mm_token_type_ids": image.int(), "attention_mask": torch.ones_like(ids)}


class _Spy(Method):
    """Notes the attention that tokens receive in every block, and keeps one of them."""

    slug, stage, needs, paper = "spy", "pre_llm", (), ""
    keep, positions = 1, None

    def __init__(self, blocks: int) -> None:
        self.blocks, self.seen = blocks, torch.empty(0)

    def steps(self, model: object) -> tuple[Step, ...]:
        need = Need("received_attention", tuple(range(self.blocks)))
        return (Step("pre_llm", needs=(need,)),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        self.seen = tokens.signal("received_attention")
        return Reduction(tokens.index[:, :count])


def _check_scores(case: Case) -> None:
    """Attention received in every block, full or windowed, through the encoder as it runs."""
    model, scores = _build(case), case.arrays["merged_token_scores_per_block"]
    ((_, height, width),) = case.arrays["image_grid_thw"].tolist()
    spy = _Spy(len(scores))
    with foveate.use(model, spy), torch.no_grad():
        model(**_inputs(case))
    assert_close(spy.seen[0] * height * width, scores, 1e-4, "scores")


def _check_model(case: Case) -> None:
    """Pixels in; tokens kept, and where the language model sees them."""
    model = _build(case)
    language = model.model.language_model
    seen: dict = {}

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["hidden"], seen["rotary"] = args[0], kwargs["position_embeddings"]

    for name, method, expected in _runs(case):
        with foveate.use(model, method) as session, torch.no_grad():
            handle = Watch(language.layers[0], look)
            model(**_inputs(case))
            handle.remove()
        (places,) = session.kept
        assert_same(places["pre_llm"], expected["kept"], f"kept of {name}")
        rotary = language.rotary_emb(seen["hidden"], expected["position_ids"])
        for got, want in zip(seen["rotary"], rotary, strict=True):
            assert_close(got, want, 1e-5, f"positions of {name}")
