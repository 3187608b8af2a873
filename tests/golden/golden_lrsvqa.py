"""LRS-VQA: the released selection, tile mapping and layout on given arrays."""

from functools import partial

import torch
from golden_case import Case, Check, assert_close, assert_same
from torch import Tensor

from foveate.large.pyramid import pool, tiles_below_as_released, unpadded_as_released
from foveate.methods.lrsvqa import LRSVQA


def checks(case: Case) -> dict[str, Check]:
    return {
        "ratio": partial(_check_ratio, case),
        "threshold": partial(_check_threshold, case),
        "tiles": partial(_check_tiles, case),
        "pool": partial(_check_pool, case),
        "unpad": partial(_check_unpad, case),
    }


def _grid(case: Case) -> tuple[int, int]:
    """Rows and columns of tokens, newlines counted."""
    return int(case.facts["rows"]), int(case.facts["tokens_per_row_incl_newline"])


def _newline(case: Case) -> Tensor:
    rows, columns = _grid(case)
    return torch.arange(rows * columns) % columns == columns - 1


def _chosen(case: Case, method: LRSVQA, valid: Tensor) -> Tensor:
    """Positions on the whole grid of what is chosen among valid tokens."""
    kept = method.chosen(case.arrays["attention"][valid], _newline(case)[valid])
    return torch.where(valid)[0][kept]


def _check_ratio(case: Case) -> None:
    newline = _newline(case)
    valid = case.arrays["mask"].bool()
    for number, ratio in enumerate(case.facts["ratio_runs"]):
        method = LRSVQA(keep=ratio, as_released=True)
        kept = _chosen(case, method, torch.ones_like(valid))
        assert_same(kept, case.arrays[f"ratio{number}.kept"], f"kept of {ratio}")
        # The recorded mask also marks newlines as invalid, which the release keeps all the same;
        # on its own canvases they are always valid.
        masked = torch.cat((_chosen(case, method, valid), torch.where(newline)[0])).unique()
        assert_same(masked, case.arrays[f"ratio{number}.kept_masked"], f"masked, {ratio}")


def _check_threshold(case: Case) -> None:
    valid = case.arrays["mask"].bool()
    for number, threshold in enumerate(case.facts["threshold_runs"]):
        method = LRSVQA(threshold=threshold, as_released=True)
        kept = _chosen(case, method, torch.ones_like(valid))
        assert_same(kept, case.arrays[f"threshold{number}.kept"], f"kept above {threshold}")
        masked = _chosen(case, method, valid)
        assert_same(masked, case.arrays[f"threshold{number}.kept_masked"], f"masked, {threshold}")


def _check_tiles(case: Case) -> None:
    rows, columns = _grid(case)
    blocks = tuple(case.facts["next_level_blocks_hw"])
    for number in range(len(case.facts["ratio_runs"])):
        kept = case.arrays[f"ratio{number}.kept"]
        cell = torch.stack((kept // columns, kept % columns), 1)
        tiles = tiles_below_as_released(cell, (rows, columns), blocks)
        assert_same(tiles, case.arrays[f"ratio{number}.next_level_tiles_rc"], "tiles")
        ids = tiles[:, 0] * blocks[1] + tiles[:, 1]
        assert_same(ids, case.arrays[f"ratio{number}.next_level_tile_ids"], "numbers of tiles")


def _check_pool(case: Case) -> None:
    tokens = case.arrays["pool_in"]
    side = round(tokens.shape[1] ** 0.5)
    pooled = pool(tokens.unflatten(1, (side, side))).flatten(1, 2)
    assert_close(pooled, case.arrays["pool_out"], 1e-5, "pooled tokens")


def _check_unpad(case: Case) -> None:
    padded = case.arrays["unpad_in"]
    for number, original in enumerate(case.facts["unpad_original_hw"]):
        rows, columns = unpadded_as_released(tuple(original), tuple(padded.shape[1:]))
        assert_close(padded[:, :rows, :columns], case.arrays[f"unpad{number}.out"], 0.0, "unpadded")
