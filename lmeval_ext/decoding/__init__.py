"""Decodes quantized weights to dense ones in plain PyTorch, for machines on which no engine of the format runs.

checkpoint  Decodes a checkpoint to a dense state dict with the names of the unquantized checkpoint
formats     The table of formats: how a matrix is recognised, and the function that decodes it
parts       What such a function is given
stored      Reads the tensors of a checkpoint folder by name
activations Whether a checkpoint asks for quantized activations, which decoded weights run without

The layouts, one module each: pure functions on tensors, on any device, without kernels.

exl2        EXL2
exl3        EXL3
floats      FP8, MXFP8, NVFP4, MXFP4
"""
