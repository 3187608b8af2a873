"""For authors of methods: run the engine's promises on a method of one's own.

Examples:
    >>> from foveate.testing import check_method
    >>> print(check_method("divprune"))  # doctest: +SKIP
"""

from foveate.testing.checks import Checks, check_method

__all__ = ["Checks", "check_method"]
