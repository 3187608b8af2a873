"""What a session has to leave as it was, and a way to leave it by an error."""

import foveate


def snapshot(model):
    """Hooks, attributes and forward of every module."""
    return {
        name: (
            list(module._forward_pre_hooks), list(module._forward_hooks),
            sorted(vars(module)), getattr(module.forward, "__func__", None),
        )
        for name, module in model.named_modules()
    }  # fmt: skip


class Boom(Exception):
    """What went wrong."""


def fail_within(model, method, inputs):
    """Leave a session by an error."""
    with foveate.use(model, method):
        model(**inputs)
        raise Boom
