"""DToP: recorded decisions of one exit, with what the head says given."""

import torch
from golden_case import Case, Check, assert_close, assert_same

from foveate.core import Step, VisualTokens
from foveate.methods.dtop import DToP
from foveate.ops.rows import put_rows
from foveate.ops.token_heads import probabilities


def checks(case: Case) -> dict[str, Check]:
    params, arrays = case.facts["params"], case.arrays
    method = DToP(threshold=params["threshold"], context=params["keep_per_class"])
    return {
        "decision": lambda: _check_decision(method, arrays),
        "step": lambda: _check_step(method, arrays),
    }


def _check_decision(method: DToP, arrays: dict[str, torch.Tensor]) -> None:
    """Probabilities of the stage, and which tokens have left after it, with all tokens in place."""
    logits, before = arrays["mask_logits"].mT, arrays["finished_in"]
    canvas = torch.where(before[..., None], arrays["canvas_in"].mT, logits)
    assert_close(canvas.mT, arrays["canvas_out"], 0, "canvas")
    shown = probabilities(canvas, arrays["class_logits"])
    assert_close(shown.mT, arrays["prob"], 1e-5, "map of the stage")
    leaves = method.leaves(probabilities(logits, arrays["class_logits"]), ~before)
    assert_same(before | leaves, arrays["finished_out"], "finished")


def _check_step(method: DToP, arrays: dict[str, torch.Tensor]) -> None:
    """The same of a step of the method, which is shown only tokens that have not left."""
    before, logits = arrays["finished_in"], arrays["mask_logits"].mT
    order = before.long().argsort(dim=1, stable=True)
    most = int((~before).sum(1).max())
    index, valid = order[:, :most], ~before.gather(1, order)[:, :most]

    def head(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What was recorded of the tokens (G, n, C + 1), the last entry being their image."""
        image = x[:, 0, -1].long()
        return x[..., :-1].mT, arrays["class_logits"][image]

    images = torch.arange(len(before))[:, None, None].expand(*index.shape, 1)
    x = torch.cat((logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1])), images), -1)
    layer = before.long() - 1  # those that have left, did so after layer 0
    tokens = VisualTokens(
        lambda: x, index, (before.shape[1], 1), step=Step("vision", 8), valid=valid, number=1,
        learned=torch.nn.ModuleList([torch.nn.Identity(), Said(head)]),
        memory={"layer": layer, "stages": [arrays["canvas_in"].mT], "present": [None], "grid": ()},
    )  # fmt: skip
    reduction = method.reduce(tokens, 1)
    assert_close(tokens.memory["stages"][-1].mT, arrays["canvas_out"], 0, "canvas")
    finished = torch.ones_like(before)
    stays = torch.ones_like(reduction.index, dtype=torch.bool)
    stays = stays if reduction.valid is None else reduction.valid
    kept = index.gather(1, reduction.index)
    finished = put_rows(
        finished[..., None], kept, torch.zeros_like(kept, dtype=torch.bool)[..., None], stays
    )
    assert_same(finished[..., 0], arrays["finished_out"], "finished")
    assert_same(tokens.memory["layer"] >= 0, arrays["finished_out"], "layers after which they left")


class Said(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x)
