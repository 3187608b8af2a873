"""The precision that the recipes train in."""

import torch


def mixed() -> torch.autocast:
    """bfloat16 where the processor multiplies it; where it is emulated, float32 is faster."""
    able = torch.cpu.get_capabilities()
    native = any(on for name, on in able.items() if name.endswith("bf16"))
    return torch.autocast("cpu", torch.bfloat16, enabled=native)
