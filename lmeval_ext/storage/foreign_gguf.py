"""GGUF files that hold no language model, and tensor types that llama.cpp does not have: what to tell their owner.

Tables only; nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROJECTOR = "a multimodal projector, which belongs beside a language model"
# general.type, or general.architecture for files without it -> what the file is. gguf.constants.GGUFType, and what
# llama.cpp's own tools write: imatrix.cpp, cvector-generator.cpp, convert_lora_to_gguf.py, the converter's --mmproj.
NOT_MODELS = {
    "imatrix": "an importance matrix, which a quantizer reads",
    "mmproj": PROJECTOR,
    "clip": PROJECTOR,
    "adapter": "a LoRA adapter",
    "controlvector": "a control vector",
}

# Tensor types that were in ggml.h once, by number (their names stand there as comments)
REMOVED = {
    **dict.fromkeys((4, 5), "Q4_2 or Q4_3, which llama.cpp removed in 2023"),
    **dict.fromkeys((31, 32, 33), "a repacked Q4_0, which llama.cpp removed in 2024 (it repacks Q4_0 at load)"),
    36: "I2_S of bitnet.cpp, or a repacked IQ4_NL, which llama.cpp removed in 2024",
    37: "I8_S of bitnet.cpp, or a repacked IQ4_NL, which llama.cpp removed in 2024",
    38: "TL1 of bitnet.cpp, or a repacked IQ4_NL, which llama.cpp removed in 2024",
}
# ik_llama.cpp's ggml.h counts its own types from here on (98 to 399 so far); llama.cpp counts up from 0 (42 so far)
FIRST_OF_IK_LLAMA = 97
IK_LLAMA = {
    133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K",
    144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 151: "Q8_KV", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT",
    155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT", 202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8",
    210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4",
    217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4",
    223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4",
    338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 398: "Q8_KV_R8",
    399: "Q8_K_R8",
}  # fmt: skip


def not_a_model(metadata: Mapping[str, Any]) -> str | None:
    """Return what a GGUF file is if it holds no language model, by its metadata; None for a model."""
    for key in ("general.type", "general.architecture"):
        if metadata.get(key) in NOT_MODELS:
            return NOT_MODELS[metadata[key]]
    return None


def foreign_type(number: int, newest: int) -> str:
    """Return whose tensor type a number is, and what to do about it.

    number: one that the installed gguf package does not know. newest: the largest number that it knows.
    """
    if number in REMOVED:
        return f"{REMOVED[number]}. Get a file that the present llama.cpp wrote, or convert the model again."
    if number >= FIRST_OF_IK_LLAMA:
        name = f"{IK_LLAMA[number]} " if number in IK_LLAMA else ""
        return (
            f"{name}of the fork ik_llama.cpp or one built on it, which neither llama.cpp nor gguf reads. Get a file "
            "with llama.cpp's own types."
        )
    return (
        f"which the installed gguf package does not know (it knows up to {newest}): of a newer llama.cpp, or of a "
        "fork. Update gguf (pip install -U gguf); if that does not help, get a file with llama.cpp's own types."
    )
