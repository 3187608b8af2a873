"""One small file per model family: where the sites of the stream are in that model."""

from typing import TYPE_CHECKING

from foveate.lazy import exports

if TYPE_CHECKING:
    from foveate.families.encoder import Encoder
    from foveate.families.family import Family
    from foveate.families.find import FAMILIES, find_family, list_families, unwrap
    from foveate.families.unsupported import unsupported_families
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "foveate.families.encoder": ("Encoder",),
            "foveate.families.family": ("Family",),
            "foveate.families.find": ("FAMILIES", "find_family", "list_families", "unwrap"),
            "foveate.families.unsupported": ("unsupported_families",),
        },
    )

__all__ = [
    "FAMILIES",
    "Encoder",
    "Family",
    "find_family",
    "list_families",
    "unsupported_families",
    "unwrap",
]
