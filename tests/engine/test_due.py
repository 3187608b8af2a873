"""What is due before each decoder layer: layers at which nothing happens are not in the list."""

from foveate.engine.planning import make_plan
from foveate.families import find_family
from foveate.methods import FastV, PyramidDrop, SparseVLM, TransPrune
from tests.tinies import tiny_llava


def due(*methods):
    """Layer -> layers of the steps there, signal -> layers of the steps that read it before these
    act, and the same of later steps.
    """
    plan = make_plan(find_family(tiny_llava()), methods)
    return {
        number: (
            [s.step.layer for s in due.steps],
            *(
                {signal.name: [s.step.layer for s in steps] for signal, steps in wanted.items()}
                for wanted in (due.signals, due.later)
            ),
        )
        for number, due in plan.due.items()
    }


def test_a_signal_of_the_layer_of_its_step_is_read_before_the_step():
    assert due(PyramidDrop(layers=(2, 4), keep=(0.5, 0.2))) == {
        2: ([2], {"text_attention": [2]}, {}),
        4: ([4], {"text_attention": [4]}, {}),
    }


def test_a_signal_of_an_earlier_layer_is_read_after_the_steps_there():
    found = due(PyramidDrop(layers=(2,), keep=(0.5,)), FastV(layer=3))
    assert found == {
        2: ([2], {"text_attention": [2]}, {"text_attention": [3]}),
        3: ([3], {}, {}),
    }


def test_what_is_told_of_the_input_is_due_before_the_first_layer():
    found = due(SparseVLM(layers=(2, 4), keep=(0.5, 0.2)))
    assert found[0] == ([], {"question_relevance": [2, 4]}, {})


def test_what_layers_do_to_tokens_is_collected_while_they_run():
    for _, signals, later in due(TransPrune()).values():
        assert "transition" not in {**signals, **later}
