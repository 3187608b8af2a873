"""An OpenAI-compatible server of one model, whose requests say how many visual tokens to keep.

`Engine` owns the model; `create_app` is the HTTP application that asks it. `foveate serve` starts
both.
"""

from foveate.lazy import exports

_NAMES = {
    "foveate.serve.app": ("create_app",),
    "foveate.serve.engine": ("Engine",),
    "foveate.serve.settings": ("Settings",),
}
__all__ = ["Engine", "Settings", "create_app"]
__getattr__, __dir__ = exports(__name__, _NAMES)
