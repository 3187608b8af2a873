"""FEATHER, TransPrune, SparseVLM and HoliTom's inner merging: as FastV, with signals of their own.

The recorded text model runs inside a LLaVA; what each step of the method was shown and gave is
noted on the way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from golden_case import Case, Check, Watch, assert_close, assert_same
from golden_llm import SCORES, Replay, offered
from torch import Tensor

import foveate
from foveate.core import Adaptive, Method, Reduction, VisualTokens
from foveate.methods.feather import Feather
from foveate.methods.holitom_inner import HoliTomInner
from foveate.methods.sparsevlm import SparseVLM, rating
from foveate.methods.transprune import TransPrune

STATES = 1e-4  # absolute tolerance of hidden states


@dataclass(frozen=True)
class Seen:
    """A step: what the method was shown, its scores (V), and what it gave."""

    tokens: VisualTokens
    x: Tensor
    scores: Tensor
    reduction: Reduction


def checks(case: Case) -> dict[str, Check]:
    mode = case.facts.get("fastv_predefined_mask", "no_rope")
    if not re.fullmatch(r"no_rope(_s=\d+)?", mode):
        return {"variant": partial(pytest.fail, f"the variant {mode!r} is not offered")}
    replay = REPLAYS[case.slug](case)
    first = "stage0_kept_in_current" if case.slug == "sparsevlm" else "stage0_kept"
    return offered(replay, first) | replay.more()


class Drops(Replay):
    """A case whose recordings have a number for each stage."""

    def method(self, seen: list[Any]) -> Method:
        """The method; what its steps see is appended to `seen`."""
        method = self.plain()
        kind = type(method)

        def note(self: Any, tokens: VisualTokens, reduction: Reduction) -> None:
            seen.append(Seen(tokens, tokens.x, kind.scores(self, tokens)[0], reduction))

        def reduce_each(self: Any, tokens: VisualTokens) -> Any:
            ((members, reduction),) = kind.reduce_each(self, tokens)
            note(self, tokens, reduction)
            return [(members, reduction)]

        def reduce(self: Any, tokens: VisualTokens, count: int) -> Reduction:
            reduction = kind.reduce(self, tokens, count)
            note(self, tokens, reduction)
            return reduction

        changed = (
            {"reduce_each": reduce_each} if isinstance(method, Adaptive) else {"reduce": reduce}
        )
        observed = type(kind.__name__, (kind,), changed)
        return observed(**{name: getattr(method, name) for name in kind.__dataclass_fields__})

    def plain(self) -> Method:
        """The method under the case's hyper-parameters."""
        raise NotImplementedError

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers before which tokens are dropped."""
        return self.plain().layers

    def more(self) -> dict[str, Check]:
        """Checks of arrays that only this method's cases have."""
        return {}

    def run(self) -> tuple[dict[str, Tensor], list[Seen]]:
        """Place -> survivors, and what the steps saw."""
        seen: list[Seen] = []
        with foveate.use(self.model, self.method(seen)) as run:
            self.model(**self.inputs())
        return run.kept[0], seen

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        return {
            f"llm:{layer}": self.arrays[f"stage{stage}_kept"]
            for stage, layer in enumerate(self.layers)
        }

    def check_selection(self) -> None:
        kept, seen = self.run()
        assert list(kept) == list(self.kept)
        for stage, (place, expected) in enumerate(self.kept.items()):
            assert_same(kept[place], expected, f"kept at {place}")
            scores = self.arrays[f"stage{stage}_scores"]
            assert_close(seen[stage].scores, scores, SCORES, f"scores at {place}")

    @property
    def image(self) -> slice:
        """Where the image is in the prompt."""
        start = int(self.arrays["image_start"])
        return slice(start, start + int(self.arrays["image_len"]))


class FeatherReplay(Drops):
    def plain(self) -> Feather:
        facts = self.case.facts
        stride = facts["fastv_predefined_mask"].partition("s=")[2]
        return Feather(
            layers=tuple(facts["fastv_k"]),
            keep=1 - facts["fastv_ratio"],
            stride=int(stride) if stride else None,
        )


class TransPruneReplay(Drops):
    def plain(self) -> TransPrune:
        facts = self.case.facts
        return TransPrune(
            layers=tuple(facts["pruning_layer_list"]),
            keep=tuple(facts["image_token_ratio_list"]),
            accumulate=tuple(layer - 1 for layer in facts["accumulating_layer_list"]),
        )

    def more(self) -> dict[str, Check]:
        return {"transitions": self.check_transitions}

    def check_transitions(self) -> None:
        """Of each layer, as the next drop is told: of what is alive, nothing has gone since."""
        _, seen = self.run()
        (model,) = {self.model}
        steps = self.plain().steps(foveate.families.find_family(model))
        compared = 0
        for before, step, at in zip((0, *self.layers), steps, seen, strict=False):
            (need,) = (need for need in step.needs if need.name == "transition")
            for number, layer in enumerate(need.layers):
                if layer < before:
                    continue
                start = self.image.start
                recorded = self.arrays[f"ttv_layer{layer}"][start : start + at.tokens.count]
                got = at.tokens.signal("transition")[0, number]
                assert_close(got, recorded, SCORES, f"transitions of layer {layer}")
                compared += 1
        assert compared == sum(name.startswith("ttv_layer") for name in self.arrays)


