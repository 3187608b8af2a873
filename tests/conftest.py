"""Tiny random models, shared by all tests."""

import pytest
import torch

from tests.tinies import tiny_llava

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava():
    """CLIP and Llama, SDPA."""
    return tiny_llava()


@pytest.fixture(scope="session", params=["llama", "llama-gqa", "qwen2"])
def any_llava(request):
    """LLaVA with each kind of text model."""
    return tiny_llava(request.param)


@pytest.fixture(autouse=True)
def _no_leftovers(request):
    """After each test, no shared model carries a hook."""
    yield
    for name in ("llava", "any_llava"):
        if name in request.fixturenames:
            model = request.getfixturevalue(name)
            hooked = [n for n, m in model.named_modules() if m._forward_pre_hooks]
            assert not hooked, f"hooks left on {hooked}"
            assert "generate" not in vars(model)
