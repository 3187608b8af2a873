"""Options that users may look for where they are not: why a command has none of them.

`keep_total` and `audio` are arguments of `foveate.use`, for a whole session.
"""

from __future__ import annotations

_TOTAL = {
    "bench": "it compares methods at the budgets of --keep, which are for each image",
    "bench --speed": "--tokens and --keep say how many visual tokens a prompt has",
    "calibrate": "vflowopt decides by itself how many tokens survive",
    "demo": "its questions are about one image",
    "train": "a training step reads all turns at once, in which each image has one size; give it "
    "to `foveate run`, `batch` or `serve` afterwards",
    "tune": "it compares recipes whose budgets are for each image; give it with the recipe to "
    "`foveate run`, `batch` or `serve`",
}
_AUDIO = (
    "commands give a model images and videos alone; for audio, use foveate.use or foveate.prepare "
    "in Python with audio=... (docs/audio.md)"
)


def why_absent(command: str, name: str) -> str | None:
    """Why a command has no such option, or its file no such key; `None` for most names.

    Args:
        command: its name, as `bench --speed`.
        name: `--keep-total`, or `keep_total` as files spell it.
    """
    plain = name.removeprefix("--").replace("-", "_")
    return {"keep_total": _TOTAL.get(command), "audio": _AUDIO}.get(plain)
