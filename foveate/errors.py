"""Errors a user can cause. Every message says what went wrong, where, and what to do."""


class FoveateError(Exception):
    """Base of all errors raised by foveate."""


class UnknownMethodError(FoveateError):
    """No method is registered under that name."""


class UnsupportedModelError(FoveateError):
    """The model's family, layout or attention kernel cannot serve the request."""


class BudgetError(FoveateError, ValueError):
    """A `keep` is out of range, of the wrong form, or does not fit the method or the batch."""


class LayerError(FoveateError, ValueError):
    """A layer index lies outside the model, or steps are in an impossible order."""


class AttachError(FoveateError):
    """The model already carries a foveate session, or the session is not attached."""


class CacheError(FoveateError):
    """The key-value cache cannot hold pruned layers, or was used outside its session."""


class InputError(FoveateError, ValueError):
    """The inputs of a forward pass cannot be served."""


class BenchError(FoveateError, ValueError):
    """A benchmark has no such task or split, or its data set cannot be read."""
