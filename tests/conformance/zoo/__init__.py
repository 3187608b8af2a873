"""The zoo: one tiny random model of every family. Every module here adds members."""

import importlib
import pkgutil

import transformers
from packaging.version import Version

from tests.conformance.zoo.member import MEMBERS, Member

SINCE = {
    "apertus1p5": "5.24", "dots3_note": "5.23", "granite_docling": "5.23", "lfm": "5.23",
    "minicpm": "5.21", "molmo2": "5.20", "muse": "5.20", "unlimited_ocr": "5.20",
}  # fmt: skip
"""The release of transformers that knows all families of a module, if it is not the oldest."""

for _info in pkgutil.iter_modules(__path__):
    if Version(transformers.__version__) >= Version(SINCE.get(_info.name, "0")):
        importlib.import_module(f"{__name__}.{_info.name}")

__all__ = ["MEMBERS", "Member"]