class HoliTomReplay(Drops):
    """The recordings with a causal mask, and the choice of those without."""

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        stage = {"kept": "stage0_kept", "scores": "stage0_scores"}
        named = {name.removeprefix("causalfix_"): array for name, array in self.case.arrays.items()}
        return {stage.get(name, name): array for name, array in named.items()}

    def plain(self) -> HoliTomInner:
        facts = self.case.facts
        return HoliTomInner(layers=(facts["HOLITOM_k"],), keep=1 - facts["HOLITOM_r"])

    def more(self) -> dict[str, Check]:
        return {"released-selection": self.check_released, "states": self.check_states}

    def check_released(self) -> None:
        """The missing mask changes what the layer makes, but not what it looks at."""
        kept, (seen,) = self.run()
        (place,) = kept
        assert_same(kept[place], self.arrays["official_kept"], "kept")
        assert_close(seen.scores, self.arrays["official_scores"], SCORES, "scores")

    def check_states(self) -> None:
        """States and positions that enter the layer after the merge."""
        got = {}

        def look(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            got["states"], got["rotary"] = args[0][0], kwargs["position_embeddings"]

        layer = self.model.model.language_model.layers[self.layers[0]]
        with foveate.use(self.model, self.method([])):
            handle = Watch(layer, look)
            self.model(**self.inputs())
            handle.remove()
        assert_close(got["states"], self.arrays["hidden_after_merge"], STATES, "states")
        self._check_rotary(got["rotary"], self.arrays["pos_in_layer_k"], "positions")


class SparseVLMReplay(Drops):
    """Positions within the CURRENT list of tokens are recorded, and values of recycled ones."""

    def plain(self) -> SparseVLM:
        facts = self.case.facts
        return SparseVLM(
            layers=tuple(layer + 1 for layer in facts["pruning_layers"]),
            keep=tuple(facts["keep_counts"]),
            version=2 if "2_0" in facts["method"] else 1,
            heads=facts["heads_kept_v2"],
            as_released=True,
        )

    def more(self) -> dict[str, Check]:
        found = {"raters": ("text_rater_idx", self.check_raters)}
        found["recycling"] = ("stage0_merge_in", self.check_recycling)
        return {name: check for name, (array, check) in found.items() if array in self.arrays}

    @property
    def alive(self) -> Tensor:
        """Survivors move up into the columns of those kept, in their own order."""
        columns = torch.arange(int(self.arrays["image_len"]))
        for at in self.run()[1]:
            columns = columns[at.reduction.index[0].sort().values]
        return columns

    def check_selection(self) -> None:
        kept, seen = self.run()
        assert list(kept) == [f"llm:{layer}" for layer in self.layers]
        assert len(seen) == len(self.layers)
        for stage, at in enumerate(seen):
            expected = self.arrays[f"stage{stage}_kept_in_current"]
            assert_same(at.reduction.index[0, : len(expected)], expected, f"kept in stage {stage}")
            scores = self.arrays[f"stage{stage}_scores"]
            # The release divides by inner products, we by cosines: a factor for all.
            factor = at.scores.sum() / scores.sum()
            width = self.model.config.text_config.head_dim
            expected_factor = width**0.5 if self.plain().version == 2 else 1.0
            assert factor.item() == pytest.approx(expected_factor, rel=1e-4)
            assert_close(at.scores / factor, scores, SCORES, f"scores of stage {stage}")

    def check_raters(self) -> None:
        _, seen = self.run()
        for at in seen:
            signals = at.tokens.signals
            raters = rating(signals["question_relevance"], signals["question_mask"])[0]
            assert_same(raters.nonzero()[:, 0], self.arrays["text_rater_idx"], "raters")

    def check_recycling(self) -> None:
        """What goes into clustering, best first, and what comes out of it."""
        _, seen = self.run()
        for stage, at in enumerate(seen):
            count = len(self.arrays[f"stage{stage}_kept_in_current"])
            taken, merged = (self.arrays[f"stage{stage}_merge_{way}"] for way in ("in", "out"))
            spent = at.scores.argsort(descending=True)[count : count + len(taken)]
            assert_close(at.x[0, spent], taken, STATES, f"recycled in stage {stage}")
            assert (at.reduction.slot[0, spent] >= count).all()
            values = at.reduction.apply(at.x)[0, count:]
            assert_close(values, merged, STATES, f"merged in stage {stage}")


REPLAYS: dict[str, type[Drops]] = {
    "feather": FeatherReplay,
    "holitom-inner": HoliTomReplay,
    "sparsevlm": SparseVLMReplay,
    "transprune": TransPruneReplay,
}
