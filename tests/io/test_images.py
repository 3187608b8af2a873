"""One loader: whatever a file holds becomes RGB of 8 bits, or an error in one line."""

import base64
import contextlib
import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import pyvips
from PIL import Image, TiffImagePlugin
from typer.testing import CliRunner

from foveate.bench.data import packed_image, photo
from foveate.cli import app
from foveate.cli.inputs import load_image as cli_image
from foveate.errors import BenchError, InputError
from foveate.integrations.chat import _open as chat_image
from foveate.io.images import as_rgb, load_image, to_rgb
from foveate.large.image import Stored, open_image
from foveate.training.finetune import Conversations
from recipes.data import load_photos

DEEP = np.array([[0, 128, 129, 256, 257], [1000, 12850, 32896, 65406, 65535]], np.uint16)
DEEP_GREY = [[0, 0, 1, 1, 1], [4, 50, 128, 254, 255]]  # value / 257, rounded


def grey(image):
    """Its values, once all three channels were found equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


def saved(tmp_path, values, name="image.tif", **options):
    path = tmp_path / name
    Image.fromarray(np.asarray(values)).save(path, **options)
    return path


def windows(path):
    """The whole of a stored image as `foveate.large` reads it."""
    picture = Stored(path)
    height, width = picture.size
    return Image.fromarray(picture.window((0, 0, width, height), 1))


def conversation(path):
    said = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]
    data = path.with_suffix(".jsonl")
    data.write_text(json.dumps({"messages": said, "images": [path.name]}))
    return Conversations(data)[0].open_images()[0]


def zipped(path):
    folder = path.parent / "nlvr"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "dev-images.zip", "w") as archive:
        archive.write(path, path.name)
    return packed_image(path.parent, "nlvr", "dev", path.name)


def photograph(path):
    folder = path.parent / "coco-cc" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    return photo(path.parent, path.name)


def background(path):
    shown = load_photos([path])[0]
    with Image.open(path) as image:
        return shown.resize(image.size, Image.Resampling.NEAREST)


OPENERS = {
    "library": load_image,
    "open file": lambda path: load_image(io.BytesIO(path.read_bytes())),
    "memory": lambda path: as_rgb(Image.open(path)),
    "command line": cli_image,
    "training": conversation,
    "photographs": photograph,
    "zipped": zipped,
    "chat": lambda path: chat_image(str(path), None),
    "chat, open": lambda path: chat_image(Image.open(path), None),
    "chat, base64": lambda path: chat_image(
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(), None
    ),
    "large": windows,
}


@pytest.mark.parametrize("kind", ["png", "tif", "tif, big endian"])
@pytest.mark.parametrize("opener", OPENERS)
def test_sixteen_bits_become_eight_everywhere(tmp_path, opener, kind):
    values = DEEP.astype(">u2") if "big" in kind else DEEP
    path = saved(tmp_path, values, f"deep.{kind[:3]}")
    assert grey(OPENERS[opener](path)) == DEEP_GREY


@pytest.mark.parametrize("opener", OPENERS)
def test_floats_become_eight_bits_everywhere(tmp_path, opener):
    path = saved(tmp_path, np.array([[0, 0.1, 0.5, 1]], np.float32))
    assert grey(OPENERS[opener](path)) == [[0, 26, 128, 255]]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0.25, 0.5]], np.float32), [[64, 128]]),  # within [0, 1]: not stretched
        (np.array([[-10, 0, 90]], np.float32), [[0, 26, 255]]),
        (np.array([[0, 1, 5]], np.float32), [[0, 51, 255]]),
        (np.array([[300, 300]], np.float32), [[0, 0]]),
        (np.array([[np.nan, 0, 0.5, np.inf, -np.inf]], np.float32), [[0, 0, 128, 255, 0]]),
        (np.array([[np.nan, 2, 4]], np.float32), [[0, 0, 255]]),
        (np.array([[0, 7, 255]], np.int32), [[0, 7, 255]]),
        (np.array([[0, 257, 65535]], np.int32), [[0, 1, 255]]),
        (np.array([[0, 100000, 1000000]], np.int32), [[0, 26, 255]]),
        (np.array([[-100, 0, 100]], np.int32), [[0, 128, 255]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("opener", ["library", "memory", "large"])
def test_ranges(tmp_path, values, shown, opener):
    assert grey(OPENERS[opener](saved(tmp_path, values))) == shown


@pytest.mark.parametrize("opener", ["library", "large"])
@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0, 2**31, 2**32 - 1]], np.uint32), [[0, 128, 255]]),
        (np.array([[-32768, 0, 32767]], np.int16), [[0, 128, 255]]),
    ],
    ids=["unsigned 32", "signed 16"],
)
def test_depths_that_pillow_cannot_write(tmp_path, values, shown, opener):
    pyvips.Image.new_from_array(values).tiffsave(str(tmp_path / "a.tif"))
    assert grey(OPENERS[opener](tmp_path / "a.tif")) == shown


def test_in_memory_images_of_every_deep_mode():
    for mode in ("I;16", "I;16L", "I;16B"):
        assert grey(as_rgb(Image.new(mode, (2, 1), 32896))) == [[128, 128]]
    assert grey(as_rgb(Image.fromarray(DEEP))) == DEEP_GREY
    assert grey(to_rgb(Image.new("L", (1, 1), 200).convert("I"))) == [[200]]


def test_twelve_bits_and_white_as_zero_are_what_the_file_declares(tmp_path, monkeypatch):
    path = saved(tmp_path, np.array([[0, 2048, 4095]], np.uint16))
    real = TiffImagePlugin.ImageFileDirectory_v2.get
    declared = {258: (12,), 262: 1}

    def get(self, tag, default=None):
        return declared.get(tag) or real(self, tag, default)

    image = Image.open(path)
    image.load()
    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "get", get)
    assert grey(to_rgb(image)) == [[0, 128, 255]]
    monkeypatch.undo()
    image.tag_v2[262] = 0
    assert grey(to_rgb(image)) == [[255, 247, 239]]


@pytest.mark.parametrize("opener", OPENERS)
def test_what_is_transparent_is_white_everywhere(tmp_path, opener):
    path = tmp_path / "clear.png"
    image = Image.new("RGBA", (3, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    image.save(path)
    shown = np.asarray(OPENERS[opener](path))[0].tolist()
    assert shown == [[255] * 3, [10, 20, 30], [204] * 3]


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBa", "P", "L", "RGB", "1", "I;16"])
def test_transparency_of_every_mode(tmp_path, mode):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    if mode in ("LA", "PA"):
        image = clear.convert(mode)
    elif mode in ("La", "RGBa"):
        image = clear.convert("LA" if mode == "La" else "RGBA").convert(mode)
    else:  # one value or palette entry that stands for nothing
        dark, other = (0, 0, 0), (0, 0, 1)
        image = Image.new("RGB", (2, 1), dark)
        image.putpixel((1, 0), other)
        value = dark if mode == "RGB" else 0
        if mode != "RGB":
            image = Image.fromarray(np.array([[0, 1]], np.uint16 if mode == "I;16" else np.uint8))
            image = image if mode == "I;16" else image.point([0, 255] * 128).convert(mode)
        image.save(tmp_path / "a.png", transparency=value)
        image = Image.open(tmp_path / "a.png")
    assert image.mode == mode
    left, right = np.asarray(as_rgb(image))[0].tolist()
    assert left == [255] * 3
    if mode in ("L", "1", "P"):
        assert right == [255] * 3
    else:
        assert max(right) <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_are_what_pillow_makes_of_them(mode):
    image = Image.effect_noise((8, 8), 80).convert("RGB").convert(mode)
    assert as_rgb(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("opener", OPENERS)
def test_orientation_is_applied_everywhere(tmp_path, opener, suffix):
    path = tmp_path / f"turned.{suffix}"
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: what is left belongs above
    image.save(path, exif=exif)
    shown = OPENERS[opener](path)
    assert shown.size == (8, 16)
    assert np.asarray(shown)[:6].min() > 200
    assert np.asarray(shown)[10:].max() < 50


def test_damaged_exif_is_passed_over_with_a_warning(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 2), "red").save(path, exif=b"Exif\0\0nonsense")
    with pytest.warns(UserWarning, match=r"EXIF data of .*a\.png is damaged"):
        assert load_image(path).size == (4, 2)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
@pytest.mark.parametrize("opener", ["library", "training", "photographs", "chat", "large"])
def test_the_first_of_several_frames_is_taken_and_said(tmp_path, opener, suffix):
    path = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    said = pytest.warns(UserWarning, match=r"moving\.\w+ holds several images .* only the first")
    if (opener, suffix) == ("large", "png"):  # libvips knows PNG without animations
        said = contextlib.nullcontext()
    with said:
        shown = OPENERS[opener](path)
    assert np.abs(np.asarray(shown, int)[0, 0] - [255, 0, 0]).max() < 4


def test_one_frame_is_no_animation(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "a.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / "a.gif")
        windows(tmp_path / "a.gif")


def test_a_stored_pyramid_is_no_animation(tmp_path):
    noise = np.asarray(Image.effect_noise((400, 300), 80))
    pyvips.Image.new_from_array(noise).tiffsave(
        str(tmp_path / "a.tif"), tile=True, tile_width=64, tile_height=64, pyramid=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Stored(tmp_path / "a.tif")._stored) > 1


def test_reductions_of_floats_have_the_range_of_the_image(tmp_path):
    ramp = np.tile(np.linspace(0, 1000, 512, dtype=np.float32), (512, 1))
    ramp[:2] = 4000  # gone once it is averaged
    pyvips.Image.new_from_array(ramp).tiffsave(
        str(tmp_path / "a.tif"), tile=True, tile_width=64, tile_height=64, pyramid=True
    )
    picture = Stored(tmp_path / "a.tif")
    assert len(picture._stored) > 1
    small = picture.window((0, 0, 128, 128), 4)
    assert small[20, -1, 0] == pytest.approx(1000 / 4000 * 255, abs=2)


def bomb(path, side=20000):
    """A file of a few kB that unpacks to 400 million pixels."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((side // 8 + 1) * 8))  # the first rows are enough to ask
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(
    ("opener", "option", "error"),
    [
        ("library", "max_pixels", InputError),
        ("command line", "--max-pixels", InputError),
        ("training", r"data\.max_pixels", InputError),
        ("chat", "max_pixels", InputError),
        ("photographs", "--max-pixels", BenchError),
        ("zipped", "--max-pixels", BenchError),
    ],
)
def test_bombs_are_refused_and_the_option_is_named(tmp_path, opener, option, error):
    with pytest.raises(error, match=rf"400000000.*178956970.*{option} sets another") as caught:
        OPENERS[opener](bomb(tmp_path / "bomb.png"))
    assert len(str(caught.value)) <= 300


