"""An oracle for any family: the layers at full length, with removed tokens masked.

What each layer is handed (mask, rotary embedding) is recorded from the unpatched model, and so is
what the text model adds between layers (DeepStack). The oracle then runs the layers itself, one
row, no cache, no compaction; removed tokens stay in place, but nobody attends to them. A layer
without attention, which mixes tokens into a running state, is run on the others alone. A layer that
reads the keys of an earlier one sees what that one saw, in its numbering.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foveate.engine.cache_argument import CACHE
from tests.oracle import Spec


class Recorded:
    """What the text model of an unpatched, eager model does in one forward."""

    def __init__(self, member: Any, model: Any, inputs: dict[str, Any]) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []
        handles = []
        for layer in member.text(model).layers:
            handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after))
        with torch.no_grad():
            member.run(model, **inputs, use_cache=False)
        for handle in handles:
            handle.remove()

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.inputs.append(args[0].clone())
        names = list(inspect.signature(type(module).forward).parameters)[2:]
        self.kwargs.append({**dict(zip(names, args[1:], strict=False)), **kwargs})

    def _after(self, module: Any, args: Any, output: Any) -> None:
        self.outputs.append(_states(output).clone())

    def added(self, number: int) -> Tensor | int:
        """What the text model adds to the states after a layer."""
        if number + 1 >= len(self.inputs):
            return 0
        return self.inputs[number + 1] - self.outputs[number]


@torch.no_grad()
def run(
    member: Any,
    model: Any,
    inputs: dict[str, Any],
    spec: Spec,
    prompt: int,
    counts: list[int] | None = None,
    places: list[Tensor] | None = None,
) -> tuple[Tensor, list[list[Tensor]]]:
    """Last hidden states (T, D) of one row, and kept raster indices after each place.

    Args:
        member: the zoo member of the model.
        model: unpatched, with eager attention.
        inputs: one row without padding: the prompt and a teacher-forced continuation.
        spec: what is removed.
        prompt: length of the prompt.
        counts: visual tokens of each image; all the member's own count by default.
        places: columns of each image instead, where they need not be next to each other.
    """
    text = member.text(model)
    recorded = Recorded(member, model, inputs)
    hidden = recorded.inputs[0]
    length = hidden.shape[-2]  # the axis of tokens, whatever comes before it
    placeholders = torch.tensor([member.image_id, *member.others])
    visual = torch.isin(inputs["input_ids"][0], placeholders).nonzero()[:, 0]
    columns = list(places or visual.split(counts or member.visual))
    index = [torch.arange(len(column)) for column in columns]
    alive, shift = torch.ones(length, dtype=torch.bool), torch.zeros(length, dtype=torch.long)
    history: list[list[Tensor]] = []
    forgotten = torch.zeros(length, length, dtype=torch.bool)
    if spec.evict_cache and columns:  # known only at the end
        before = replace(spec, evict_cache=0)
        _, known = run(member, model, inputs, before, prompt, counts, places)
        left = [column[image] for column, image in zip(columns, known[-1], strict=True)]
        forgotten[prompt:, visual[~torch.isin(visual, torch.cat(left))]] = True

    keys: dict[Any, tuple[int, Tensor, Tensor]] = {}  # kind -> last layer with keys, alive, shift
    shared: dict[Any, Any] = {}  # kind of layer -> keys and values that later ones read

    def remove(image: int, chosen: Tensor, renumber: bool) -> None:
        nonlocal shift
        alive[columns[image]] = False
        before = columns[image]
        columns[image], index[image] = before[chosen], index[image][chosen]
        alive[columns[image]] = True
        if renumber:
            gone = torch.zeros(length, dtype=torch.long)
            gone[before] = 1
            gone[columns[image]] = 0
            shift = shift + gone.cumsum(0) - gone

    def step(number: int) -> tuple[Tensor, Tensor]:
        """Output of a layer, and its attention probabilities (H, T, T); none of a recurrent one."""
        kwargs = dict(recorded.kwargs[number])
        layer = text.layers[number]
        if (attention := member.attention(layer)) is None:
            return over_survivors(text, number, hidden, alive, prompt, kwargs), torch.empty(0)
        mask = kwargs["attention_mask"].clone()
        own = not getattr(attention, "is_kv_shared_layer", False)
        if own:
            keys[getattr(attention, "layer_type", None)] = number, alive.clone(), shift
        donor, there, moved = keys[getattr(attention, "layer_type", None)]
        if "shared_kv_states" in kwargs:
            kwargs["shared_kv_states"] = shared
        seen = there & ~forgotten if donor < spec.evict_cache else there
        for start, gone in spec.forgotten:
            seen = seen.expand(length, length).clone()
            seen[start:, gone] = False
        kwargs["attention_mask"] = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        if moved.any():
            kwargs["position_ids"] = positions = kwargs["position_ids"] - moved
            kwargs["position_embeddings"] = member.rotary(text, hidden, positions, number)
        weights = []
        handle = attention.register_forward_hook(lambda m, a, out: weights.append(out[1]))
        output = layer(hidden, **kwargs)
        handle.remove()
        return _states(output), weights[0][0]

    if spec.kept is not None:
        for image, chosen in enumerate(spec.kept):
            remove(image, chosen, spec.renumber)
        history.append([i.clone() for i in index])
    probabilities: dict[int, Tensor] = {}
    for number in range(len(text.layers)):
        probabilities[number] = step(number)[1]
        for drop in spec.drops:
            if drop.layer != number:
                continue
            # Within one layer, a later turn ranks with what earlier turns have left in the cache.
            scores = step(number)[1] if drop.scored == number else probabilities[drop.scored]
            row = scores.mean(0)[prompt - 1 if drop.query is None else drop.query]
            images = drop.images or range(len(drop.counts))
            for image, count in zip(images, drop.counts, strict=True):
                chosen = _best(row[columns[image]], count)
                remove(image, chosen, drop.renumber)
            history.append([i.clone() for i in index])
        if any(drop.layer == number for drop in spec.drops):  # later layers rank by what it sees
            probabilities[number] = step(number)[1]
        hidden = step(number)[0] + recorded.added(number)
    return member.norm(text)(hidden)[0], history


def _states(output: Any) -> Tensor:
    """What a layer makes; some return it with what may follow."""
    return output[0] if isinstance(output, tuple) else output


def over_survivors(
    text: Any, number: int, hidden: Tensor, alive: Tensor, prompt: int, kwargs: dict[str, Any]
) -> Tensor:
    """Output of a recurrent layer: the prompt's survivors at once, then token by token, as models
    generate; the two ways differ in rounding. What the caller hides is a step of zeros.
    """
    mask, cache = kwargs["attention_mask"], DynamicCache(config=text.config)
    output, columns = hidden.clone(), alive.nonzero()[:, 0]
    for part in (columns[columns < prompt], *columns[columns >= prompt].split(1)):
        if len(part):
            seen = None if mask is None else mask[:, part]
            own = {**kwargs, "attention_mask": seen, CACHE: cache}
            output[:, part] = text.layers[number](hidden[:, part], **own)
    return output


def _best(scores: Tensor, count: int) -> Tensor:
    """The highest scores, ascending; of those as good as equal to the least of them, the first."""
    least = scores.sort(descending=True).values[count - 1]
    near = least.abs() * 2**-20
    surely = (scores > least + near).nonzero()[:, 0]
    tied = ((scores - least).abs() <= near).nonzero()[:, 0]
    return torch.cat((surely, tied[: count - len(surely)])).sort().values
