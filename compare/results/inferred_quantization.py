"""What the result file of a stock model (the harness' own) tells of its weights: never how they are stored.

Neither a dtype nor a name is evidence: a quantized checkpoint is loaded with ``dtype=float16``, too, from a folder of
any name. So a stock model is never full precision by itself; ``--baseline LABEL``, or a spec of `compare run`, says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from compare.results.records import QUANTIZED_BY, UNSTATED, Quantization
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
_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)B(?![a-z])", re.IGNORECASE)


def infer_quantization(config: dict[str, Any], arguments: dict[str, str], checkpoint: str) -> Quantization:
    """An unknown family, with a note that says so and names what indicates quantization.

    dtype: the one asked for, else ``config.model_dtype``: in which the model computes, not how its weights are stored.
    """
    model = config.get("model")
    asked = _FULL_DTYPES.get(arguments.get("dtype", "").removeprefix("torch."))
    computed = _FULL_DTYPES.get(str(config.get("model_dtype") or "").removeprefix("torch."))
    signs = list(_signs(config, arguments, checkpoint))
    note = f"{UNSTATED}{QUANTIZED_BY}{' and '.join(signs)}" if signs else UNSTATED
    return Quantization(
        engine=model if isinstance(model, str) else "",
        dtype=asked or computed or "",
        notes=(note,),
    )


def _signs(config: dict[str, Any], arguments: dict[str, str], checkpoint: str) -> Iterator[str]:
    """What indicates that the weights are quantized, in a reader's words."""
    for key, value in arguments.items():
        if _QUANTIZING_ARGUMENTS.search(key) and value.lower() not in ("false", "none", ""):
            yield f"its argument {key}"
            break
    names = [checkpoint, *(arguments.get(key, "") for key in ("pretrained", "revision", "subfolder"))]
    if any(_QUANTIZED_NAME.search(part) for name in names for part in name.replace("\\", "/").split("/")):
        yield "its name"
    elements, size = number(config.get("model_num_parameters")), _SIZE_IN_NAME.search(checkpoint)
    if elements is not None and size is not None and 0 < elements < 0.6e9 * float(size[1]):
        yield "its number of elements, too few for the size in its name"
