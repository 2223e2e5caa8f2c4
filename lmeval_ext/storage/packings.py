"""The packing table: how each quantization format stores a weight matrix in several tensors.

One row of `PACKINGS` per packing. A row recognises its tensors by their names and dtypes alone: a common base name with
the suffixes `payload` and `required`. `shape` (see `layouts`) derives the logical shape. Every tensor of the row except
the payload is overhead.

To add a format: add a row with the source that defines it, before any less demanding row with the same payload; write
its function in `layouts` if none fits; name its scheme in `schemes`. Test it with a header that the format's own
library wrote (`tests/storage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lmeval_ext.storage import layouts
from lmeval_ext.storage.layouts import Parts, Shape
from lmeval_ext.storage.safetensors_header import FLOAT8, FLOATS

Result = TypeVar("Result")


@dataclass(frozen=True)
class Packing:
    """One row of the table.

    name: identifies the packing, as in `Weight.packing`. family: the name in comparison tables. payload: suffix of the
    tensor with the codes, "" for any name. required: suffixes of the side tensors that must exist, each with its
    allowed dtypes (empty: any). optional: suffixes of side tensors that may exist. dtypes: allowed dtypes of the
    payload. shape: from the tensors to the logical shape. source: where the layout is defined. fits: what the shapes
    must be like, where names and dtypes are those of another row too. weight: the end of the weight's own name that
    the payload repeats ("_proj" of "down_proj"). configured: used in place of `shape` where the config decides: from
    the tensors, the quantization config and the weight's name. running: stored bits of the tensors that one precision
    uses, for packings that hold several.
    """

    name: str
    family: str
    payload: str
    required: dict[str, frozenset[str]]
    optional: tuple[str, ...]
    dtypes: frozenset[str]
    shape: Callable[[Parts], Shape]
    source: str
    fits: Callable[[Parts], bool] = lambda parts: True
    weight: str = ""
    configured: Callable[[Parts, Mapping[str, Any], str], Shape] | None = None
    running: Callable[[Parts, int], int] | None = None


_CT = "compressed-tensors, compressed_tensors/compressors/"
_MODELOPT = "TensorRT-Model-Optimizer, modelopt/torch/export/quant_utils.py pack_int4_in_uint8, to_quantized_weight"
_SCALES = (
    ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale",
    ".input_scale", ".input_scale_ub", ".input_zero_point", ".input_global_scale", ".output_scale", ".pre_quant_scale",
    ".activation_scale",
)  # fmt: skip
_BNB_SIDES = (".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")
_EXL2_SIDES = (".q_scale_max", ".q_groups", ".q_group_map")
_VPTQ_SIDES = (
    ".res_centroids.weight", ".res_indices", ".outlier_indices", ".outlier_centroids.weight", ".perm", ".weight_scale",
    ".weight_bias",
)  # fmt: skip
_HQQ_SIDES = (
    ".nbits", ".group_size", ".axis", ".packing", ".channel_wise", ".compute_dtype", ".encoded_state_dict",
    ".offload_meta", ".optimize", ".quant_scale", ".quant_zero", ".round_zero", ".stores_quant_config",
    ".unpack_view_dtype", ".view_as_float",
)  # fmt: skip
_QUANTO_SIDES = (".input_scale", ".output_scale")
_QTIP_SIDES = (".tlut", ".rcp", ".tp_rank")
_TABLES = tuple(f".lut{bits}" for bits in range(1, 9))  # Any-Precision: one table of values per precision


def dtypes_by_suffix(text: str) -> dict[str, frozenset[str]]:
    """Return the dtypes allowed for each suffix in a table's text: ".weight_scale:F32,F16" one of these, ".scales" any.

    An empty set stands for any dtype.
    """
    entries = (entry.partition(":") for entry in text.split())
    return {suffix: frozenset(kinds.split(",")) - {""} for suffix, _, kinds in entries}


def _row(
    name: str, family: str, payload: str, required: str, optional: Iterable[str], dtypes: Iterable[str],
    shape: Callable[[Parts], Shape], source: str, fits: Callable[[Parts], bool] = lambda parts: True,
    **more: Any,
) -> Packing:  # fmt: skip
    sides = dtypes_by_suffix(required)
    return Packing(name, family, payload, sides, tuple(optional), frozenset(dtypes), shape, source, fits, **more)


# How the tensors of fused experts ([experts, ...] in one tensor) are called: what stands for ".weight" in the payload
# and in the names of its scales, and for the dot before other side tensors.
_FUSED_NAMES = (
    ("_weight", "_weight", "_"),  # w13_weight, w13_weight_scale, w13_input_scale (vLLM's names)
    ("", "_weight", "_"),  # gate_up_proj, gate_up_proj_weight_scale, gate_up_proj_input_scale (ModelOpt)
    ("_proj", "_proj", "_proj_"),  # gate_up_proj, gate_up_proj_scale_inv, gate_up_proj_activation_scale (transformers)
    ("_linear", "_linear", "_linear_"),  # input_linear (Granite)
)


def _fused(row: Packing) -> Iterator[Packing]:
    """Yield the rows of a packing's fused experts: the same tensors, under each way of naming them."""
    for weight, scale, other in _FUSED_NAMES:
        names = {
            suffix: suffix.replace(".weight", weight if suffix == ".weight" else scale, 1)
            if suffix.startswith(".weight")
            else other + suffix[1:]
            for suffix in (row.payload, *row.required, *row.optional)
        }
        yield replace(
            row,
            payload=names[row.payload],
            required={names[suffix]: dtypes for suffix, dtypes in row.required.items()},
            optional=tuple(names[suffix] for suffix in row.optional),
            shape=_renamed(row.shape, names),
            fits=_renamed(row.fits, names),
            weight=weight,
        )


