"""FlowCut: a recorded CLIP encoder that drops patches while it runs, inside a LLaVA around it."""

from functools import partial

import torch
from golden_case import Case, Check, Watch, assert_close, assert_same
from golden_encoder import TEXT, build, prompt

import foveate
from foveate.methods.flowcut import FlowCut


def checks(case: Case) -> dict[str, Check]:
    return {"model": partial(_check_model, case)}


def _check_model(case: Case) -> None:
    """Pixels in; patches left at each layer, those that survive, and what is read out of them."""
    model = build(case)
    config = model.config.vision_config
    inputs = prompt(case, (config.image_size // config.patch_size) ** 2)
    language = model.model.language_model
    text = language.embed_tokens.weight[TEXT].detach()[None]
    seen: dict = {}

    def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen["hidden"] = args[0][0]

    for run, expected in case.runs():
        with (
            foveate.use(model, FlowCut(keep=run["target_num"], as_released=True)) as session,
            torch.no_grad(),
        ):
            handle = Watch(language.layers[0], look)
            model(**inputs)
            handle.remove()
        record = session.record
        # A recorded state is what a layer has left; here a layer begins with what it is to see.
        counts = [attention - 1 for attention, _ in record.encoder_tokens]
        total = counts[0]
        assert [total, *counts[1:], counts[-1]] == _entered(expected), f"counts of {run}"
        kept = torch.stack([list(places.values())[-1] for places in session.kept])
        assert_same(kept, expected["kept"], f"kept of {run}")
        crops = [torch.cat((crop, text)) for crop in expected["features"]]
        assert_close(seen["hidden"], torch.cat([text, *crops]), 1e-4, f"sequence of {run}")


def _entered(expected: dict[str, torch.Tensor]) -> list[int]:
    """Patches that enter each layer, and leave the last."""
    return expected["patch_count_per_hidden_state"].tolist()
