"""Quantization of results without such a block (the harness' own models), inferred from the model arguments."""

from __future__ import annotations

import re
from typing import Any

from compare.families import FULL_PRECISION
from compare.results.records import Quantization
from compare.results.values import number

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
_QUANTIZING_ARGUMENTS = re.compile(
    r"load_in_[48]bit|autogptq|gptq|quant|gguf|bnb|awq|torchao|compress|weight_dtype", re.IGNORECASE
)
_QUANTIZED_NAME = re.compile(
    r"gptq|awq|gguf|ggml|exl\d|bnb|bitsandbytes|quant|qat|aqlm|vptq|qtip|hqq|eetq|higgs|sinq|quip|spqr|flute|marlin"
    r"|auto-?round|torchao|bitnet|compressed|(^|[-_.])inc($|[-_.])|(nvfp|mxfp|(?<![a-z])(nf|u?int|fp))[-_]?[1-8](?!\d)"
    r"|w\d+a(fp)?\d+|(?<!\d)[1-8](\.\d+)?[-_. ]?(bits?\b|bpw)|(^|[-_.])i?q\d",
    re.IGNORECASE,
)

ASSUMED = "assumed full precision from its dtype argument: a stock model's result file does not say"
TOLD = "told by the spec, not measured"
ASSUMPTIONS = ("assumed", TOLD)  # how notes begin that a table repeats below its rows

_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)B(?![a-z])", re.IGNORECASE)


def infer_quantization(config: dict[str, Any], arguments: dict[str, str], checkpoint: str) -> Quantization:
    """Full precision if the run asked for a 16- or 32-bit dtype and nothing in the file indicates quantization.

    ``config.model_dtype`` is the dtype in which the model computes, which quantized checkpoints have as well: it says
    nothing. Bits per weight stay unknown. A quantized checkpoint that shows only in its own config.json is not
    recognized, so the record has `ASSUMED` as a note.
    """
    model = config.get("model")
    engine = model if isinstance(model, str) else ""
    asked = _FULL_DTYPES.get(arguments.get("dtype", "").removeprefix("torch."))
    computed = _FULL_DTYPES.get(str(config.get("model_dtype") or "").removeprefix("torch."))
    quantized = any(
        _QUANTIZING_ARGUMENTS.search(key) and value.lower() not in ("false", "none", "")
        for key, value in arguments.items()
    )
    named = [checkpoint, *(arguments.get(key, "") for key in ("pretrained", "revision", "subfolder"))]
    if any(_QUANTIZED_NAME.search(part) for name in named for part in name.split("/")):
        quantized = True
    if asked is None or quantized or _is_packed(config, checkpoint):
        return Quantization(engine=engine, dtype=asked or computed or "")
    return Quantization(family=FULL_PRECISION, scheme=asked, engine=engine, dtype=asked, notes=(ASSUMED,))


def _is_packed(config: dict[str, Any], checkpoint: str) -> bool:
    """Whether the model has far fewer elements than its name says weights: several weights share one element."""
    elements, size = number(config.get("model_num_parameters")), _SIZE_IN_NAME.search(checkpoint)
    return elements is not None and size is not None and 0 < elements < 0.6e9 * float(size[1])
