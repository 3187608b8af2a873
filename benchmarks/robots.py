"""Robots: how much faster a control step of pi0 is with fewer visual tokens, and where it takes
over what has not changed.

    python benchmarks/robots.py [--rounds 15] [--only reuse]

A random pi0 with 3/16 of the published widths and a third of the layers, so that its parts cost
about as much of the whole. A control step is one call of `sample_actions`: three cameras of 256
tokens, an instruction of 48, and ten steps of denoising 50 actions. Sessions are entered anew each
time, which counts. With reuse, two steps of a film are timed at once, amid it, so that the first
step, which has nothing to take over, does not count; each contender has a copy of the model.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import ExitStack
from typing import Any

from _arm import film
from _bench import RESULTS, machine, ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402
from transformers import PI0Config, PI0ForConditionalGeneration  # noqa: E402

import foveate  # noqa: E402
from foveate.measure.account import Account, account, unpruned  # noqa: E402
from foveate.measure.timing import Spread  # noqa: E402
from foveate.robots import Reuse, VLACache  # noqa: E402

CAMERAS, VISUAL, WORDS, IMAGE = 3, 256, 48, 999
WHOLE = "all tokens"
METHODS = {
    f"{name} {keep:.0%}": foveate.get_method(name)(keep=keep)
    for name in ("random", "divprune", "fastv")
    for keep in (0.5, 0.25)
}
FRAMES, STEPS = 48, 2  # of a film; control steps that are timed at once
FILMS: dict[str, tuple[VLACache | None, dict[str, Any], int]] = {
    "the wrist's camera alone moves": (None, {"arm": False}, 1),
    "cameras at half the rate": (None, {}, 2),
    "VLA-Cache": (VLACache(), {}, 1),
    "VLA-Cache, noise of 2 levels": (VLACache(), {"noise": 2.0}, 1),
}
"""Name -> rule, film, and control steps for each of its frames."""


def random_policy() -> Any:
    """A random pi0 of the size that the module says."""
    torch.manual_seed(0)
    text = {
        "model_type": "gemma", "vocab_size": 1000, "num_hidden_layers": 6, "head_dim": 48,
        "num_attention_heads": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 216, "intermediate_size": 807,
        "num_hidden_layers": 9, "num_attention_heads": 6, "image_size": 224, "patch_size": 14,
        "vision_use_head": False,
    }  # fmt: skip
    vlm = {
        "model_type": "paligemma", "vision_config": vision, "image_token_id": IMAGE,
        "text_config": {**text, "hidden_size": 384, "intermediate_size": 3072},
        "projection_dim": 384, "hidden_size": 384,
    }  # fmt: skip
    expert = {**text, "hidden_size": 192, "intermediate_size": 768}
    config = PI0Config(vlm_config=vlm, dit_config=expert)
    return PI0ForConditionalGeneration(config).eval()


def observation(config: Any) -> dict[str, torch.Tensor]:
    """What a robot sees, is told, and where it is; all of it random."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 900, (WORDS,), generator=generator).tolist()
    ids = torch.tensor([[IMAGE] * VISUAL * CAMERAS + words])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, CAMERAS, 3, 224, 224, generator=generator),
        "pixel_attention_mask": torch.ones(1, CAMERAS, dtype=torch.bool),
        "state": torch.randn(1, config.max_state_dim, generator=generator),
        "noise": torch.randn(1, config.chunk_size, config.max_action_dim, generator=generator),
    }


def measure(rounds: int) -> dict[str, Any]:
    """Seconds of a control step with each method, the methods in turn."""
    model = random_policy()
    inputs, records = observation(model.config), {}

    def contender(name: str) -> Any:
        def run() -> None:
            with foveate.use(model, METHODS[name]) as session:
                model.sample_actions(**inputs)
            records[name] = session

        return run if name in METHODS else lambda: model.sample_actions(**inputs)

    times = turns({name: contender(name) for name in (WHOLE, *METHODS)}, rounds)
    steps = model.config.num_inference_steps
    rows = {name: row(records[name], steps, times[WHOLE], times[name]) for name in METHODS}
    whole = Spread.of(times[WHOLE]).to_dict()
    return {"rounds": rounds, f"seconds with {WHOLE}": whole, "rows": rows}


def row(session: Any, steps: int, whole: list[float], seconds: list[float]) -> dict[str, Any]:
    """What one method made of a control step."""
    record, family = session.record, session.family

    def cost(found: Account) -> int:
        return found.total + steps * found.decode

    before, after = account(unpruned(record), family), account(record, family, session.methods)
    return {
        "seconds": Spread.of(seconds).to_dict(),
        "speed-up": ratios(whole, seconds),
        "by FLOPs": cost(before) / cost(after),
        "slots of each layer": record.cache_slots,
    }


