"""What methods ask for: each signal computed once, without eager attention maps.

`SIGNALS` names them. A step declares `Need(name, layers)`; the engine delivers the tensor under
that name.
"""

SIGNALS = {
    "cls_attention": "(G, L, H, V): attention of the encoder's class token to the patches, in "
    "each needed encoder layer",
    "keys": "(G, H, V, d): keys of the patches in the encoder layer within which the step acts",
    "text_attention": "(G, H, V): attention of the last prompt token to the visual tokens, in "
    "one decoder layer",
}
