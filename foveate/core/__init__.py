"""What a method is made of: method, step, visual tokens, reduction, budget."""

from typing import TYPE_CHECKING

from foveate.lazy import exports

if TYPE_CHECKING:
    from foveate.core.approximate import Approximate
    from foveate.core.attention import LayerAttention, LayerShape
    from foveate.core.budget import Keep, PerRequest
    from foveate.core.learning import Learning, TrainingPass
    from foveate.core.method import Adaptive, Method, Scorer, by_count
    from foveate.core.reduction import Reduction
    from foveate.core.registry import get_method, list_methods, register
    from foveate.core.schedule import Scheduled
    from foveate.core.step import STAGES, ModelFacts, Need, PartialCompute, Positions, Stage, Step
    from foveate.core.tokens import VisualTokens
else:
    __getattr__, __dir__ = exports(
        __name__,
        {
            "foveate.core.approximate": ("Approximate",),
            "foveate.core.attention": ("LayerAttention", "LayerShape"),
            "foveate.core.budget": ("Keep", "PerRequest"),
            "foveate.core.learning": ("Learning", "TrainingPass"),
            "foveate.core.method": ("Adaptive", "Method", "Scorer", "by_count"),
            "foveate.core.reduction": ("Reduction",),
            "foveate.core.registry": ("get_method", "list_methods", "register"),
            "foveate.core.schedule": ("Scheduled",),
            "foveate.core.step": (
                "STAGES", "ModelFacts", "Need", "PartialCompute", "Positions", "Stage", "Step",
            ),
            "foveate.core.tokens": ("VisualTokens",),
        },
    )  # fmt: skip

__all__ = [
    "STAGES",
    "Adaptive",
    "Approximate",
    "Keep",
    "LayerAttention",
    "LayerShape",
    "Learning",
    "Method",
    "ModelFacts",
    "Need",
    "PartialCompute",
    "PerRequest",
    "Positions",
    "Reduction",
    "Scheduled",
    "Scorer",
    "Stage",
    "Step",
    "TrainingPass",
    "VisualTokens",
    "by_count",
    "get_method",
    "list_methods",
    "register",
]
