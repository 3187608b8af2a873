"""The page about streams runs as it stands, on a video file."""

import re
from pathlib import Path

import av

from foveate import tiny

PAGE = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")


def test_page_runs_and_stays_below_its_cap(tmp_path, monkeypatch, capsys):
    with av.open(str(tmp_path / "video.mp4"), "w") as file:
        track = file.add_stream("mpeg4", rate=10)
        track.width = track.height = 128
        for number in range(16):
            image = tiny.draw_scene(number // 4).image
            file.mux(track.encode(av.VideoFrame.from_image(image)))
        file.mux(track.encode(None))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(code, "streaming.md", "exec"), names)
    printed = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in printed] == ["4", "8"]
    config = names["model"].config.text_config
    token = 2 * config.num_hidden_layers * config.hidden_size * 4
    for _, tokens, size in printed:
        assert int(tokens) <= 400 - 20
        assert int(size) == int(tokens) * token
    assert 8 * 64 > 400 >= int(printed[-1][1]) > 64
