"""`foveate train`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.errors import InputError

EXAMPLE = """\
model: tiny            # tiny, a folder, or a hub id such as llava-hf/llava-1.5-7b-hf
out: runs/pyramiddrop  # gets checkpoints while it runs, and at the end the model and foveate.json

data:
  scenes: 64           # drawn scenes; for your own data, use instead: file: train.jsonl
  turns: 4             # questions about one scene

method:                # omit to train with all visual tokens
  name: pyramiddrop    # a name that `foveate list` shows; for several, a list of such mappings
  keep: [0.5, 0.25, 0.125]

# train: method        # train only what the method learns, with the model frozen (visionselector)

freeze: [vision_tower] # parameters whose name contains one of these are not trained

# lora:                # train adapters instead (needs peft); keys of peft.LoraConfig
#   r: 16
#   target_modules: [q_proj, k_proj, v_proj, o_proj]

trainer:               # any argument of transformers.TrainingArguments
  per_device_train_batch_size: 4
  num_train_epochs: 1
  learning_rate: 1.0e-4
  logging_steps: 4
  save_steps: 8
"""

HELP = (
    """Train a model on conversations about images, with a method that removes visual tokens.

CONFIG is a YAML file. [bold]foveate train --example > config.yaml[/] writes the one below. It
trains the model that comes with foveate on drawn scenes, offline, in about a minute. Run the same
command again to continue an interrupted run from its last checkpoint.

[bold]Example[/]

\b
"""
    + EXAMPLE.replace("[", r"\[")
    + """
[bold]Data[/]

A jsonl file with one conversation per line: messages (role, content) or LLaVA's conversations
(from, value), and images. Paths are relative to the file.

\b
{"images": \\["cat.jpg"], "messages": \\[{"role": "user", "content": "<image>\\\\nWhat is this?"},
  {"role": "assistant", "content": "A cat."}]}

[bold]Multiple processes[/]

  torchrun --nproc-per-node 2 -m foveate train config.yaml

  accelerate launch --use_fsdp --fsdp_version 2 -m foveate train config.yaml
"""
)


def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file that describes the run.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Print an example CONFIG.")] = False,
) -> None:
    """Train a model with a method."""
    if example:
        print(EXAMPLE, end="")
    elif config is None:
        raise InputError("train needs a YAML file; `foveate train --example` prints one")
    else:
        from foveate.cli.console import stdout
        from foveate.cli.train import run

        run(config, stdout())
