"""The table of decoders: one row of `FORMATS` per packing and quantization method.

A row recognises a matrix by the names and dtypes of its tensors: a base name with the suffixes `payload` and
`required`. Its function makes the dense weight of these tensors. The layouts are described where they are decoded.

To add a format: a module with its decoder, and a row here with the method (`storage.schemes.method_of`) that it
belongs to. Rows of one method with the same payload are tried in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from lmeval_ext.decoding import anyprecision, aqlm, exl2, exl3, floats, hqq, qtip, vptq
from lmeval_ext.decoding.parts import Matrix, Parts
from lmeval_ext.storage.packings import dtypes_by_suffix
from lmeval_ext.storage.safetensors_header import FLOAT8, FLOATS

Decode = Callable[[Parts, torch.dtype, Matrix], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Format:
    """One row of the table.

    methods: quantization methods whose checkpoints have such matrices. payload: suffix of the tensor with the codes.
    dtypes: allowed dtypes of it, as safetensors names them. required: suffixes of side tensors that must exist, each
    with its allowed dtypes (empty: any). optional: suffixes of side tensors that change the weight where they exist;
    all layers of a checkpoint have the same ones, so one that is lost is noticed. varying: such suffixes that may
    differ from layer to layer. unused: suffixes of tensors about activations or of notes of the quantizer, which do
    not change the weight. multiple: the engine pads both dimensions of a matrix to a multiple of it.
    """

    methods: frozenset[str]
    payload: str
    dtypes: frozenset[str]
    required: Mapping[str, frozenset[str]]
    decode: Decode
    optional: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    multiple: int = 1

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All suffixes that a matrix of this row may have."""
        return (self.payload, *self.required, *self.optional, *self.varying, *self.unused)


def _row(
    methods: str, payload: str, dtypes: str, required: str, decode: Decode, *, optional: str = "", varying: str = "",
    unused: str = "", multiple: int = 1,
) -> Format:  # fmt: skip
    return Format(
        frozenset(methods.split()), payload, frozenset(dtypes.split(",")), dtypes_by_suffix(required), decode,
        tuple(optional.split()), tuple(varying.split()), tuple(unused.split()), multiple,
    )  # fmt: skip


_FLOAT = ",".join(sorted(FLOATS))
_FLOAT8 = ",".join(sorted(FLOAT8))
_MODELOPT = "modelopt modelopt_fp4 modelopt_mxfp8 modelopt_mixed"
# Scales of activations and of the KV cache, which do not change the weight
_ACTIVATIONS = (
    ".input_scale .input_scale_ub .input_global_scale .output_scale .activation_scale .k_scale .v_scale .q_scale "
    ".kv_scale"
)

FORMATS: tuple[Format, ...] = (
    *(
        _row("exl3", ".trellis", "I16", signs, exl3.decode_parts, varying=".mcg .mul1", multiple=exl3.BLOCK)
        for signs in (".suh .svh", ".su .sv", ".suh .sv", ".su .svh")
    ),
    *(
        _row("exl2", ".q_weight", "I32", f".q_scale .q_scale_max .q_groups {order}", exl2.decode_parts,
             unused=f".q_group_map {other}", multiple=32)
        for order, other in ((".q_invperm", ".q_perm"), (".q_perm", ".q_invperm"))
    ),
    _row(f"fp8 {_MODELOPT} compressed-tensors none", ".weight", _FLOAT8, f".weight_scale:{_FLOAT},U8,F8_E8M0",
         floats.fp8, optional=".pre_quant_scale", unused=_ACTIVATIONS),
    _row("fp8", ".weight", _FLOAT8, f".weight_scale_inv:{_FLOAT},U8,F8_E8M0", floats.fp8, unused=_ACTIVATIONS),
    _row(_MODELOPT, ".weight", "U8", f".weight_scale:F8_E4M3 .weight_scale_2:{_FLOAT}", floats.nvfp4,
         optional=".pre_quant_scale", unused=_ACTIVATIONS),
    _row(_MODELOPT, ".weight", "U8", ".weight_scale:U8,F8_E8M0", floats.mxfp4,
         optional=".pre_quant_scale", unused=_ACTIVATIONS),
    _row("compressed-tensors none", ".weight_packed", "U8", f".weight_scale:F8_E4M3 .weight_global_scale:{_FLOAT}",
         floats.nvfp4, unused=_ACTIVATIONS),
    _row("compressed-tensors none", ".weight_packed", "U8", ".weight_scale:U8,F8_E8M0", floats.mxfp4,
         unused=_ACTIVATIONS),
    _row("aqlm", ".codes", "I8,I16,I32", f".codebooks:{_FLOAT} .scales:{_FLOAT}", aqlm.decode),
    _row("vptq", ".indices", "I32,I16,U16", f".centroids.weight:{_FLOAT}", vptq.decode,
         optional=".res_centroids.weight .res_indices .outlier_indices .outlier_centroids.weight .perm .weight_scale "
         ".weight_bias"),
    _row("anyprec", ".qweight", "I32", "", anyprecision.decode,
         optional=" ".join(f".lut{bits}" for bits in range(1, 9))),
    _row("hqq", ".W_q", "U8,I32",
         f".scale:{_FLOAT} .zero:{_FLOAT} .shape:I64 .nbits:I32 .group_size:I32 .axis:I32 .packing:U8", hqq.decode,
         optional=".quant_scale .quant_zero",
         unused=".channel_wise .compute_dtype .encoded_state_dict .offload_meta .optimize .round_zero "
         ".stores_quant_config .unpack_view_dtype .view_as_float"),
    _row("qtip", ".trellis", "I16", f".SU:{_FLOAT} .SV:{_FLOAT}", qtip.decode, optional=".tlut .rcp .tp_rank"),
)  # fmt: skip
METHODS = frozenset(method for row in FORMATS for method in row.methods)


@dataclass(frozen=True)
class Rows:
    """The rows of one method, by payload."""

    by_payload: Mapping[str, tuple[Format, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, method: str) -> Rows:
        rows: dict[str, tuple[Format, ...]] = {}
        for row in FORMATS:
            if method in row.methods:
                rows[row.payload] = (*rows.get(row.payload, ()), row)
        return cls(rows)
