"""The zoo: one tiny random model of every family. Every module here adds members."""

import importlib
import pkgutil

import transformers
from packaging.version import Version

from tests.conformance.zoo.member import MEMBERS, Member

SINCE = {"apertus1p5": "5.24"}
"""The release that a family came with, where it is not the oldest that is tested."""

for _info in pkgutil.iter_modules(__path__):
    if Version(transformers.__version__) >= Version(SINCE.get(_info.name, "0")):
        importlib.import_module(f"{__name__}.{_info.name}")

__all__ = ["MEMBERS", "Member"]
