"""Every family: what a session costs that removes nothing, and what decoding costs that removes.

    python benchmarks/families.py [--runs 3] [--rounds 3] [--family llava qwen2_vl]

Random models with 576 visual and 64 text tokens, batch 1; 256 channels x 8 layers for the prefill,
and 64 x 24 for decoding, so narrow that Python, not arithmetic, fills the time. `prefill` and
`decode` are times of a session that keeps everything over times without a session. `overhead_us` is
what a session of PyramidDrop adds to a decoded token in each layer, beyond the same model without a
session, each of whose cache layers holds as many slots as PyramidDrop leaves there. Where no layer
can rank tokens, random ones are removed before the first.

Where objects happen to lie in memory moves such small times by a few microseconds for as long as a
process lives. So each family is measured in several processes, and their times are taken together.

With `--family`, each row is saved when it is done, in place of the one that was there, and the rows
of other families stay. Where `llava` comes first, the rows after it say what it had in this run. A
row that was measured with another machine or effort than the file's says so. Without `--family`,
the file is written anew.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from _bench import RESULTS, machine, ratios, save, warm_heap

warm_heap()

import torch  # noqa: E402
from _families import prompt, random_model  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.utils import logging  # noqa: E402

import foveate  # noqa: E402
from foveate.core import Method  # noqa: E402
from foveate.engine.cache_argument import cache_of  # noqa: E402
from foveate.families import FAMILIES, find_family  # noqa: E402
from foveate.families.plain import PlainEncoder  # noqa: E402
from foveate.families.retrieval import Retriever  # noqa: E402
from foveate.methods import PyramidDrop, Random  # noqa: E402
from foveate.run import Session  # noqa: E402

VISUAL, TOKENS = 576, 40
BLOCK = 8  # tokens decoded in a row
WIDE, DEEP = (256, 8), (64, 24)  # channels and layers, for the prefill and for decoding
SLOTS = {  # tensors of cache layers -> the axis of their slots
    "keys": 2, "values": 2, "prefill_keys": 2, "prefill_values": 2, "indexer_keys": 1,
}  # fmt: skip


def family_names() -> list[str]:
    """Model types of all vision-language families but retrieval models, which decode nothing."""
    left_out = (PlainEncoder, Retriever)
    return sorted(name for name, kind in FAMILIES.items() if not issubclass(kind, left_out))


def pyramid(model: Any, *, keep_all: bool) -> Method:
    """PyramidDrop at legal layers, about a quarter and three quarters down; where no layer can rank
    tokens, as in Dots 3 Note, a random quarter of them before the first.
    """
    family = find_family(model)
    legal = [i for i in family.attention_layers if i >= max(1, family.first_llm_layer)]
    if not legal:
        return Random(1.0 if keep_all else 0.25)
    places = (family.text_layers // 4, family.text_layers * 3 // 4)
    layers = tuple(dict.fromkeys(min(legal, key=lambda i: abs(i - at)) for at in places))
    keep = (1.0,) * len(layers) if keep_all else (0.5, 0.125)[-len(layers) :]
    return PyramidDrop(layers, keep)


@dataclass
class Contender:
    """A prompt, the session that it is run in, if any, and slots cut off each cache layer; whether
    masks must be cut with them.
    """

    inputs: dict[str, Any]
    session: Session | None = None
    cut: list[int] = field(default_factory=list)
    masked: bool = False
    cache: DynamicCache | None = None
    seconds: list[float] = field(default_factory=list)

    def forwards(self, model: Any, given: list[dict[str, Any]]) -> list[float]:
        """CPU seconds of forwards under one session; attaching is not counted."""
        seconds = []
        with self.session or (masks_cut(model, self.cut) if self.masked else nullcontext()):
            for inputs in given:
                start = time.process_time()
                model(**inputs, past_key_values=self.cache)
                seconds.append(time.process_time() - start)
        return seconds

    def shorten(self) -> None:
        """Cut slots off the cache, after the prompt.

        Recurrent and convolutional layers have none, and layers that read the keys of earlier
        ones, the last of a model, have no cache layer, or an empty one.
        """
        for layer, count in zip(self.cache.layers, self.cut, strict=False):
            for name, axis in SLOTS.items():
                held = getattr(layer, name, None)
                if held is not None and held.numel():
                    left = held.narrow(axis, count, held.shape[axis] - count).contiguous()
                    setattr(layer, name, left)


def gives_masks(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether layers are handed masks for a token decoded after a prompt, without padding."""
    masks, layers = [], find_family(model).layers

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs.get("attention_mask"))

    cache = DynamicCache(config=model.config.get_text_config())
    model(**inputs, past_key_values=cache)
    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return any(mask is not None for mask in masks)


