"""Decodes quantized weights to dense ones in plain PyTorch, for machines on which no engine of the format runs.

checkpoint  Decodes an EXL3 or EXL2 checkpoint to a dense state dict with the names of the unquantized checkpoint
exl2        Decodes EXL2 to dense weights in plain PyTorch: any device, no kernels
exl3        Decodes EXL3 to dense weights in plain PyTorch: any device, no kernels
"""
