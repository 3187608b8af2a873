"""MiniMax M3 VL with sparse layers is refused before anything is attached, by what those need."""

import pytest

import foveate
from foveate.errors import UnsupportedModelError
from tests.conformance.zoo.minimax_m3_vl import MiniMaxM3VL


class Sparse(MiniMaxM3VL):
    layer_types = ("full_attention", "full_attention") + ("minimax_m3_sparse",) * 4


def test_sparse_layers_are_refused():
    model = Sparse().build()
    with pytest.raises(UnsupportedModelError, match=r"4 of the 6 .*the first is 2.*blocks of"):
        foveate.use(model, "divprune")
    assert not [n for n, m in model.named_modules() if m._forward_pre_hooks]
