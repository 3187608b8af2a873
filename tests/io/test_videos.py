"""Videos become frames: of a folder in the order of their numbers, of a file as it plays."""

import sys

import av
import pytest
from PIL import Image

from foveate.errors import InputError
from foveate.io.videos import each_frame, is_video, load_video, spread


@pytest.mark.parametrize(
    ("total", "wanted", "positions"),
    [(3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (10, 1, [5]), (100, 4, [0, 33, 66, 99]), (0, 2, [])],
)
def test_frames_are_spread_from_the_first_to_the_last(total, wanted, positions):
    assert spread(total, wanted) == positions


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    return tmp_path


def test_a_folder_is_read_in_the_order_of_its_numbers(folder):
    assert is_video(folder)
    assert [frame.getpixel((0, 0))[0] for frame in load_video(folder, 99)] == list(range(12))
    assert [frame.getpixel((0, 0))[0] for frame in load_video(folder, 2)] == [0, 11]


def test_what_is_no_video_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such video file"):
        load_video(tmp_path / "none.mp4", 4)
    with pytest.raises(InputError, match="without images"):
        load_video(tmp_path, 4)


def test_without_pyav_the_error_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"...")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install 'foveate\[video\]'"):
        load_video(tmp_path / "clip.mp4", 4)


@pytest.fixture(params=["mp4", "mkv"])  # mkv does not say how many frames it holds
def clip(request, tmp_path):
    path = tmp_path / f"clip.{request.param}"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(20):
            image = Image.new("RGB", (32, 16), (12 * number, 12 * number, 12 * number))
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode(None))
    return path


def test_a_file_is_decoded(clip):
    frames = load_video(clip, 5)
    assert [frame.size for frame in frames] == [(32, 16)] * 5
    for frame, number in zip(frames, spread(20, 5), strict=True):
        assert frame.getpixel((8, 8))[0] == pytest.approx(12 * number, abs=12)
    assert len(load_video(clip, 99)) == 20
    with pytest.raises(InputError, match="more than --max-pixels 100"):
        load_video(clip, 5, max_pixels=100)


def test_a_damaged_file_is_refused(clip):
    clip.write_bytes(b"x" * 500)
    with pytest.raises(InputError, match="as a video"):
        load_video(clip, 5)


def test_frames_come_one_after_another(clip, folder):
    for path, step in ((clip, 12), (folder, 1)):
        for every in (1, 3):
            shown = [frame.getpixel((2, 2))[0] for frame in each_frame(path, every)]
            wanted = [step * n for n in range(0, 20 if path is clip else 12, every)]
            assert shown == pytest.approx(wanted, abs=12 if path is clip else 0)
    frames = each_frame(clip)
    assert next(frames).size == (32, 16)
    frames.close()


def test_frames_that_cannot_be_read_are_refused(clip, tmp_path):
    for path, options, why in (
        (clip, {"every": 0}, "every must be a positive integer, got 0"),
        (clip, {"max_pixels": 100}, "more than --max-pixels 100"),
        (tmp_path / "none.mp4", {}, "no such video file"),
    ):
        with pytest.raises(InputError, match=why):
            next(each_frame(path, **options))
    clip.write_bytes(b"x" * 500)
    with pytest.raises(InputError, match="as a video"):
        next(each_frame(clip))
