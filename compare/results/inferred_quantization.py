"""Quantization of results without such a block (the harness' own models), inferred from the model arguments."""

from __future__ import annotations

import re
from typing import Any

from compare.families import FULL_PRECISION
from compare.results.records import Quantization

_FULL_DTYPES = {
    "float32": "float32",
    "float": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "fp16": "float16",
}
_QUANTIZING_ARGUMENTS = re.compile(r"load_in_[48]bit|autogptq|gptq|quantiz|gguf_file|bnb_|awq", re.IGNORECASE)
_QUANTIZED_NAME = re.compile(
    r"gptq|awq|gguf|exl[23]|nvfp4|mxfp4|fp8|fp4|nf4|bnb|int[248]|w\d+a\d+|[2-8][-_. ]?bits?\b|[2-8](\.\d+)?bpw"
    r"|(^|[-_.])i?q\d|quant|aqlm|vptq|qtip|hqq|autoround",
    re.IGNORECASE,
)

ASSUMED = "assumed full precision from its dtype: a stock model's result file does not say"


def infer_quantization(config: dict[str, Any], arguments: dict[str, str], checkpoint: str) -> Quantization:
    """Full precision if a 16- or 32-bit dtype is given and neither arguments nor name indicate quantization.

    Bits per weight stay unknown. A quantized checkpoint that shows only in its own config.json is not recognized,
    so the record has `ASSUMED` as a note.
    """
    model = config.get("model")
    engine = model if isinstance(model, str) else ""
    given = arguments.get("dtype") or config.get("model_dtype") or ""
    dtype = _FULL_DTYPES.get(str(given).removeprefix("torch."))
    quantized = any(
        _QUANTIZING_ARGUMENTS.search(key) and value.lower() not in ("false", "none", "")
        for key, value in arguments.items()
    )
    if dtype is None or quantized or _QUANTIZED_NAME.search(checkpoint):
        return Quantization(engine=engine, dtype=dtype or "")
    return Quantization(family=FULL_PRECISION, scheme=dtype, engine=engine, dtype=dtype, notes=(ASSUMED,))
