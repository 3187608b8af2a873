"""Families that are refused say why, and no family is both served and refused."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from foveate.errors import UnsupportedModelError
from foveate.families import find_family, list_families, unsupported_families


@pytest.mark.parametrize("model_type", unsupported_families())
def test_refusal_names_the_reason_and_what_works(model_type):
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    with pytest.raises(UnsupportedModelError) as error:
        find_family(model)
    message = str(error.value)
    assert message.startswith(f"model type {model_type!r} is not supported: its ")
    assert unsupported_families()[model_type] in message
    assert "supported: " + ", ".join(list_families()) in message


def test_types_are_those_of_configs():
    """A misspelt type would refuse nothing."""
    remote = {"kimi_vl"}  # code that comes with the checkpoint
    for model_type in set(unsupported_families()) - remote:
        assert AutoConfig.for_model(model_type).model_type == model_type


def test_no_family_is_served_and_refused():
    assert not set(unsupported_families()) & set(list_families())


def test_every_type_that_transformers_reads_images_with_is_served_or_refused():
    """A type that a newer transformers brings is to be looked at, and named."""
    known = {*list_families(), *unsupported_families()}
    assert sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - known) == []
