"""foveate beside kvpress: which tokens are kept, time, memory, answers, and a padded batch.

    python -m venv OTHER && OTHER/bin/pip install torch==2.13.0 kvpress
    python benchmarks/beside_kvpress.py --python OTHER/bin/python [--rounds 5]
    python scripts/compare_page.py

kvpress wants an older transformers than foveate, so it runs in a process of its own, under another
interpreter (`_kvpress_side.py`). Both get the same weights, the same embeddings and the same number
of entries to keep: foveate as a LLaVA, kvpress as the Llama inside it, which is one of the models
that it names as supported. All text survives in foveate; kvpress ranks text and image alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from _bench import prompt, random_llava, save, warm_heap

if __name__ == "__main__":
    warm_heap()

import torch
from _kvpress_prompts import KEEP, METHODS, PRESSES, Other, Prompt, method, prompt_of
from _kvpress_ragged import batches, pairs
from torch import Tensor
from transformers import DynamicCache

import foveate
from foveate import tiny
from foveate.measure.memory import cache_bytes, peak_memory
from foveate.measure.timing import Spread, one_round

FIRST_SCENE = 2_000_000  # the tiny model was trained on scenes far above
WIDE = (512, 8, 8, 1376)
SIZES = ((576, 1), (576, 2), (2880, 1))
NEW_TOKENS = 4


def questions(model: Any, processor: Any, count: int) -> Iterator[Prompt]:
    """Prompts of the tiny model, two questions for each scene."""
    for number in range(count // 2):
        scene = tiny.draw_scene(FIRST_SCENE + number)
        for asked in scene.questions[:: max(1, len(scene.questions) - 1)][:2]:
            inputs = processor(
                images=scene.image, text=f"<image> {asked.text}", return_tensors="pt"
            )
            yield prompt_of(model, inputs, asked.answer)


def kept_by(model: Any, of: Any, given: Prompt) -> Tensor:
    """(N,) which entries a method leaves in the last layer; padding counts as left."""
    with foveate.use(model, of) as session:
        model(**given.inputs)
    image = session.record.images[0]
    left = ~given.visual[0]
    places = given.visual[0].nonzero().flatten()
    left[places[list(image.kept.values())[-1]]] = True
    return left


def overlap(ours: Tensor, theirs: Tensor, visual: Tensor) -> dict[str, float]:
    """How far heads of the other side keep what we keep; `theirs` is (L, H, N).

    Returns:
        `both` is the share of our visual tokens that a head keeps too, `chance` what a choice
        without regard to ours would give; means over heads and layers.
    """
    share = theirs[..., visual].float().mean(-1)
    return {
        "both": theirs[..., visual & ours].float().mean().item(),
        "chance": share.mean().item(),
    }


def choices(model: Any, other: Other, given: list[Prompt]) -> dict[str, Any]:
    """What both sides keep of each prompt, and FastV's ranking made by both."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in PRESSES}
    same = []
    for number, one in enumerate(given):
        visual = one.visual[0]
        ours = {name: kept_by(model, method(name), one) for name in METHODS}
        for press in PRESSES:
            theirs = other.fetch("kept", prompt=number, press=one.press(press))[:, 0]
            assert (theirs.sum(-1) == one.entries).all()
            rows[press].append({
                "text": theirs[..., ~visual].float().mean().item(),
                "somewhere": theirs.flatten(0, 1).any(0)[visual].float().mean().item(),
                **{name: overlap(mine, theirs, visual) for name, mine in ours.items()},
            })  # fmt: skip
        rated = other.fetch("rated", prompt=number)[1, 0].mean(0)[visual]
        best = rated.topk(round(KEEP * int(visual.sum()))).indices.sort().values
        same.append(best.tolist() == ours["fastv"][visual].nonzero().flatten().tolist())
    return {"rows": {name: mean(each) for name, each in rows.items()}, "fastv_same": sum(same)}


def mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of equal dictionaries, nested ones too."""
    return {
        key: mean([row[key] for row in rows])
        if isinstance(rows[0][key], dict)
        else statistics.mean(row[key] for row in rows)
        for key in rows[0]
    }


def answers(model: Any, processor: Any, other: Other, given: list[Prompt]) -> dict[str, Any]:
    """Right answers of both sides, and bytes of a cache.

    The first word of an answer comes from the prefill, which no press shortens. So kvpress reads
    the question from the compressed cache of what stands before it, as its pipeline does.
    """

    def right(said: list[int], one: Prompt) -> bool:
        end = model.config.text_config.eos_token_id
        said = said[: said.index(end)] if end in said else said
        return bool(processor.decode(said).strip() == one.answer)

    rows: dict[str, dict[str, Any]] = {}
    for name in (None, *METHODS):
        with foveate.use(model, method(name)) if name else nullcontext():
            said = [model.generate(**p.inputs)[0, p.visual.shape[1] :].tolist() for p in given]
            cache = DynamicCache(config=model.config.text_config)
            model(**given[0].inputs, past_key_values=cache)
        rows[f"foveate: {name or 'all tokens'}"] = {
            "right": sum(map(right, said, given)), "kv_bytes": cache_bytes(cache)[0]
        }  # fmt: skip
    for name in (None, *PRESSES):
        said = [
            other.ask("answer", prompt=i, press=one.blind(name), steps=NEW_TOKENS)
            for i, one in enumerate(given)
        ]
        press = name and given[0].press(name)
        rows[f"kvpress: {name or 'all tokens'}"] = {
            "right": sum(map(right, said, given)),
            "kv_bytes": other.ask("memory", prompt=0, press=press)["kv_bytes"],
        }
    return rows


def clock(model: Any, of: Any, given: Prompt, steps: int) -> dict[str, float]:
    """CPU seconds of our prefill and decoding, as the other side counts them."""
    gc.collect()
    token = torch.full((given.embeds.shape[0], 1), 7)
    start = time.process_time()
    cache = DynamicCache(config=model.config.text_config)
    with foveate.use(model, of) if of else nullcontext():
        model(**given.inputs, past_key_values=cache)
        between = time.process_time()
        for _ in range(steps):
            model(input_ids=token, past_key_values=cache)
        return {"prefill": between - start, "decode": time.process_time() - between}


def memory(model: Any, of: Any, given: Prompt) -> dict[str, int]:
    """Bytes of our cache, and at the worst moment of a prefill."""
    caches: list[DynamicCache] = []

    def run() -> None:
        caches[:] = [DynamicCache(config=model.config.text_config)]
        model(**given.inputs, past_key_values=caches[0])

    with foveate.use(model, of) if of else nullcontext():
        run()
        held = cache_bytes(caches.pop())[0]
        return {"kv_bytes": held, "peak_bytes": peak_memory(run)}


def speed(
    model: Any, other: Other, given: Prompt, rounds: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Both sides in turns on one prompt, or on a batch of equal lengths."""
    other.send("prompts", [{"embeds": given.embeds, "mask": None}])
    contenders: dict[str, Callable[[], dict[str, float]]] = {}
    sizes = {}
    for name in (None, *METHODS):
        of, label = name and method(name), f"foveate: {name or 'all tokens'}"
        contenders[label] = lambda of=of: clock(model, of, given, steps)
        sizes[label] = memory(model, of, given)
    for name in (None, *PRESSES):
        press, label = name and given.press(name), f"kvpress: {name or 'all tokens'}"
        contenders[label] = lambda press=press: other.ask(
            "clock", prompt=0, press=press, steps=steps
        )
        sizes[label] = other.ask("memory", prompt=0, press=press)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first warms up
        for name, took in one_round(contenders, number):
            times[name] += [took] if number else []
        print(f"round {number + 1} of {rounds + 1}", flush=True)
    return {name: {**sizes[name], **_spreads(name, times, steps)} for name in contenders}


def _spreads(name: str, times: dict[str, list[dict[str, float]]], steps: int) -> dict[str, Any]:
    """Times of a contender, and over those of all tokens on its own side."""
    whole = f"{name.partition(':')[0]}: all tokens"
    found = {}
    for what, each in (("prefill", 1), ("decode", steps)):
        took, base = ([one[what] for one in times[n]] for n in (name, whole))
        found[f"{what}_ms"] = Spread.of([1e3 * one / each for one in took]).to_dict()
        found[f"{what}_speed_up"] = Spread.of_ratios(base, took).to_dict()
    return found


def wide(visual: int, batch: int) -> tuple[Any, Prompt]:
    """A random LLaVA of some width, and prompts of equal length."""
    model = random_llava(*WIDE)
    inputs = prompt(model, visual)
    if batch > 1:
        encoded = inputs["mm_encoder_outputs"]["image"]
        encoded.pooler_output = [encoded.pooler_output[0].roll(i, 0) for i in range(batch)]
        inputs["input_ids"] = inputs["input_ids"].expand(batch, -1)
    return model, prompt_of(model, inputs)


def same_logits(model: Any, other: Other, given: list[Prompt]) -> float:
    """The largest difference between both sides' logits after a prompt, nothing removed."""
    return max(
        (model(**one.inputs).logits[:, -1] - other.fetch("plain", prompt=i)).abs().max().item()
        for i, one in enumerate(given)
    )


def in_words(other: Other, asked: int, count: int) -> dict[str, Any]:
    """What the tiny model tells: choices, answers, and batches of two."""
    model, processor = tiny.load()
    versions = other.load(model)
    given = list(questions(model, processor, asked))
    other.send("prompts", [{"embeds": one.embeds, "mask": None} for one in given])
    result = {
        "keep": KEEP, "other": versions, "prompts": len(given),
        "logits_apart": same_logits(model, other, given),
        "answers": answers(model, processor, other, given),
        "choices": choices(model, other, given),
    }  # fmt: skip
    for name, equal in (("equal", True), ("padded", False)):
        two = list(pairs(model, processor, count, equal))
        result[name] = batches(model, processor, other, two)
    return result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="an interpreter with kvpress")
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="tokens decoded after a prompt")
    parser.add_argument("--dry", action="store_true", help="small prompts, and write no result")
    args = parser.parse_args()
    other = Other(args.python)
    result = {**in_words(other, args.questions, args.pairs), "speed": []}
    print(json.dumps(result, indent=1), flush=True)
    for visual, batch in ((16, 1), (16, 2)) if args.dry else SIZES:
        model, one = wide(visual, batch)
        other.load(model)
        rows = speed(model, other, one, args.rounds, args.steps)
        size = {"visual": visual, "batch": batch, "entries": one.entries, "of": one.visual.shape[1]}
        result["speed"].append({**size, "rounds": args.rounds, "rows": rows})
        print(json.dumps(result["speed"][-1]), flush=True)
        if not args.dry:
            save("kvpress", {"model": "x".join(map(str, WIDE[:2])), **result})
    other.close()


if __name__ == "__main__":
    main()
