"""How much memory reading a very large image takes, and how long.

`python benchmarks/large_memory.py` writes a tiled TIFF of 27,328 pixels a side in strips, reads it
for a question in a process of its own, and notes how far that process grew above what it held
before: Python, the libraries and the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _bench import save

SIDE, RED = 27_328, [225, 45, 45]
KEEP = 16  # a count, so that even with an untrained module the finest level is reached


def paint(path: Path, side: int) -> None:
    """A ground of large cells, a fine pattern on it, and one small red square, by strips."""
    import pyvips

    cells = pyvips.Image.perlin(side, side, cell_size=1024, uchar=True)
    grid = pyvips.Image.grey(64, 64, uchar=True).replicate(-(-side // 64), -(-side // 64))
    ground = (cells * 0.4 + grid.crop(0, 0, side, side) * 0.1).cast("uchar")
    image = ground.bandjoin([ground, ground]).copy(interpretation="srgb")
    spot = side * 5 // 7, side * 2 // 7
    square = (pyvips.Image.black(side // 40, side // 40, bands=3) + RED).cast("uchar")
    image = image.insert(square.copy(interpretation="srgb"), *spot)
    image.tiffsave(str(path), tile=True, tile_width=256, tile_height=256, compression="deflate",
                     bigtiff=True)  # fmt: skip


def read(path: Path, keep: int) -> dict[str, object]:
    """Read an image in this process and say what it took."""
    import torch

    from foveate import large, tiny
    from foveate.methods import LRSVQA

    torch.set_num_threads(1)
    model, processor = tiny.load()
    reader = large.Reader(model, processor, method=LRSVQA(keep=keep))
    warm = tiny.draw_scene(0, size=384).image
    reader.read(warm, "<image> what color is the square ?")
    before, started = peak_mib(), time.perf_counter()
    reading = reader.read(path, "<image> what color is the square ?")
    seconds = time.perf_counter() - started
    return {
        "before_mib": round(before),
        "peak_mib": round(peak_mib()),
        "seconds": round(seconds, 1),
        "levels": [list(level.size) for level in reading.levels],
        "rounds": [
            {
                "size": list(r.tokens.level.size),
                "tiles": len(r.tiles),
                "of": len(r.tokens.level.tiles()),
                "tokens": len(r.scores),
                "kept": len(r.kept),
            }
            for r in reading.rounds
        ],
    }


def peak_mib() -> float:
    """Most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--keep", type=int, default=KEEP)
    parser.add_argument("--read", type=Path, help="read this file, print what it took and stop")
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read, arguments.keep)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.tif"
        paint(path, arguments.side)
        command = [sys.executable, __file__, "--read", str(path), "--keep", str(arguments.keep)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took = json.loads(done.stdout.splitlines()[-1])
        took |= {"side": arguments.side, "keep": arguments.keep}
        took |= {"file_mib": round(path.stat().st_size / 2**20)}
        took |= {"pixels_mib": round(arguments.side**2 * 3 / 2**20)}
    save("large_memory", {"reading": took})


if __name__ == "__main__":
    main()
