"""The page at `/`: ask about an image with all tokens and with a method, side by side.

Plain files of this folder. The page talks to the API beside it and to nothing else, which its
Content-Security-Policy also enforces; it holds no secrets, so it is served without a key.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, Response

from foveate.tiny import draw_scene

router = APIRouter(include_in_schema=False)
SCENES = 12
"""Example scenes that are offered; each is drawn once."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
def page() -> Response:
    """The page."""
    return _file("page.html", "text/html")


@router.get("/page.js")
def script() -> Response:
    """Its script."""
    return _file("page.js", "text/javascript")


@router.get("/page.css")
def style() -> Response:
    """Its style."""
    return _file("page.css", "text/css")


@router.get("/example/{number:int}")
def example(number: int) -> dict[str, Any]:
    """A drawn scene for those who have no image at hand.

    Args:
        number: which one; they repeat after `SCENES`.

    Returns:
        `name`, `image` (a data URL) and `question`.
    """
    return _scene(number % SCENES)


@cache
def _scene(seed: int) -> dict[str, Any]:
    scene, file = draw_scene(seed), io.BytesIO()
    scene.image.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    return {
        "name": f"scene {seed}",
        "image": f"data:image/png;base64,{text}",
        "question": scene.questions[0].text,
    }


def _file(name: str, kind: str) -> Response:
    text = (resources.files("foveate") / "serve" / name).read_text(encoding="utf-8")
    return Response(text, media_type=f"{kind}; charset=utf-8", headers=HEADERS)
