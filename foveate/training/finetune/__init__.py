"""Fine-tuning with fewer visual tokens: data, labels, and a run of the stock Trainer."""

from foveate.training.finetune.collator import Collator
from foveate.training.finetune.data import Conversations, Example, Message, Scenes
from foveate.training.finetune.recipe import Data, Recipe
from foveate.training.finetune.run import finetune

__all__ = [
    "Collator",
    "Conversations",
    "Data",
    "Example",
    "Message",
    "Recipe",
    "Scenes",
    "finetune",
]
