"""VisualTokens: where tokens are in their image or video."""

import torch

from foveate.core import VisualTokens

INDEX = torch.tensor([[0, 4, 5, 6, 11, 17, 18]])


def tokens(grid, frames=1):
    return VisualTokens(lambda: torch.zeros(1, 7, 2), INDEX, grid, frames=frames)


def test_tokens_of_an_image_have_a_row_and_a_column():
    image = tokens((5, 4))
    assert image.frame.tolist() == [[0] * 7]
    assert image.coordinates[0].tolist() == [
        [0, 0], [1, 0], [1, 1], [1, 2], [2, 3], [4, 1], [4, 2],
    ]  # fmt: skip


def test_tokens_of_a_video_have_a_frame_and_a_cell_in_it():
    """Three frames of 2 x 3; the last token is a newline after them, below the last frame."""
    video = tokens((2, 3), frames=3)
    assert video.frame.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert video.coordinates[0].tolist() == [
        [0, 0], [1, 1], [1, 2], [0, 0], [1, 2], [1, 2], [2, 0],
    ]  # fmt: skip
