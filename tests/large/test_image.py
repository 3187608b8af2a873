"""Windows of images give what the whole image would."""

import builtins

import numpy as np
import pytest
import pyvips
import torch
import torch.nn.functional as F
from PIL import Image

from foveate.errors import InputError
from foveate.large.image import Held, Stored, open_image, read_tile
from foveate.large.pyramid import levels

TILE = 64


def noise(height=350, width=550):
    """Smooth on the left, noise on the right."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    pixels[:, : width // 2] = np.linspace(0, 255, width // 2)[None, :, None].astype(np.uint8)
    return Image.fromarray(pixels)


def put_together(picture, level, smooth):
    whole = np.full((*level.size, 3), np.nan, np.float32)
    for row, column in level.tiles().tolist():
        tile = read_tile(picture, level, row, column, smooth)
        top, left = row * TILE, column * TILE
        whole[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    assert not np.isnan(whole).any()
    return whole


def test_tiles_sampled_as_released_are_those_of_the_whole():
    image = noise()
    picture = Held(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    for level in levels(picture.size, TILE, 128):
        want = F.interpolate(pixels, level.size, mode="bilinear")[0].permute(1, 2, 0)
        got = torch.from_numpy(put_together(picture, level, smooth=False))
        torch.testing.assert_close(got, want, rtol=0, atol=0.05)


def test_sampling_in_bands_changes_nothing(monkeypatch):
    picture = Held(noise())
    level = levels(picture.size, TILE, 128)[1]
    want = put_together(picture, level, smooth=False)
    monkeypatch.setattr("foveate.large.image._BAND", 3000)
    np.testing.assert_array_equal(put_together(picture, level, smooth=False), want)


def test_smooth_tiles_are_those_of_the_whole():
    """No seams: up to a rounding of grey levels, where nothing is reduced by two first."""
    image = noise()
    picture = Held(image)
    fine = [level for level in levels(picture.size, TILE, 128) if level.size[0] > 175]
    assert len(fine) == 2
    for level in fine:
        want = np.asarray(image.resize(level.size[::-1], Image.Resampling.BILINEAR), np.float32)
        got = put_together(picture, level, smooth=True)
        assert np.abs(got - want).max() <= 1


def test_smooth_tiles_average_what_they_cover():
    """A checkerboard of single pixels is grey at every coarse level, and not when sampled."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    picture = Held(Image.fromarray(board))
    coarse = levels(picture.size, TILE, 128)[1]
    assert np.abs(read_tile(picture, coarse, 1, 1) - 127.5).max() < 2
    odd = levels((512, 512), TILE, 150)[1]
    assert read_tile(picture, odd, 1, 1, smooth=False).std() > 20


@pytest.mark.parametrize("kind", ["png", "tiled", "pages", "subifds"])
def test_files_read_by_windows_equal_images_in_memory(tmp_path, kind):
    image = noise()
    path = tmp_path / f"image.{'png' if kind == 'png' else 'tif'}"
    if kind == "png":
        image.save(path)
    else:
        pyramid = {"pyramid": kind != "tiled", "subifd": kind == "subifds"}
        tiles = {"tile": True, "tile_width": 64, "tile_height": 64}
        pyvips.Image.new_from_array(np.array(image)).tiffsave(str(path), **tiles, **pyramid)
    held, stored = Held(image), open_image(path)
    assert isinstance(stored, Stored)
    assert stored.size == held.size
    assert (len(stored._stored) > 1) == (kind in ("pages", "subifds"))
    for level in levels(held.size, TILE, 128):
        for smooth in (True, False):
            a, b = (put_together(picture, level, smooth) for picture in (held, stored))
            assert np.abs(a - b)[:-1, :-1].max() <= 2


def test_coarse_windows_come_from_an_overview(tmp_path, monkeypatch):
    """A large file is gone through once for all coarse levels."""
    image = noise()
    image.save(tmp_path / "image.png")
    held = Held(image)
    monkeypatch.setattr("foveate.large.image._OVERVIEW", 350 * 550 // 20)
    stored = Stored(tmp_path / "image.png")
    assert stored._overview[0] == 8
    for reduce in (4, 8, 16):
        box = (3, 2, 12, 11)
        difference = held.window(box, reduce).astype(int) - stored.window(box, reduce)
        assert np.abs(difference).max() <= 2
    stored._stored = {1: None}  # the file itself is not asked again
    assert stored.window((0, 0, 4, 4), 16).shape == (4, 4, 3)


def test_the_overview_comes_from_stored_reductions(tmp_path, monkeypatch):
    path = tmp_path / "image.tif"
    pyvips.Image.new_from_array(np.array(noise())).tiffsave(
        str(path), tile=True, tile_width=64, tile_height=64, pyramid=True
    )
    monkeypatch.setattr("foveate.large.image._OVERVIEW", 350 * 550 // 20)
    stored = Stored(path)
    stored._stored[1] = None  # the whole image is not looked at
    assert stored._overview[0] == 8
    assert stored.window((0, 0, 4, 4), 16).shape == (4, 4, 3)


def test_modes_and_rotation():
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert Held(grey).window((0, 0, 4, 3), 1).shape == (3, 4, 3)
    turned = grey.copy()
    turned.getexif()[0x0112] = 6  # the camera was held upright
    assert Held(turned).size == (4, 3)


def test_alpha_and_sixteen_bits(tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save(tmp_path / "a.png")
    assert Stored(tmp_path / "a.png").window((0, 0, 20, 10), 1)[0, 0].tolist() == [255, 0, 0]
    deep = (pyvips.Image.black(20, 10) + 65535).cast("ushort").copy(interpretation="grey16")
    deep.pngsave(str(tmp_path / "b.png"))
    assert Stored(tmp_path / "b.png").window((0, 0, 20, 10), 1).min() == 255


def test_what_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no image"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match="cannot read"):
        open_image(tmp_path / "text.png")


def test_without_pyvips_small_files_are_held_and_large_ones_refused(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pyvips":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    noise().save(tmp_path / "image.png")
    monkeypatch.setattr(builtins, "__import__", missing)
    assert isinstance(open_image(tmp_path / "image.png"), Held)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"foveate\[large\]"):
        open_image(tmp_path / "image.png")
