"""Robots: how much faster a control step of pi0 is with fewer visual tokens.

    python benchmarks/robots.py [--rounds 15]

A random pi0 with 3/16 of the published widths and a third of the layers, so that its parts cost
about as much of the whole. A control step is one call of `sample_actions`: three cameras of 256
tokens, an instruction of 48, and ten steps of denoising 50 actions. Sessions are entered anew each
time, which counts.
"""

from __future__ import annotations

import argparse
from typing import Any

from _bench import ratios, save, turns, warm_heap

warm_heap()

import torch  # noqa: E402
from transformers import PI0Config, PI0ForConditionalGeneration  # noqa: E402

import foveate  # noqa: E402
from foveate.measure.account import Account, account, unpruned  # noqa: E402
from foveate.measure.timing import Spread  # noqa: E402

CAMERAS, VISUAL, WORDS, IMAGE = 3, 256, 48, 999
WHOLE = "all tokens"
METHODS = {
    f"{name} {keep:.0%}": foveate.get_method(name)(keep=keep)
    for name in ("random", "divprune", "fastv")
    for keep in (0.5, 0.25)
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    result = measure(parser.parse_args().rounds)
    print(f"{WHOLE:14} {result[f'seconds with {WHOLE}']['median']:.2f} s")
    for name, found in result["rows"].items():
        seconds, speed = found["seconds"]["median"], found["speed-up"]
        print(
            f"{name:14} {seconds:.2f} s, {speed['median']:.2f}x ({speed['q25']:.2f} to "
            f"{speed['q75']:.2f}), by FLOPs {found['by FLOPs']:.2f}x"
        )
    save("robots", {"model": "random pi0, 3/16 of the widths, 1/3 of the layers", **result})


if __name__ == "__main__":
    main()
