"""Whether vLLM's kernels quantize activations, by the names of their classes (0.26 to 0.33).

Native FP4 kernels need Blackwell and have not been run here. A kernel that no row knows is reported as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

# The first match counts
_KERNELS: tuple[tuple[str, bool], ...] = (
    # 16-bit activations whatever the checkpoint asks for
    (r"marlin|humming", False),
    (r"W(4|8|N|Na)A16", False),
    (r"^(CPUFp8BlockScaledMM|CPUFp8PerTensorScaledMM|Machete|Exllama|Conch|EmulationMxfp8|CPUExpertsFp8$)", False),
    # Emulated: quantized and decoded at every call
    (r"^EmulationNvFp4|^EmulationMxfp[46]|^Nvfp4QuantizationEmulation|^NvFp4MoeBackend\.EMULATION$", True),
    # Native FP4 and FP8 units, and integer kernels
    (r"^(B12x|Cutlass|Fbgemm|FlashInfer|Torch)\w*(NvFp4|MxFp4|Mxfp8)LinearKernel$", True),
    (r"^CutlassExperts|^TrtLlmNvFp4|W4A8|W8A8|ScaledMM", True),
)
_EMULATED = re.compile(r"emulation|^reference", re.IGNORECASE)  # vLLM's kernels, and ours


class Activations(NamedTuple):
    """Whether the checkpoint asks for quantized activations, and whether the kernel quantizes them; None if unknown."""

    asked: bool | None
    ran: bool | None


def quantizes_activations(name: str) -> bool | None:
    """Whether the kernel of this name quantizes activations; None if unknown."""
    return next((ran for pattern, ran in _KERNELS if re.search(pattern, name, re.IGNORECASE)), None)


def activation_notes(kernels: Mapping[str, Activations]) -> list[str]:
    """Notes on activations that the checkpoint wants quantized, one for each thing that happened to them.

    kernels: as `layer_kernels` returns them.
    """
    names: dict[str, list[str]] = {}
    for name, (asked, ran) in kernels.items():
        if asked:
            happened = {True: "emulated" if _EMULATED.search(name) else "native", False: "no", None: "unknown"}[ran]
            names.setdefault(happened, []).append(name)
    return [text.format(names=", ".join(names[key])) for key, text in _TEXTS.items() if key in names]


_TEXTS = {
    "no": "weight-only: {names} does not quantize activations, as the checkpoint asks for; their error is not in the "
    "figures (NVFP4: emulate it with linear_backend=emulation, for experts moe_backend=emulation)",
    "native": "activations quantized by {names}, natively",
    "emulated": "activations quantized by {names}, emulated",
    "unknown": "unknown whether activations are quantized, as the checkpoint asks for, by {names}",
}
