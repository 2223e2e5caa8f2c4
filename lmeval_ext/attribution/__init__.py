"""Which matrices cost the divergence: one part of a model is quantized at a time, and measured against a reference.

    parts     which matrices are exchanged together: each one, a layer, a kind
    weights   dense weights of a quantized checkpoint, and whether its matrices can be exchanged one at a time
    measure   the divergence of each part, and of all of them
    __main__  ``python -m lmeval_ext.attribution``, which ``compare attribute`` starts

The checkpoint runs in Transformers: what `hf_quant` decodes, or holds in modules that can be multiplied.
"""
