"""A decoder of four layers, for members whose family differs from others in its encoder."""

from tests.conformance.zoo.llava import TEXT as SIX

TEXT = {**SIX, "num_hidden_layers": 4}
