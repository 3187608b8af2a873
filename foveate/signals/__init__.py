"""What methods ask for: each signal computed once, without eager attention maps.

A step declares `Need(name, layers)`; the engine delivers the tensor under that name. Signals taken
at layers have the layer axis second, in the order of `Need.layers`, and their V columns are the
tokens that remain at the step. A signal is an object, defined in `encoder`, `prompt` or `decoder`.
"""

from foveate.signals import decoder, encoder, prompt
from foveate.signals.signal import (
    DecoderSignal,
    EncoderSignal,
    InputSignal,
    PromptSignal,
    Signal,
)

SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for module in (encoder, prompt, decoder)
    for signal in vars(module).values()
    if isinstance(signal, Signal)
}

__all__ = [
    "SIGNALS",
    "DecoderSignal",
    "EncoderSignal",
    "InputSignal",
    "PromptSignal",
    "Signal",
]