class Loop:
    """Control steps through a film.

    Args:
        model: the policy.
        rule: what is taken over, beside what is equal.
        options: of the film.
        each: steps for each frame.
        known: whether anything is taken over.
    """

    def __init__(
        self, model: Any, rule: VLACache | None, options: Any, each: int, *, known: bool
    ) -> None:
        self.model, self.each, self.number = model, each, 0
        self.inputs, self.film = observation(model.config), film(FRAMES, **options)
        self.reuse = Reuse(model, rule) if known else None
        self.shares: list[tuple[float, float, float]] = []  # see `work`

    def step(self) -> torch.Tensor:
        """Actions of the next one."""
        frame = self.film[self.number // self.each % FRAMES]
        self.number += 1
        state = self.inputs["state"] + 0.01 * self.number
        actions = self.model.sample_actions(
            **{**self.inputs, "pixel_values": frame[None], "state": state}
        )
        if self.reuse is not None and self.reuse.last is not None:
            last = self.reuse.last
            tokens = sum(last.tokens) / len(last.tokens)
            self.shares.append((float(last.cameras.float().mean()), float(last.prompt), tokens))
        return actions

    def work(self, whole: Account, steps: int) -> float:
        """FLOPs of a step that is timed, what finds out what to take over left out.

        Args:
            whole: of a step that takes nothing over.
            steps: of denoising.
        """
        cameras, prompt, tokens = torch.tensor(self.shares[STEPS:]).mean(0).tolist()
        assert whole.tower is not None
        once = whole.tower * (1 - cameras) + (whole.projector or 0) * (1 - prompt)
        return once + sum(whole.layers) * (1 - tokens) + steps * whole.decode


def measure_reuse(rounds: int) -> dict[str, Any]:
    """Seconds of control steps amid a film that take over what they can, against all anew."""
    model = random_policy()
    with foveate.use(model, METHODS["random 50%"]) as session:
        model.sample_actions(**observation(model.config))
    whole, steps = (
        account(unpruned(session.record), session.family),
        model.config.num_inference_steps,
    )
    loops = {WHOLE: Loop(copy.deepcopy(model), None, {}, 1, known=False)}
    loops |= {name: Loop(copy.deepcopy(model), *FILMS[name], known=True) for name in FILMS}

    def contender(name: str) -> Any:
        return lambda: [loops[name].step() for _ in range(STEPS)]

    with ExitStack() as stack:
        for loop in loops.values():
            if loop.reuse is not None:
                stack.enter_context(loop.reuse)
        times = turns({name: contender(name) for name in loops}, rounds)
    full = whole.total + steps * whole.decode
    rows = {}
    for name in FILMS:
        cameras, prompt, tokens = torch.tensor(loops[name].shares[STEPS:]).mean(0).tolist()
        rows[name] = {
            "seconds": Spread.of([seconds / STEPS for seconds in times[name]]).to_dict(),
            "speed-up": ratios(times[WHOLE], times[name]),
            "by FLOPs": full / loops[name].work(whole, steps),
            "images not encoded": cameras,
            "prompts not read": prompt,
            "keys and values taken over": tokens,
            **({"error": errors(model, *FILMS[name])} if FILMS[name][0] else {}),
        }
    seconds = Spread.of([seconds / STEPS for seconds in times[WHOLE]]).to_dict()
    return {"rounds": rounds, "machine": machine(), f"seconds with {WHOLE}": seconds, "rows": rows}


def errors(model: Any, rule: VLACache | None, options: Any, each: int) -> dict[str, float]:
    """How far actions are from those of all tokens anew, as a share of their size: over steps after
    the first.
    """
    plain = Loop(model, rule, options, each, known=False)
    want = [plain.step() for _ in range(6)]
    loop = Loop(model, rule, options, each, known=True)
    assert loop.reuse is not None
    with loop.reuse:
        got = [loop.step() for _ in range(6)]
    off = [float((a - b).norm() / b.norm()) for a, b in zip(got[1:], want[1:], strict=True)]
    return {"median": sorted(off)[len(off) // 2], "most": max(off)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["reuse"], help="keep what was measured of the rest")
    options = parser.parse_args()
    reuse = measure_reuse(options.rounds)
    for name, found in reuse["rows"].items():
        speed, off = found["speed-up"], found.get("error", {"median": 0.0, "most": 0.0})
        print(
            f"{name:32} {found['seconds']['median']:.2f} s, {speed['median']:.2f}x "
            f"({speed['q25']:.2f} to {speed['q75']:.2f}), by FLOPs {found['by FLOPs']:.2f}x, "
            f"tokens {found['keys and values taken over']:.0%}, error {off['median']:.1e} "
            f"(most {off['most']:.1e})"
        )
    if options.only:
        path = RESULTS / "robots.json"
        kept = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**kept, "reuse": reuse}, indent=1) + "\n", encoding="utf-8")
        return
    result = measure(options.rounds)
    print(f"{WHOLE:14} {result[f'seconds with {WHOLE}']['median']:.2f} s")
    for name, found in result["rows"].items():
        seconds, speed = found["seconds"]["median"], found["speed-up"]
        print(
            f"{name:14} {seconds:.2f} s, {speed['median']:.2f}x ({speed['q25']:.2f} to "
            f"{speed['q75']:.2f}), by FLOPs {found['by FLOPs']:.2f}x"
        )
    model = "random pi0, 3/16 of the widths, 1/3 of the layers"
    save("robots", {"model": model, **result, "reuse": reuse})


if __name__ == "__main__":
    main()
