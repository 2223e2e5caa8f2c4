"""The packing table: how each quantization format stores a weight matrix in several tensors.

One row of `PACKINGS` per packing. A row recognises its tensors by their names and dtypes alone: a common base name with
the suffixes `payload` and `required`. `shape` (see `layouts`) derives the logical shape. Every tensor of the row except
the payload is overhead.

To add a format: add a row with the source that defines it, before any less demanding row with the same payload; write
its function in `layouts` if none fits; name its scheme in `schemes`. Test it with a header that the format's own
library wrote (`tests/storage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lmeval_ext.storage import layouts
from lmeval_ext.storage.layouts import Parts, Shape
from lmeval_ext.storage.safetensors_header import FLOAT8, FLOATS


@dataclass(frozen=True)
class Packing:
    """One row of the table.

    name: identifies the packing, as in `Weight.packing`. family: the name in comparison tables. payload: suffix of the
    tensor with the codes. required: suffixes of the side tensors that must exist, each with its allowed dtypes (empty:
    any). optional: suffixes of side tensors that may exist. dtypes: allowed dtypes of the payload. shape: from the
    tensors to the logical shape. source: where the layout is defined.
    """

    name: str
    family: str
    payload: str
    required: dict[str, frozenset[str]]
    optional: tuple[str, ...]
    dtypes: frozenset[str]
    shape: Callable[[Parts], Shape]
    source: str


_CT = "compressed-tensors, compressed_tensors/compressors/"
_MODELOPT = "TensorRT-Model-Optimizer, modelopt/torch/export/quant_utils.py pack_int4_in_uint8, to_quantized_weight"
_SCALES = (
    ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale",
    ".input_scale", ".input_scale_ub", ".input_zero_point", ".input_global_scale", ".output_scale", ".pre_quant_scale",
)  # fmt: skip
_BNB_SIDES = (".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")
_EXL2_SIDES = (".q_scale_max", ".q_groups", ".q_group_map")


def _row(
    name: str, family: str, payload: str, required: str, optional: Iterable[str], dtypes: Iterable[str],
    shape: Callable[[Parts], Shape], source: str,
) -> Packing:  # fmt: skip
    # ".weight_scale:F32,F16" requires one of these dtypes, ".weight_scale" allows any.
    entries = (entry.partition(":") for entry in required.split())
    sides = {suffix: frozenset(kinds.split(",")) - {""} for suffix, _, kinds in entries}
    return Packing(name, family, payload, sides, tuple(optional), frozenset(dtypes), shape, source)


# Order matters: of the rows with the same payload, the first that fits is used, so more demanding rows come first.
PACKINGS: tuple[Packing, ...] = (
    *(
        _row("exl3", "EXL3", ".trellis", signs, (".mcg", ".mul1"), {"I16"},
             layouts.exl3, "exllamav3, modules/quant/exl3.py LinearEXL3")
        for signs in (".suh .svh", ".su .sv", ".suh .sv", ".su .svh")
    ),
    *(
        _row("exl2", "EXL2", ".q_weight", f".q_scale {order}", _EXL2_SIDES, {"I32"},
             layouts.exl2, "exllamav2, ext.py make_q_matrix and conversion/adaptivegptq.py")
        for order in (".q_invperm", ".q_perm")
    ),
    _row("nvfp4", "NVFP4", ".weight_packed", ".weight_scale .weight_global_scale", _SCALES, {"U8"},
         layouts.fp4(".weight_packed", ".weight_scale", 16), _CT + "nvfp4/base.py"),
    _row("mxfp4", "MXFP4", ".weight_packed", ".weight_scale", _SCALES, {"U8"},
         layouts.fp4(".weight_packed", ".weight_scale", 32), _CT + "mxfp4/base.py"),
    _row("mxfp4-blocks", "MXFP4", "_blocks", "_scales", (), {"U8"},
         layouts.mxfp4_blocks, "transformers, integrations/mxfp4.py (gpt-oss)"),
    _row("int-packed", "INT", ".weight_packed", ".weight_scale .weight_shape", _SCALES, {"I32"},
         layouts.pack_quantized, _CT + "pack_quantized/base.py"),
    _row("modelopt-nvfp4", "NVFP4", ".weight", ".weight_scale:F8_E4M3 .weight_scale_2", _SCALES, {"U8"},
         layouts.fp4(".weight", ".weight_scale", 16), _MODELOPT),
    _row("modelopt-mxfp4", "MXFP4", ".weight", ".weight_scale:U8", _SCALES, {"U8"},
         layouts.fp4(".weight", ".weight_scale", 32), _MODELOPT),
    _row("modelopt-int4", "INT", ".weight", ".weight_scale:F32,F16,BF16", (*_SCALES, ".weight_scale_2"), {"U8"},
         layouts.modelopt_int4, _MODELOPT),
    *(
        _row(f"bnb-{kind}", "bitsandbytes", ".weight", f".weight.absmax .weight.quant_state.bitsandbytes__{kind}",
             _BNB_SIDES, {"U8", *FLOATS}, layouts.bnb_4bit, "bitsandbytes, functional.py QuantState.as_dict")
        for kind in ("nf4", "fp4")
    ),
    _row("bnb-int8", "bitsandbytes", ".weight", ".SCB", (".weight_format",), {"I8"},
         layouts.as_stored(".weight"), "bitsandbytes, nn/modules.py Linear8bitLt"),
    # AWQ and GPTQ have the same suffixes; they differ in the packed dimension (see `grouping`).
    _row("awq", "AWQ", ".qweight", ".qzeros .scales", (), {"I32"},
         layouts.awq, "AutoAWQ, awq/modules/linear/gemm.py"),
    _row("gptq", "GPTQ", ".qweight", ".qzeros .scales", (".g_idx",), {"I32"},
         layouts.gptq, "GPTQModel, nn_modules/qlinear/__init__.py PackableQuantLinear"),
    _row("fp8", "FP8", ".weight", ".weight_scale", _SCALES, FLOAT8,
         layouts.as_stored(".weight"), _CT + "naive_quantized/base.py"),
    _row("fp8", "FP8", ".weight", ".weight_scale_inv", _SCALES, FLOAT8,
         layouts.as_stored(".weight"), "transformers, integrations/finegrained_fp8.py"),
    _row("int8", "INT", ".weight", ".weight_scale", _SCALES, {"I8"},
         layouts.as_stored(".weight"), _CT + "naive_quantized/base.py"),
    *(
        _row("fp8", "FP8", "_proj", f"_proj{scale}", ("_proj_input_scale", "_proj_activation_scale"), FLOAT8,
             layouts.as_stored("_proj"), "transformers, integrations/finegrained_fp8.py FP8Experts (fused experts)")
        for scale in ("_scale_inv", "_scale", "_weight_scale")
    ),
    # Weights that were calibrated but not packed: full precision, with scales.
    _row("unpacked", "full precision", ".weight", ".weight_scale", _SCALES, FLOATS,
         layouts.as_stored(".weight"), _CT + "dense/base.py"),
)  # fmt: skip

FAMILIES = {row.name: row.family for row in PACKINGS}