def _renamed(function: Callable[[Parts], Result], names: dict[str, str]) -> Callable[[Parts], Result]:
    """Return a function of parts that have other suffixes; names: the other suffix of each."""
    return lambda parts: function({suffix: parts[name] for suffix, name in names.items() if name in parts})


# Order matters: of the rows with the same payload, the first that fits is used, so more demanding rows come first.
_MATRICES: tuple[Packing, ...] = (
    _row("nvfp4", "NVFP4", ".weight_packed", ".weight_scale .weight_global_scale", _SCALES, {"U8"},
         layouts.floats(".weight_packed", ".weight_scale", 4, 16), _CT + "nvfp4/base.py"),
    _row("mxfp6", "MXFP6", ".weight_packed", ".weight_scale:U8,F8_E8M0", _SCALES, {"U8"},
         layouts.floats(".weight_packed", ".weight_scale", 6, 32), _CT + "mxfp6/base.py (0.20)", layouts.is_mxfp6),
    _row("mxfp4", "MXFP4", ".weight_packed", ".weight_scale", _SCALES, {"U8"},
         layouts.floats(".weight_packed", ".weight_scale", 4, 32), _CT + "mxfp4/base.py"),
    _row("int-packed", "INT", ".weight_packed", ".weight_scale .weight_shape", _SCALES, {"I32"},
         layouts.pack_quantized, _CT + "pack_quantized/base.py"),
    _row("modelopt-nvfp4", "NVFP4", ".weight", ".weight_scale:F8_E4M3 .weight_scale_2", _SCALES, {"U8"},
         layouts.floats(".weight", ".weight_scale", 4, 16), _MODELOPT),
    _row("modelopt-mxfp4", "MXFP4", ".weight", ".weight_scale:U8,F8_E8M0", _SCALES, {"U8"},
         layouts.floats(".weight", ".weight_scale", 4, 32), _MODELOPT),
    _row("bitnet", "BitNet", ".weight", ".weight_scale:F32,F16,BF16", (), {"U8"},
         layouts.bitnet, "transformers, integrations/bitnet.py pack_weights", layouts.is_bitnet),
    _row("modelopt-int4", "INT", ".weight", ".weight_scale:F32,F16,BF16", (*_SCALES, ".weight_scale_2"), {"U8"},
         layouts.modelopt_int4, _MODELOPT),
    _row("fp8", "FP8", ".weight", ".weight_scale", _SCALES, FLOAT8,
         layouts.as_stored(".weight"), _CT + "naive_quantized/base.py"),
    _row("fp8", "FP8", ".weight", ".weight_scale_inv", _SCALES, FLOAT8,
         layouts.as_stored(".weight"), "transformers, integrations/finegrained_fp8.py"),
    _row("int8", "INT", ".weight", ".weight_scale", _SCALES, {"I8"},
         layouts.as_stored(".weight"), _CT + "naive_quantized/base.py"),
)  # fmt: skip
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
    *_MATRICES,
    *(fused for row in _MATRICES for fused in _fused(row)),
    _row("mxfp4-blocks", "MXFP4", "_blocks", "_scales", (), {"U8"},
         layouts.mxfp4_blocks, "transformers, integrations/mxfp4.py (gpt-oss)"),
    _row("mxfp4-int8", "MXFP4", ".weight", ".scale:F8_E8M0", (), {"I8", "U8"},
         layouts.floats(".weight", ".scale", 4, 32), "deepseek-ai/DeepSeek-V4, inference/convert.py (experts)"),
    _row("fp8", "FP8", ".weight", ".scale", (), FLOAT8,
         layouts.as_stored(".weight"), "deepseek-ai/DeepSeek-V3 and V4, inference/convert.py"),
    *(
        _row(f"bnb-{kind}", "bitsandbytes", ".weight", f".weight.absmax .weight.quant_state.bitsandbytes__{kind}",
             _BNB_SIDES, {"U8", *FLOATS}, layouts.bnb_4bit, "bitsandbytes, functional.py QuantState.as_dict")
        for kind in ("nf4", "fp4")
    ),
    *(
        _row(f"bnb-{kind}", "bitsandbytes", "", f".absmax .quant_state.bitsandbytes__{kind}",
             (".quant_map", ".nested_absmax", ".nested_quant_map"), {"U8", *FLOATS},
             layouts.bnb_4bit_fused, "transformers, integrations/bitsandbytes.py (fused experts)")
        for kind in ("nf4", "fp4")
    ),
    _row("bnb-int8", "bitsandbytes", ".weight", ".SCB", (".weight_format",), {"I8"},
         layouts.as_stored(".weight"), "bitsandbytes, nn/modules.py Linear8bitLt"),
    *(
        _row("any-precision", "Any-Precision", ".qweight", f".lut{bits}", _TABLES, {"I32"},
             layouts.any_precision, "any-precision-llm, any_precision/modules/AnyPrecisionLinear.py",
             layouts.is_any_precision, running=layouts.any_precision_bits)
        for bits in range(8, 0, -1)
    ),
    _row("aqlm", "AQLM", ".codes", ".codebooks .scales", (), {"I8", "I16", "I32"},
         layouts.aqlm, "aqlm, aqlm/inference.py QuantizedLinear"),
    _row("vptq", "VPTQ", ".indices", ".centroids.weight", _VPTQ_SIDES, {"I16", "U16", "I32"},
         layouts.needs_config, "vptq, vptq/layers/vqlinear.py VQuantLinear", configured=layouts.vptq),
    _row("qtip", "QTIP", ".trellis", ".SU .SV", _QTIP_SIDES, {"I16"},
         layouts.needs_config, "a description of QTIP's layout (docs/formats.md)", configured=layouts.qtip),
    _row("quip", "QuIP#", ".Qidxs", ".SU .SV", (".Wscale", ".codebook_id"), {"I16", "I32", "I64"},
         layouts.from_signs, "quip-sharp, lib/linear/quantized_linear.py"),
    _row("hqq", "HQQ", ".W_q", ".scale .zero .shape:I64", _HQQ_SIDES, {"U8", "I32"},
         layouts.hqq, "hqq, hqq/core/quantize.py HQQLinear.state_dict"),
    _row("quanto-packed", "Quanto", ".weight._data._data", ".weight._scale .weight._shift", _QUANTO_SIDES, {"U8"},
         layouts.quanto_packed, "optimum-quanto, quanto/tensor/weights/qbits.py and packed.py"),
    _row("quanto", "Quanto", ".weight._data", ".weight._scale", _QUANTO_SIDES, {"I8", *FLOAT8},
         layouts.as_stored(".weight._data"), "optimum-quanto, quanto/tensor/weights/qbytes.py"),
    _row("torchao", "torchao", "._weight_qdata", "._weight_scale", ("._weight_zero_point",), {"I8", *FLOAT8},
         layouts.needs_config, "torchao, prototype/safetensors/safetensors_support.py", configured=layouts.torchao),
    # AWQ and GPTQ have the same suffixes; they differ in the packed dimension.
    _row("awq", "AWQ", ".qweight", ".qzeros .scales", (), {"I32"},
         layouts.awq, "AutoAWQ, awq/modules/linear/gemm.py", layouts.is_awq),
    _row("gptq", "GPTQ", ".qweight", ".qzeros .scales", (".g_idx",), {"I32"},
         layouts.gptq, "GPTQModel, nn_modules/qlinear/__init__.py PackableQuantLinear"),
    # Weights that were calibrated but not packed: full precision, with scales.
    _row("unpacked", "full precision", ".weight", ".weight_scale", _SCALES, FLOATS,
         layouts.as_stored(".weight"), _CT + "dense/base.py"),
)  # fmt: skip

FAMILIES = {row.name: row.family for row in PACKINGS}
