"""Tiny random models, shared by all tests."""

import os
import re

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from packaging.version import Version

from tests import drawing
from tests.tinies import tiny_llava

torch.set_num_threads(1)
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would starve its workers beside other tests

# Limits measure hangs, not speed: `timeout` in pyproject.toml is far above what any test takes on a
# loaded machine, and examples may take as long as they take.
settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")

# What cannot pass on older versions of transformers, test by test; nothing is skipped on newer.
OLDER = {
    # Video-LLaVA takes `pixel_values_images`; beams of PaddleOCR-VL repeat images one by one.
    "5.21": r"(test_pixels|test_boxes|test_patches|test_matrix|test_tower).*\[video_llava"
    r"|test_beams_share.*paddleocr",
    # Checkpointing replays hooks there, so a session within it ends in a CheckpointError, and
    # encoders refuse it.
    # New images after a cache: refused there on M-RoPE models, and not followed on Gemma 3.
    # Chunked prefill loses images there, which is refused.
    "5.23": r"checkpointing_changes_(nothing\[.*-True\]|none|no_gradient\[)"
    r"|checkpointing_the_tower|run_again_only|test_new_images"
    r"|test_chunked_prefill_(works|cuts)|a_chunk_that_ends_in_a_removed",
}

# What a release cannot do by itself. In 5.24.0 Llama 4 returns a field of its text model's output
# that this does not have, and raises.
BROKEN = {"5.24.0": "llama4"}


def pytest_collection_modifyitems(config, items):
    """Draw cells of large tables, and skip what other versions of transformers cannot do."""
    if drawing.is_drawn(config):
        kept = drawing.draw(items, drawing.seed_of(config))
        there = {item.nodeid for item in kept}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in there])
        items[:] = kept
    here = Version(transformers.__version__)
    older = {p: f"before {v} differs" for v, p in OLDER.items() if here < Version(v)}
    broken = {p: f"{v} raises" for v, p in BROKEN.items() if here == Version(v)}
    for pattern, reason in {**older, **broken}.items():
        skip = pytest.mark.skip(reason=f"transformers {reason} here")
        for item in items:
            if re.search(pattern, item.nodeid):
                item.add_marker(skip)


def pytest_configure(config):
    """Settle the seed before workers start."""
    if drawing.is_drawn(config):
        drawing.seed_of(config)


def pytest_report_header(config):
    """How to run what this run runs."""
    if drawing.is_drawn(config):
        seed = drawing.seed_of(config)
        return f"cells of large tables: drawn with --draw-seed {seed}; --all-cells runs all"
    return None


def pytest_terminal_summary(terminalreporter, config):
    """The seed once more, where something failed."""
    if drawing.is_drawn(config) and terminalreporter.stats.get("failed"):
        terminalreporter.line(f"again with the same cells: --draw-seed {drawing.seed_of(config)}")


def pytest_addoption(parser):
    parser.addoption(
        "--all-cells", action="store_true", help="run all cells of large tables, not some of them"
    )
    parser.addoption("--draw-seed", type=int, help="seed by which cells of large tables are drawn")
    parser.addoption(
        "--write-support",
        action="store_true",
        help="write the support matrix that test_matrix.py finds, instead of comparing with it",
    )


@pytest.fixture(scope="session")
def llava():
    """CLIP and Llama, SDPA."""
    return tiny_llava()


@pytest.fixture(scope="session", params=["llama", "llama-gqa", "qwen2"])
def any_llava(request):
    """LLaVA with each kind of text model."""
    return tiny_llava(request.param)


@pytest.fixture
def flash_emulated():
    """A kernel with the calling convention of flash attention, in plain torch."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    name = "emulated_2d"  # transformers loads a kernel for every name with "flash" in it
    AttentionInterface.register(name, emulated_flash)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield name
    AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop(name)


def emulated_flash(
    module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs
):
    """Queries are the last keys, a 2-D mask unpads, one row with gaps counts as packed."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True)
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(keys - queries)
    allowed = allowed[None, None]
    if attention_mask is not None:
        assert attention_mask.dim() == 2
        allowed = allowed & attention_mask[:, None, None, -keys:].bool()
    if position_ids is not None and query.shape[0] == 1 and causal and queries > 1:
        gaps = position_ids[0].diff() != 1
        assert not gaps.any(), "one row with gaps in its positions would be unpacked as several"
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def _no_leftovers(request):
    """After each test, no shared model carries a hook."""
    yield
    for name in ("llava", "any_llava"):
        if name in request.fixturenames:
            model = request.getfixturevalue(name)
            hooked = [
                n for n, m in model.named_modules() if m._forward_pre_hooks or "forward" in vars(m)
            ]
            assert not hooked, f"hooks left on {hooked}"
            assert "generate" not in vars(model)
