"""An oracle for what a session did: the bare text model at full length, removed tokens masked."""

import contextlib

import torch


@contextlib.contextmanager
def watching(text):
    """A list that gets what the text model is given in each forward."""
    seen = []
    hook = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    yield seen
    hook.remove()


@torch.no_grad()
def run(text, given, visual, kept, hidden=()):
    """Last hidden states (T, D) of one row; what is removed or hidden is seen by itself alone.

    Args:
        text: the text model, unpatched; every layer sees all that is before.
        given: what it was given in a session, features of removed tokens as NaN.
        visual: columns of each image.
        kept: for each image, place -> indices alive after it.
        hidden: columns that the caller hides.
    """
    length = given["inputs_embeds"].shape[1]
    causal, itself = torch.ones(length, length).tril().bool(), torch.eye(length).bool()

    def mask(layer):
        alive = torch.ones(length, dtype=torch.bool)
        for columns, places in zip(visual, kept, strict=True):
            for place, index in places.items():
                stage, _, number = place.partition(":")
                if stage != "llm" or int(number) <= layer:
                    alive[columns] = False
                    alive[columns[index]] = True
        alive[list(hidden)] = False
        return (causal & alive | itself)[None, None]

    def masked(number):
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask(number)})

    hooks = [
        layer.register_forward_pre_hook(masked(number), with_kwargs=True)
        for number, layer in enumerate(text.layers)
    ]
    embeds = given["inputs_embeds"].nan_to_num()
    out = text(inputs_embeds=embeds, position_ids=given["position_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return out.last_hidden_state[0]