def test_another_limit_holds_in_both_directions(tmp_path, monkeypatch):
    path = saved(tmp_path, np.zeros((10, 10), np.uint8), "a.png")
    with pytest.raises(InputError, match="100, the limit is 99"):
        load_image(path, max_pixels=99)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="100, the limit is 20"):
        load_image(path)
    assert load_image(path, max_pixels=100).size == (10, 10)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path).size == (10, 10)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "many"])
def test_a_limit_is_a_positive_whole_number(tmp_path, wrong):
    path = saved(tmp_path, np.zeros((2, 2), np.uint8), "a.png")
    with pytest.raises(InputError, match="max_pixels must be a positive whole number"):
        load_image(path, max_pixels=wrong)


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})


def test_run_takes_the_limit_and_notes_animations(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    line = ("run", "tiny", tmp_path / "moving.gif", "why ?", "-m", "fastv")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused = call(*line)
    assert refused.exit_code == 2
    assert "600, the limit is 200); --max-pixels sets another limit" in refused.stderr
    done = call(*line, "--max-pixels", 600, "--max-new-tokens", 1)
    assert done.exit_code == 0, done.output
    assert [x for x in done.stderr.splitlines() if x.startswith("note: ")] == [
        f"note: {tmp_path}/moving.gif holds several images (an animation, or pages); only the "
        "first is used"
    ]


def damaged(tmp_path):
    """Files that are no images, or not whole, by name."""
    noise = Image.effect_noise((300, 200), 80).convert("RGB")
    made = {}
    for suffix in ("jpg", "png", "gif", "webp", "bmp", "tif"):
        noise.save(tmp_path / f"whole.{suffix}")
        data = (tmp_path / f"whole.{suffix}").read_bytes()
        made[f"half.{suffix}"] = data[: len(data) // 2]
        made[f"head.{suffix}"] = data[:20]
    png = (tmp_path / "whole.png").read_bytes()
    made["flipped.png"] = png[:60] + bytes(b ^ 0xFF for b in png[60:90]) + png[90:]
    squeezed = b"zTXt" + b"a\0\0" + zlib.compress(bytes(2**26))
    packed = (
        struct.pack(">I", len(squeezed) - 4) + squeezed + struct.pack(">I", zlib.crc32(squeezed))
    )
    made["unpacks.png"] = png[:33] + packed + png[33:]
    made["empty.png"] = b""
    made["zeros.png"] = bytes(4096)
    made["words.png"] = b"no image"
    made["nothing.ppm"] = b"P6 0 0 255\n"
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    return [tmp_path / name for name in made]


@pytest.mark.parametrize("opener", sorted(set(OPENERS) - {"memory", "chat, open"}))
def test_damaged_files_are_one_line_that_names_them(tmp_path, opener):
    shown = []
    for path in damaged(tmp_path):
        if opener == "large" and path.name == "unpacks.png":
            continue  # libvips leaves the text alone
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                OPENERS[opener](path)
        except (InputError, BenchError) as error:
            message = str(error)
            assert "\n" not in message, message
            assert len(message) <= 300, message
            assert path.name in message or "base64" in opener or "open" in opener, message
        else:
            shown.append(path.name)
    assert shown == [], shown


@pytest.mark.parametrize("name", ["none.png", "", "a\0b.png", "x" * 5000, "line\nbreak.png", "."])
def test_names_that_lead_nowhere_are_one_line(tmp_path, name):
    for opened in (load_image, cli_image, open_image, lambda p: chat_image(str(p), None)):
        with pytest.raises(InputError) as caught:
            opened(f"{tmp_path}/{name}")
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) <= 300


def test_images_without_pixels_or_values_are_refused():
    with pytest.raises(InputError, match="0x5 has no pixels"):
        as_rgb(Image.new("RGB", (0, 5)))
    with pytest.raises(InputError, match="without a finite value"):
        as_rgb(Image.fromarray(np.full((2, 2), np.nan, np.float32)))


def test_images_of_kept_tokens_show_deep_images():
    from foveate.report.draw import draw_kept

    deep = Image.fromarray(np.full((40, 40), 30000, np.uint16))
    panel = draw_kept(deep, (2, 2), {})
    middle = panel.getpixel((panel.width // 2, panel.height // 2))
    assert middle == (117, 117, 117)
