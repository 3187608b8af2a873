"""Methods over frames of videos, on given features."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from golden_case import Case, Check, assert_close, assert_same
from torch import Tensor

from foveate.core import Reduction, Step, VisualTokens
from foveate.methods.dycoke import DyCoke
from foveate.methods.evs import EVS
from foveate.methods.fastvid import FastVID
from foveate.methods.flashvid import FlashVID
from foveate.methods.holitom import HoliTom, best_segments, run_lengths
from foveate.methods.prunevid import PruneVid
from foveate.methods.vidcom2 import VidCom2, likeness, steady_channels
from foveate.ops.segments import segments_of, windows

VALUES = 1e-5  # absolute tolerance


def checks(case: Case) -> dict[str, Check]:
    """The checks of a case, by its slug and the kind of recording."""
    offered = {
        "evs": {"retention_mask": _check_evs, "retained_count": _check_evs_counts},
        "dycoke": {"kept_token_index": _check_ttm, "selection_made": _check_decoding},
        "fastvid": {"segment_sizes": _check_fastvid_segments, "keep_index": _check_fastvid},
        "prunevid": {
            "window_sizes": _check_windows,
            "merged": _check_prunevid,
            "kept_sorted": _check_asked,
        },
        "vidcom2": {"run0.kept": _check_vidcom2},
        "flashvid": {"run0.out": _check_flashvid},
        "holitom": {"segments": _check_segments, "output_tokens": _check_holitom},
    }
    return {
        name: partial(check, case)
        for name, check in offered[case.slug].items()
        if name in case.names
    }


def _params(case: Case) -> dict[str, Any]:
    params = case.facts["params"]
    return json.loads(params) if isinstance(params, str) else params


def _video(x: Tensor, frames: int, quota: int = 0, **signals: Tensor) -> VisualTokens:
    """One video of (V, D) tokens, of which so many may stay."""
    index = torch.arange(len(x))[None]
    grid = (1, len(x) // frames)
    return VisualTokens(
        lambda: x[None], index, grid, (0,), signals, site="pre_llm", frames=frames, quota=quota
    )


def _quota(method: Any, total: int) -> int:
    return method.count(total, total, Step("pre_llm"), 0)


def _only(method: Any, tokens: VisualTokens) -> Reduction:
    ((_, reduction),) = method.reduce_each(tokens)
    return reduction


def _check_evs(case: Case) -> None:
    params, arrays = _params(case), case.arrays
    method, x = EVS(keep=1 - params["q"]), arrays["video_embeds"]
    reduction = _only(method, _video(x, params["T"], _quota(method, len(x))))
    assert_same(reduction.index[0], arrays["retention_mask"].nonzero()[:, 0], "kept")
    assert reduction.kept == int(arrays["retained_count"])
    frames = torch.bincount(
        reduction.index[0] // (len(arrays["video_embeds"]) // params["T"]), minlength=params["T"]
    )
    assert_same(frames, arrays["tokens_per_frame"], "tokens per frame")


def _check_evs_counts(case: Case) -> None:
    """A table of budgets beside the cases."""
    for row in json.loads(case.path.with_name("counts.json").read_text()):
        frames, cells = row["num_frames"], row["tokens_per_frame"]
        if frames > 1:  # one frame is an image
            method, x = EVS(keep=1 - row["q"]), torch.randn(frames * cells, 4)
            tokens = _video(x, frames, _quota(method, len(x)))
            assert _only(method, tokens).kept == row["retained"], row


def _check_ttm(case: Case) -> None:
    params, arrays = _params(case), case.arrays
    method = DyCoke(k=params["dycoke_k"], as_released=True)
    x = arrays["image_feature"]
    reduction = _only(method, _video(x, params["frames"]))
    assert_same(reduction.index[0], arrays["kept_token_index"], "kept, in order")
    assert_same(reduction.apply(x[None])[0], arrays["output"], "values")


def _check_decoding(case: Case) -> None:
    """What each decoding step of the release attends to, on recorded attention."""
    params, arrays = _params(case), case.arrays
    start, length = params["image_token_start_index"], params["image_token_length"]
    span = slice(start, start + length)
    method = DyCoke(p=params["dycoke_p"], threshold=params["threshold"], as_released=True)
    focus = None
    for step in range(params["steps"]):
        attention = arrays[f"attn{step}"]
        focus = method.choose(attention[..., span], torch.ones(1, length, dtype=torch.bool), focus)
        seen = torch.ones(attention.shape[-1], dtype=torch.bool)
        seen[span] = focus.seen[0]
        whole = torch.arange(len(seen))
        made = bool(arrays["selection_made"][step])
        assert_same(
            seen.nonzero()[:, 0], arrays[f"kept{step}"] if made else whole, f"kept at step {step}"
        )


def _fastvid(case: Case) -> FastVID:
    params = _params(case)
    return FastVID(
        keep=params["retention_ratio"],
        segments=params["DySeg_c"],
        tau=params["DySeg_tau"],
        d=params["STPrune_d"],
        p=params["DTM_p"],
        beta=params["DTM_beta"],
    )


def _check_fastvid_segments(case: Case) -> None:
    method = _fastvid(case)
    segments = segments_of(case.arrays["frame_global_features"], method.segments, method.tau)
    lengths = torch.tensor([last - first + 1 for first, last in segments])
    assert_same(lengths, case.arrays["segment_sizes"], "segments")


def _check_fastvid(case: Case) -> None:
    params, arrays, method = _params(case), case.arrays, _fastvid(case)
    frames, cells, start = (params[n] for n in ("frames", "tokens_per_frame", "video_start_idx"))
    end = start + frames * cells
    x, out = arrays["hidden_states"][0], arrays["hidden_out"][0]
    attention, frame = arrays["frame_attn_weights"], arrays["frame_global_features"]
    video = x[start:end].view(frames, cells, -1)
    reduction = method.reduce_video(video, attention, frame, int(cells * method.keep))
    kept = torch.cat((torch.arange(start), start + reduction.index[0], torch.arange(end, len(x))))
    assert_same(kept, arrays["keep_index"], "kept")
    values = reduction.apply(x[None, start:end])[0]
    assert_close(torch.cat((x[:start], values, x[end:])), out, VALUES, "values")


def _check_windows(case: Case) -> None:
    arrays = case.arrays
    for name in {"labels", "frame_cluster"} & case.names:
        lengths = torch.tensor(windows(arrays[name].tolist()))
        assert_same(lengths, arrays["window_sizes"], "windows")


def _check_prunevid(case: Case) -> None:
    params, arrays = _params(case), case.arrays
    method = PruneVid(
        tau=params["tau"],
        frame_ratio=params["temporal_segment_ratio"],
        cluster_ratio=params["cluster_ratio"],
        k=params["k"],
    )
    reduction = _only(method, _video(arrays["frames"][0], params["num_frames"]))
    assert_close(reduction.apply(arrays["frames"]), arrays["merged"], VALUES, "values")


def _check_asked(case: Case) -> None:
    """The cut inside the language model, on recorded attention."""
    params, arrays = _params(case), case.arrays
    sizes = []  # of each set: a window's static tokens, then each of its frames
    for frames, static, dynamic in zip(
        *(arrays[f"{kind}_sizes"].tolist() for kind in ("window", "static", "dynamic")), strict=True
    ):
        sizes += [static, *([dynamic // frames] * frames)]
    label = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]
    attention = arrays["text_to_image_attn"][:, None]  # one layer
    tokens = VisualTokens(
        lambda: pytest.fail("the cut needs no features"),
        torch.arange(label.shape[1])[None],
        (1, label.shape[1]),
        (0,),
        {"question_attention": attention},
        site="llm:11",
        frames=2,
        label=label,
    )
    reduction = _only(PruneVid(alpha=params["alpha"]), tokens)
    assert_same(reduction.index[0], arrays["kept_sorted"], "kept")


def _holitom(case: Case) -> HoliTom:
    facts = case.facts
    return HoliTom(
        keep=facts["RETAIN_RATIO"],
        tau=facts["T"],
        beta=facts["BETA"],
        k=facts["K"],
        window=facts["MAX_WINDOW_SIZE"],
        d=facts["D"],
    )


def _check_segments(case: Case) -> None:
    method, alike = _holitom(case), case.arrays["frame_similarity"]
    segments, saved = best_segments(run_lengths(alike > method.tau), method.window)
    assert_same(torch.tensor(segments), case.arrays["segments"], "segments")
    assert saved == case.facts["total_reduced"]


def _check_holitom(case: Case) -> None:
    x, arrays = case.arrays["features"], case.arrays
    tokens = _video(
        x.flatten(0, 1), len(x), received_attention=arrays["attn"].flatten()[None, None]
    )
    reduction = _only(_holitom(case), tokens)
    values = reduction.apply(x.flatten(0, 1)[None])[0]
    assert_close(values, arrays["output_tokens"], VALUES, "values")


def _check_vidcom2(case: Case) -> None:
    x = case.arrays["x"]
    for run, expected in case.runs():
        of_video, of_frame = likeness(steady_channels(x[None]))
        assert_close((of_video + of_frame)[0].float(), expected["scores"], VALUES, "scores")
        reduction = _only(VidCom2(keep=run["base_scale"]), _video(x.flatten(0, 1), len(x)))
        assert_same(reduction.index[0], expected["kept"], f"kept of {run}")


def _check_flashvid(case: Case) -> None:
    """Its trees are divided as released, and no segment has a single frame."""
    x, attention = case.arrays["x"], case.arrays["attention"]
    for run, expected in case.runs():
        fields = {n: v for n, v in run.items() if n in FlashVID.__dataclass_fields__}
        method = FlashVID(keep=run["retention_ratio"], as_released=True, **fields)
        tokens = _video(x.flatten(0, 1), len(x), received_attention=attention.flatten()[None, None])
        reduction = _only(method, tokens)
        assert_same(reduction.index[0], expected["index"], f"kept of {run}")
        values = reduction.apply(x.flatten(0, 1)[None])[0]
        assert_close(values, expected["out"], VALUES, f"values of {run}")
