"""The zoo: one tiny random model of every family. Every module here adds members."""

import importlib
import pkgutil

import transformers
from packaging.version import Version

from tests.conformance.zoo.member import MEMBERS, Member

SINCE = {
    "apertus1p5": ("5.24", ["apertus1p5"]),
    "dots3_note": ("5.23", ["dots3_note"]),
    "granite_docling": ("5.23", ["granite_docling"]),
    "lfm": ("5.23", ["lfm2_vl", "lfm3_vl"]),
    "minicpm": ("5.21", ["minicpm_ocr", "minicpmv4_6", "minicpmv4_7"]),
    "molmo2": ("5.20", ["molmo2"]),
    "muse": ("5.20", ["muse_glimmer", "muse_spark"]),
    "unlimited_ocr": ("5.20", ["unlimited_ocr"]),
}
"""Module -> the release of transformers that knows all its families, and their model types."""
ABSENT: set[str] = set()
"""Model types of modules that need a newer release."""

for _info in pkgutil.iter_modules(__path__):
    _release, _types = SINCE.get(_info.name, ("0", []))
    if Version(transformers.__version__) < Version(_release):
        ABSENT.update(_types)
    else:
        importlib.import_module(f"{__name__}.{_info.name}")

__all__ = ["ABSENT", "MEMBERS", "Member"]
