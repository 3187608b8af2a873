"""The zoo: one tiny random model of every family. Every module here adds members."""

import importlib
import pkgutil

from tests.conformance.zoo.member import MEMBERS, Member

for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")

__all__ = ["MEMBERS", "Member"]
