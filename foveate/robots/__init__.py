"""Control steps of a robot that take over what has not changed since the step before.

Examples:
    >>> from foveate.robots import Reuse, VLACache
    >>> with Reuse(policy) as reuse:  # doctest: +SKIP
    ...     for observation in camera:
    ...         actions = policy.sample_actions(**observation)
    ...         print(reuse.last.cameras)
"""

from foveate.robots.memory import Reused
from foveate.robots.reuse import Reuse
from foveate.robots.vla_cache import VLACache

__all__ = ["Reuse", "Reused", "VLACache"]
