"""Quantized engines and perplexity protocols for EleutherAI's lm-evaluation-harness.

This file has no imports, because it is executed whenever lm-eval is imported (see `lmeval_ext._hook`).
"""

__version__ = "0.1.0"
