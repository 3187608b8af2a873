"""HoT: recorded clusters of frames, and poses by the MixSTE beside this file."""

from functools import partial

import torch
from golden_case import Case, Check, assert_close, assert_same
from safetensors.torch import load_file

from foveate.core import VisualTokens
from foveate.core.ranking import ranked, top
from foveate.methods.hot import Frames, HoT
from foveate.ops.clustering import nearest_center, squared_distances
from foveate.ops.frames import FrameRecovery
from tests.mixste import MixSTE, Sizes

RECOVERY = {"linear_q": "query", "linear_k": "key", "linear_v": "value", "proj": "output"}


def checks(case: Case) -> dict[str, Check]:
    kind = case.facts["params"]["kind"]
    if kind == "end_to_end":
        return {"selected": partial(_check_selected, case), "poses": partial(_check_poses, case)}
    return {"centers": partial(_check_centers, case), "selected": partial(_check_chosen, case)}


def _method(case: Case) -> HoT:
    params = case.facts["params"]
    return HoT(k=params["k"], frames=case.arrays["selected_sorted"].shape[1])


def _scores(case: Case) -> torch.Tensor:
    arrays, middle = case.arrays, case.facts["params"]["center"]
    return _method(case).scores(arrays["x"], middle, arrays["noise"])


def _check_centers(case: Case) -> None:
    """Centers by rank, where one that is kept in any case has none, and who joins them."""
    params, arrays = case.facts["params"], case.arrays
    order = ranked(_scores(case), 1.0)
    first = 0 if params["center"] is None else 1
    centers = order[:, first : first + params["cluster_num"]]
    assert_same(centers, arrays["centers_ranked"], "centers")
    if "cluster_assign" in arrays:
        joined = nearest_center(squared_distances(arrays["x"].double()), centers)
        assert_same(joined, arrays["cluster_assign"], "clusters")


def _check_chosen(case: Case) -> None:
    selected = case.arrays["selected_sorted"]
    assert_same(top(_scores(case), selected.shape[1], 1.0), selected, "selected")


def _check_selected(case: Case) -> None:
    arrays, weights = case.arrays, _weights(case)
    scores = HoT().scores(arrays["knn_feature"], noise=arrays["noise"])
    kept = len(weights["pos_embed_token"][0])
    assert_same(top(scores, kept, 1.0), arrays["selected_sorted"], "selected")


@torch.no_grad()
def _check_poses(case: Case) -> None:
    """Poses, by the method's step within the model and its way back."""
    arrays, weights = case.arrays, _weights(case)
    kept, total = len(weights["pos_embed_token"][0]), len(weights["x_token"][0])
    width, joints = weights["x_token"].shape[-1], arrays["pose2d"].shape[2]
    learned = FrameRecovery(width, total, kept, 8)
    learned.load_state_dict(_recovery(weights))
    model = MixSTE(Sizes(width, total, joints))
    model.load_recorded(weights)

    class Recorded(HoT):
        def scores(self, frames, middle=None):
            return super().scores(frames, middle, arrays["noise"])

    def shown(x: torch.Tensor) -> VisualTokens:
        flat, step = x.flatten(1, 2), Frames("vision", 3, frames=total)
        index = torch.arange(total * joints).expand(len(x), -1)
        return VisualTokens(
            lambda: flat, index, (1, joints), step=step, frames=total, learned=learned
        )

    got = model(arrays["pose2d"], Recorded(layer=3, frames=kept), shown)
    assert_close(got, arrays["pose3d"], 1e-4, "poses")


def _weights(case: Case) -> dict[str, torch.Tensor]:
    return load_file(case.path.parent / case.facts["params"]["weights"])


def _recovery(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {"positions": weights["pos_embed_token"][0], "queries": weights["x_token"][0]}
    for theirs, ours in RECOVERY.items():
        for part in ("weight", "bias"):
            found[f"{ours}.{part}"] = weights[f"cross_attention.{theirs}.{part}"]
    return found
