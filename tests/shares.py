"""How many tokens a method is to keep, layer by layer."""

from foveate.core import Method
from foveate.core.counting import TokenCount
from foveate.core.step import ModelFacts

TOTAL = 576  # tokens of the image that is planned for


def mean_share(method: Method, model: ModelFacts) -> float:
    """Planned share of an image's tokens that survive, averaged over the layers from the first cut
    on.
    """
    steps = [step for step in method.steps(model) if "decode" not in step.effects]
    sites = [step.layer if step.stage == "llm" else 0 for step in steps]
    image, done, first = TokenCount(TOTAL), 0, min(sites, default=0)
    surviving = []
    for layer in range(model.text_layers):
        while done < len(steps) and sites[done] <= layer:
            image.take(method, steps[done], done)
            done += 1
        surviving.append(image.tokens / TOTAL)
    return sum(surviving[first:]) / max(len(surviving) - first, 1)
