"""The side of `beside_kvpress.py` that runs under an interpreter with kvpress.

It reads one command a line, as JSON, and answers each with a line. It imports nothing of foveate
but the file that counts memory, which needs only torch.

Shapes: B rows, N entries of a prompt, L layers, H heads of keys, D width.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

MEMORY = Path(__file__).parents[1] / "foveate" / "measure" / "memory.py"


class Rated(kvpress.SnapKVPress):
    """Keeps everything, and what it would rank by: (B, H, N) of each layer."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        self.rated.append(self.score(module, hidden_states, keys, values, attentions, kwargs))
        return keys, values


class Side:
    """A Llama of this environment's transformers, and prompts as embeddings."""

    def load(self, path: str) -> dict[str, str]:
        """Weights and configuration from a file; answers with versions."""
        given = torch.load(path)
        self.model = LlamaForCausalLM(LlamaConfig(**given["config"])).eval()
        self.model.load_state_dict(given["weights"])
        names = ("kvpress", "transformers", "torch")
        return {name: version(name) for name in names} | {
            "threads": str(torch.get_num_threads()),
            "attention": self.model.config._attn_implementation,
        }

    def prompts(self, path: str) -> int:
        """(B, N, D) embeddings and (B, N) masks; answers with their number."""
        self.given = torch.load(path)
        return len(self.given)

    def clock(self, prompt: int, press: Any, steps: int) -> dict[str, float]:
        """CPU seconds of the prefill with its press, and of decoding after it."""
        gc.collect()
        start = time.process_time()
        cache = self._prefill(prompt, press)[0]
        between = time.process_time()
        token = torch.full((self.given[prompt]["embeds"].shape[0], 1), 7)
        for step in range(steps):
            self._step(token, cache, self.given[prompt]["embeds"].shape[1] + step)
        return {"prefill": between - start, "decode": time.process_time() - between}

    def memory(self, prompt: int, press: Any) -> dict[str, int]:
        """Bytes of the cache, and at the worst moment of a prefill."""
        spec = importlib.util.spec_from_file_location("memory", MEMORY)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cache = self._prefill(prompt, press)[0]
        peak = module.peak_memory(lambda: self._prefill(prompt, press))
        return {"kv_bytes": module.cache_bytes(cache)[0], "peak_bytes": peak}

    def answer(self, prompt: int, press: Any, steps: int) -> list[int]:
        """Greedy tokens, as kvpress' own pipeline makes them: a press sees the first `of` entries,
        and the rest of the prompt is read from what it has left.
        """
        embeds, seen, cache = self.given[prompt]["embeds"], press["of"], DynamicCache()
        with self._pressed(press):
            self.model(inputs_embeds=embeds[:, :seen], past_key_values=cache, logits_to_keep=1)
        places = torch.arange(seen, embeds.shape[1])[None]
        logits = self.model(
            inputs_embeds=embeds[:, seen:], past_key_values=cache, position_ids=places
        ).logits[:, -1]
        said = [int(logits[0].argmax())]
        for step in range(steps - 1):
            logits = self._step(torch.tensor([[said[-1]]]), cache, embeds.shape[1] + step)
            said.append(int(logits[0].argmax()))
        return said

    def kept(self, prompt: int, press: Any, path: str) -> None:
        """Write (L, B, H, N), which entries survive."""
        torch.save(self._equal(prompt, press).any(3), path)

    def padding(self, prompt: int, press: Any) -> list[float]:
        """How many entries of padding survive in each row, on average over heads and layers.

        Padding has equal keys at equal places, so what is left is counted, not what is found.
        """
        equal = self._equal(prompt, press) & (self.given[prompt]["mask"] == 0)[:, None, None]
        return equal.any(-1).sum(-1).float().mean((0, 2)).tolist()

    def _equal(self, prompt: int, press: Any) -> Tensor:
        """(L, B, H, K, N): kvpress does not tell what it keeps, so the keys that are left are
        looked for among all of them.
        """
        left, whole = self._prefill(prompt, press)[0], self._prefill(prompt, None)[0]
        return torch.stack([
            (a.keys[:, :, :, None] == b.keys[:, :, None]).all(-1)
            for a, b in zip(left.layers, whole.layers, strict=True)
        ])  # fmt: skip

    def rated(self, prompt: int, path: str) -> None:
        """Write (L, B, H, N), the attention of the last token as SnapKV computes it."""
        press = Rated(compression_ratio=0.5, window_size=1, kernel_size=1)
        press.rated = []
        with press(self.model):
            self._forward(prompt, DynamicCache())
        torch.save(torch.stack(press.rated), path)

    def plain(self, prompt: int, path: str) -> None:
        """Write (B, vocabulary) logits after the prompt, without a press."""
        torch.save(self._prefill(prompt, None)[1], path)

    def second(self, prompt: int, press: Any, path: str) -> None:
        """Write (B, vocabulary) logits of the second token that `generate` makes."""
        given = self.given[prompt]
        with self._pressed(press):
            made = self.model.generate(
                inputs_embeds=given["embeds"], attention_mask=given["mask"], max_new_tokens=2,
                min_new_tokens=2, do_sample=False, output_logits=True, pad_token_id=0,
                return_dict_in_generate=True,
            )  # fmt: skip
        torch.save({"tokens": made.sequences, "logits": made.logits[1]}, path)

    def _pressed(self, press: Any) -> Any:
        if not press or "kind" not in press:
            return contextlib.nullcontext()
        # Half an entry more, so that no rounding takes one away.
        ratio = 1 - (press["entries"] + 0.5) / press["of"]
        kind = getattr(kvpress, press["kind"])
        return kind(compression_ratio=ratio, **press["options"])(self.model)

    def _prefill(self, prompt: int, press: Any) -> tuple[DynamicCache, Tensor]:
        cache = DynamicCache()
        with self._pressed(press):
            return cache, self._forward(prompt, cache)

    def _forward(self, prompt: int, cache: DynamicCache) -> Tensor:
        given = self.given[prompt]
        mask = given["mask"]
        places = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        made = self.model(
            inputs_embeds=given["embeds"], attention_mask=mask, position_ids=places,
            past_key_values=cache, logits_to_keep=1,
        )  # fmt: skip
        return made.logits[:, -1]

    def _step(self, token: Tensor, cache: DynamicCache, place: int) -> Tensor:
        """One token more, at its place in the whole prompt."""
        places = torch.full((1, 1), place)
        return self.model(token, past_key_values=cache, position_ids=places).logits[:, -1]


def main() -> None:
    torch.set_grad_enabled(False)
    side = Side()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            told = {"done": getattr(side, command.pop("do"))(**command)}
        except Exception as error:  # what goes wrong here is told there
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
