"""Whether a result was computed weight-only or with quantized activations, from scheme, kernel and notes."""

from __future__ import annotations

import re

# The activations that met the weights. A line through points that differ in it would compare two things.
WEIGHT_ONLY = "weight-only"


ACTIVATIONS = "activations quantized"


# The first match counts; a scheme without a row quantizes only weights, as GGUF, EXL2/3, GPTQ and AWQ do.
_SCHEME_MEANING: tuple[tuple[str, str], ...] = (
    (r"a16|weight.?only", WEIGHT_ONLY),
    # fp8 includes "fp8-block"; "int8" is bitsandbytes' LLM.int8(); "mxfp4" alone is gpt-oss' weight-only format
    (r"w\d+a(fp)?\d+|nvfp4|mxfp4a[48]|mxfp8|fp8|^int8$", ACTIVATIONS),
    # BitNet's layers, torchao's types of that name, and optimum-quanto's "quanto-WEIGHTS-ACTIVATIONS"
    (r"^bitnet|DynamicActivation|^quanto-\w+-\w+", ACTIVATIONS),
)


_SAYS_WEIGHT_ONLY = re.compile(r"(?<!not )weight[- ]only", re.IGNORECASE)


# vLLM's Marlin kernels multiply 16-bit activations whatever the checkpoint asks for.
_WEIGHT_ONLY_KERNELS = re.compile(r"marlin", re.IGNORECASE)


def scheme_arithmetic(scheme: str) -> str:
    """The arithmetic that a checkpoint's scheme asks for: `WEIGHT_ONLY` or `ACTIVATIONS`."""
    for pattern, meaning in _SCHEME_MEANING:
        if re.search(pattern, scheme, re.IGNORECASE):
            return meaning
    return WEIGHT_ONLY


def arithmetic_run(scheme: str, kernel: str | None, notes: tuple[str, ...]) -> str:
    """The arithmetic that really ran: a note "weight-only", or a weight-only kernel, overrides the scheme."""
    if any(_SAYS_WEIGHT_ONLY.search(note) for note in notes):
        return WEIGHT_ONLY
    if kernel is not None and _WEIGHT_ONLY_KERNELS.search(kernel):
        return WEIGHT_ONLY
    return scheme_arithmetic(scheme)
