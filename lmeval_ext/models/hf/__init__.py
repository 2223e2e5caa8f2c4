"""Transformers: `hf_quant`."""
