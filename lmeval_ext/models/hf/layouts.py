"""Which stored tensors Transformers needs for one quantized weight: one row per layout and quantization method.

Transformers does not check this itself: it joins a weight with whatever side tensors it finds, so that FP8 codes
without their scale become the weight as they are. Rows were compared with the quantizers of transformers 5.19 and 5.24
(`transformers/quantizers`); a method without rows is checked by names alone (checks.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lmeval_ext.storage.packings import dtypes_by_suffix
from lmeval_ext.storage.safetensors_header import FLOAT8, FLOATS
from lmeval_ext.storage.tensors import StoredTensor

DENSE = FLOATS | {"BOOL"}  # dtypes that a dense weight or a mask may have


@dataclass(frozen=True)
class Layout:
    """The tensors of one quantized weight.

    payload: suffix of the tensor with the codes. dtypes: its dtypes in a header. required: suffixes of side tensors
    without which the weight means nothing, each with its dtypes (empty: any). optional: suffixes of others.
    """

    payload: str
    dtypes: frozenset[str]
    required: dict[str, frozenset[str]]
    optional: tuple[str, ...] = ()


def _row(payload: str, required: str, optional: str = "") -> Layout:
    ((name, dtypes),) = dtypes_by_suffix(payload).items()
    return Layout(name, dtypes, dtypes_by_suffix(required), tuple(optional.split()))


_F8 = ",".join(sorted(FLOAT8))
_CT = (
    ".weight_zero_point .weight_g_idx .weight_shape .weight_global_scale .input_scale .input_zero_point "
    ".input_global_scale .output_scale .output_zero_point"
)
_BNB = ".weight.quant_map .weight.quant_state.bitsandbytes__{kind}"
_NESTED = ".weight.nested_absmax .weight.nested_quant_map"
_FP8 = (
    _row(f".weight:{_F8},I8,U8", ".weight_scale_inv", ".activation_scale"),
    _row(f".weight:{_F8},I8,U8", ".scale"),  # DeepSeek-V3 and V4: Transformers renames it
    _row(f"_proj:{_F8},I8,U8", "_proj_scale_inv", "_proj_activation_scale"),  # fused experts
)
_GROUPED = (
    _row(".qweight:I32,I16", ".qzeros .scales", ".g_idx"),
)  # fmt: skip

LAYOUTS: dict[str | None, tuple[Layout, ...]] = {
    None: (),
    "compressed-tensors": (
        _row(".weight_packed:U8", ".weight_scale:F8_E4M3 .weight_global_scale", _CT),
        _row(".weight_packed:U8", ".weight_scale:U8,F8_E8M0", _CT),
        _row(".weight_packed:I32", ".weight_scale .weight_shape", _CT),
        _row(f".weight:{_F8},I8", ".weight_scale", _CT),
    ),
    "fp8": _FP8,
    "mxfp8": _FP8,
    "fbgemm_fp8": (_row(f".weight:{_F8}", ".weight_scale", ".input_scale_ub"),),
    "gptq": _GROUPED,
    "awq": _GROUPED,
    "auto-round": _GROUPED,
    "bitsandbytes": (
        *(
            _row(f".weight:U8,{','.join(sorted(FLOATS))}", f".weight.absmax:{absmax} {_BNB.format(kind=kind)} {nested}")
            for kind in ("nf4", "fp4")
            for absmax, nested in (("F32", ""), ("U8", _NESTED))
        ),
        _row(".weight:I8", ".SCB", ".weight_format"),
    ),
    "mxfp4": (_row("_blocks:U8", "_scales:U8"),),
    "bitnet": (_row(".weight:U8", ".weight_scale"),),
}

# Whose weights Transformers joins with all side tensors of the same base name, whatever they are
JOINING = ("fp8", "mxfp8", "bitsandbytes")

# Last parts of the names of tensors that quantize another one
SIDE = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_2|scale_ub|zeros?|zero_points?|qzeros|biases|absmax|quant_map|SCB|g_idx|perm|"
    r"quant_state\..*|weight_format|weight_shape|codes|codebooks?|centroids(\.weight)?|indices|invperm|"
    r"q_?weight|weight_packed|blocks|trellis|su[hv]|s[uv]h?|mcg|mul1|SU|SV|tlut|Qidxs|W_q|zero|lut\d*)$"
)
# Scales of a layer's inputs or outputs: without them the weight is right, and activations are not quantized
ACTIVATION = re.compile(r"(^|[._])((input|output|act)_(global_)?(scale|zero_point)(_ub)?|activation_scale)$")


def codes_without_sides(tensors: Mapping[str, StoredTensor], method: str | None) -> dict[str, list[str]]:
    """Tensors that hold codes and lack the side tensors that their method needs: {name: the names that it lacks}.

    The list is empty where no layout of the method has such a tensor at all. Only tensors of a dtype that no dense
    weight has are looked at. A method without rows gives {}.
    """
    rows = LAYOUTS.get(method)
    if rows is None:
        return {}
    complete: set[str] = set()
    lacking: dict[str, list[str]] = {}
    for row in rows:
        for name in tensors:
            if name in complete or not name.endswith(row.payload) or tensors[name].dtype not in row.dtypes:
                continue
            base = name[: len(name) - len(row.payload)]
            lacks = [
                base + suffix
                for suffix, dtypes in row.required.items()
                if base + suffix not in tensors or (dtypes and tensors[base + suffix].dtype not in dtypes)
            ]
            if not lacks:
                complete.add(name)
                complete.update(base + suffix for suffix in (*row.required, *row.optional))
            elif len(lacks) < len(row.required) or name not in lacking:
                lacking[name] = min(lacks, lacking.get(name, lacks), key=len)
    return {
        name: lacking.get(name, [])
        for name in tensors
        if name not in complete and tensors[name].dtype not in DENSE and len(tensors[name].shape) >= 1
    }


def sides_of_dense_weights(tensors: Mapping[str, StoredTensor], method: str | None) -> list[str]:
    """Side tensors beside a weight that is stored dense: Transformers would multiply the weight by such a scale.

    Of the methods in `JOINING` alone: of others, it reports such a tensor as unused.
    """
    found = []
    for row in LAYOUTS.get(method, ()) if method in JOINING else ():
        for name, tensor in tensors.items():
            if name.endswith(row.payload) and tensor.dtype in DENSE:
                base = name[: len(name) - len(row.payload)]
                sides = [base + suffix for suffix in row.required if base + suffix in tensors]
                if len(sides) < len(row.required) or tensor.dtype not in row.dtypes:
                    found += sides
    return found


def payloads(tensors: Mapping[str, StoredTensor], method: str | None) -> list[str]:
    """Names of the tensors with codes, without their suffix: the modules that they belong to."""
    rows = LAYOUTS.get(method) or ()
    return [
        name[: -len(row.payload)]
        for name, tensor in tensors.items()
        for row in rows
        if name.endswith(row.payload) and tensor.dtype in row.dtypes - DENSE
    ]
