"""Fine-tuning with fewer visual tokens: data, labels, and a run of the stock Trainer."""

from foveate.finetune.collator import Collator
from foveate.finetune.data import Conversations, Example, Message, Scenes
from foveate.finetune.recipe import Data, Recipe
from foveate.finetune.run import finetune

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
