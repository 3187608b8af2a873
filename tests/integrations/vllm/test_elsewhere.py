"""Models that are not served, and releases that are not known: nothing is ignored."""

from types import SimpleNamespace

import pytest

from foveate.integrations.vllm.architectures import refuse_elsewhere
from foveate.integrations.vllm.versions import check_version

pytestmark = pytest.mark.vllm
ASKED = {"foveate_method": "divprune"}


class Stock:
    """A processor of vLLM, as far as it is asked here."""

    def __init__(self, default=None):
        multimodal = SimpleNamespace(mm_processor_kwargs=default)
        model_config = SimpleNamespace(multimodal_config=multimodal)
        self.info = SimpleNamespace(ctx=SimpleNamespace(model_config=model_config))

    def apply(self, inputs, timing_ctx):
        return inputs.hf_processor_mm_kwargs


def prompt(**arguments):
    return SimpleNamespace(hf_processor_mm_kwargs=arguments)


@pytest.mark.parametrize(("default", "given"), [(None, ASKED), (ASKED, {})])
def test_another_model_refuses_what_it_would_ignore(default, given):
    exceptions = pytest.importorskip("vllm.exceptions")
    registry = SimpleNamespace(create_processor=lambda: Stock(default))
    refuse_elsewhere(registry)
    with pytest.raises(exceptions.VLLMClientError, match="does not serve this model in vLLM"):
        registry.create_processor().apply(prompt(**given), None)


def test_another_model_is_left_alone_otherwise():
    registry = SimpleNamespace(create_processor=lambda: Stock({"size": 3}))
    refuse_elsewhere(registry)
    once = registry.create_processor
    refuse_elsewhere(registry)
    assert registry.create_processor is once
    assert once().apply(prompt(size=4), None) == {"size": 4}


def test_an_unknown_release_refuses(monkeypatch):
    exceptions = pytest.importorskip("vllm.exceptions")
    from foveate.integrations.vllm import versions
    from foveate.integrations.vllm.processor import refusing

    monkeypatch.setattr(versions, "installed", lambda: None)
    made = refusing(Stock, check_version)()
    assert made.apply(prompt(size=4), None) == {"size": 4}
    with pytest.raises(exceptions.VLLMClientError, match="does not know vLLM"):
        made.apply(prompt(**ASKED), None)
