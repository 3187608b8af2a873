"""Sentences about one name or several."""

import pytest

from foveate.io.quoting import each_of, listed, none_of


@pytest.mark.parametrize(
    ("names", "together", "subject", "denial"),
    [
        (["a"], "a", "a", "a does not act"),
        (["a", "a"], "a", "a", "a does not act"),
        (["a", "b"], "a and b", "each of a and b", "none of a and b acts"),
        (["a", "b", "c"], "a, b and c", "each of a, b and c", "none of a, b and c acts"),
    ],
    ids=len,
)
def test_sentences_agree_with_the_number_of_names(names, together, subject, denial):
    assert listed(iter(names)) == together
    assert each_of(iter(names)) == subject
    assert none_of(iter(names), "act") == denial
