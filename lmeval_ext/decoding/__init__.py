"""Decodes quantized weights to dense ones in plain PyTorch, for machines on which no engine of the format runs."""
