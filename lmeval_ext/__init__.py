"""Quantized engines and perplexity protocols for EleutherAI's lm-evaluation-harness.

This file stays empty of imports: it is read whenever lm-eval is imported (see `lmeval_ext._hook`).
"""

__version__ = "0.1.0"