@contextmanager
def masks_cut(model: Any, cut: list[int]) -> Iterator[None]:
    """Hand each layer the columns of its mask that its shortened cache layer has slots for.

    In transformers one cache layer of each kind says how long the masks of all are. Nothing is
    hidden from a token decoded here, so that all columns are alike, and the last ones serve. This
    adds a microsecond or two to a layer of the model without a session.
    """
    layers = find_family(model).layers
    known: dict[tuple[int, int], tuple[Any, Any]] = {}  # layers cut alike share a mask

    def forward(number: int, layer: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        key = cut[number], id(mask)
        if (made := known.get(key)) is None or made[0] is not mask:
            slots = slots_of(cache_of(kwargs).layers[number]) + hidden.shape[1]
            gone = 0 if mask is None else mask.shape[3] - slots
            made = known[key] = mask, mask.narrow(3, gone, slots) if gone > 0 else mask
        kwargs["attention_mask"] = made[1]
        return type(layer).forward(layer, hidden, *args, **kwargs)

    for number, layer in enumerate(layers):
        layer.forward = functools.partial(forward, number, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def slots_of(layer: Any) -> int:
    """Slots of a cache layer; those of Unlimited-OCR keep the prompt's apart."""
    held = (getattr(layer, name, None) for name in ("keys", "prefill_keys"))
    return sum(keys.shape[2] for keys in held if keys is not None and keys.numel())


def in_turn(model: Any, contenders: dict[str, Contender], rounds: int, tokens: int) -> None:
    """Run forwards in blocks, contenders in an order drawn anew for every block.

    They share the model, so that its weights are as near in memory for one as for another. The
    first token of a block finds what others left in the processor's caches, and is not counted.

    Args:
        model: the model.
        contenders: who runs; times are added to theirs.
        rounds: prompts, after one that warms up.
        tokens: tokens decoded after each prompt, of which the times are; 0 for those of prompts.
    """
    draw = random.Random(0)
    gc.collect()
    gc.disable()  # or a collection would be counted to whom it happens to hit
    token = {"input_ids": torch.tensor([[7]])}
    for number in range(rounds + 1):
        for contender in contenders.values():
            contender.cache = DynamicCache(config=model.config.get_text_config())
        for block in range(1 + tokens // BLOCK):
            for contender in draw.sample(list(contenders.values()), len(contenders)):
                given = [token] * (1 + BLOCK) if block else [contender.inputs]
                seconds = contender.forwards(model, given)
                if not block:
                    contender.shorten()
                if number and bool(block) == bool(tokens):
                    contender.seconds += seconds[1:] if block else seconds
    gc.enable()


@torch.inference_mode()
def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in a family, prompt by prompt and token by token."""
    logging.set_verbosity_error()
    model = random_model(name, *WIDE)
    inputs = prompt(model, VISUAL)
    all_kept = foveate.use(model, pyramid(model, keep_all=True))
    prefill = {"bare": Contender(inputs), "attached": Contender(inputs, all_kept)}
    in_turn(model, prefill, 4 * rounds, 0)

    model = random_model(name, *DEEP)
    inputs, drop = prompt(model, VISUAL), pyramid(model, keep_all=False)
    with foveate.use(model, drop) as run:
        model(**inputs)
        layers = run.report()["layers"]
    cut = [VISUAL - layer["visual_tokens"][0] for layer in layers]
    decode = {
        "bare": Contender(inputs),
        "attached": Contender(inputs, foveate.use(model, pyramid(model, keep_all=True))),
        "shortened": Contender(inputs, cut=cut, masked=gives_masks(model, inputs)),
        "pruned": Contender(inputs, foveate.use(model, drop)),
    }
    in_turn(model, decode, rounds, TOKENS)
    return {
        **{f"prefill {n}": c.seconds for n, c in prefill.items()},
        **{f"decode {n}": c.seconds for n, c in decode.items()},
    }


def in_processes(name: str, runs: int, rounds: int) -> list[dict[str, list[float]]]:
    """What `measure` gives in so many processes, one after another."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(measure, [(name, rounds)] * runs, chunksize=1)


def summary(runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Ratios and overheads of a family."""
    seconds = {name: [s for run in runs for s in run[name]] for name in runs[0]}
    scale = 1e6 / DEEP[1]

    def overheads(times: dict[str, list[float]]) -> list[float]:
        pairs = zip(times["decode pruned"], times["decode shortened"], strict=True)
        return [scale * (a - b) for a, b in pairs]

    low, median, high = statistics.quantiles(overheads(seconds), n=4)
    each = sorted(statistics.median(overheads(run)) for run in runs)
    return {
        "prefill": ratios(seconds["prefill attached"], seconds["prefill bare"]),
        "decode": ratios(seconds["decode attached"], seconds["decode bare"]),
        "overhead_us": {"median": median, "q25": low, "q75": high, "runs": each},
        "plain_us": scale * statistics.median(seconds["decode shortened"]),
    }


def save_row(name: str, row: dict[str, Any], effort: dict[str, int]) -> None:
    """Put a family's row into the result file, with the effort and machine that differ."""
    path = RESULTS / "families.json"
    result = json.loads(path.read_text())
    differs = {n: value for n, value in effort.items() if value != result[n]}
    here = machine()
    other = {n: value for n, value in here.items() if value != result["machine"].get(n)}
    if other:
        differs["machine"] = other
    result["rows"] = dict(sorted({**result["rows"], name: {**row, **differs}}.items()))
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="processes for each family")
    parser.add_argument("--rounds", type=int, default=3, help="prompts in each process")
    parser.add_argument("--family", nargs="*")
    options = parser.parse_args()
    effort = {"runs": options.runs, "rounds": options.rounds}
    rows = {}
    for name in options.family or family_names():
        rows[name] = row = summary(in_processes(name, options.runs, options.rounds))
        extra = row["overhead_us"]
        print(
            f"{name:18} keep all: prefill {row['prefill']['median']:.3f}, decode "
            f"{row['decode']['median']:.3f}; pruned decode {extra['median']:+.1f} us "
            f"({extra['runs'][0]:+.1f} to {extra['runs'][-1]:+.1f}) on {row['plain_us']:.0f}",
            flush=True,
        )
        if options.family:
            llava = rows.get("llava")
            if llava is not None and name != "llava":
                told = {
                    "overhead_us": llava["overhead_us"]["median"],
                    "plain_us": llava["plain_us"],
                }
                row["beside"] = {"llava": told}
            save_row(name, row, effort)
    if not options.family:
        wide, deep = ("{} x {}".format(*size) for size in (WIDE, DEEP))
        size = (
            f"Random models, {wide} for the prefill and {deep} for decoding; {VISUAL} visual tokens"
        )
        save("families", {"model": size, **effort, "rows": rows})


if __name__ == "__main__":
    main()
