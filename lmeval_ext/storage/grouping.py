"""Group the stored tensors of a checkpoint into logical weights, by the tables of `packings` and `roles`.

A new format needs no change here, unless its tensors look like those of another one: then add the distinction to
`_first_match`, as AWQ and GPTQ have it. A packing that is only to be recognised as unknown needs an entry in
`_UNSUPPORTED_SUFFIXES`.
"""

from __future__ import annotations

import re
from math import prod

from lmeval_ext.storage.layouts import Parts, Unclear
from lmeval_ext.storage.packings import PACKINGS, Packing
from lmeval_ext.storage.roles import BUFFERS, role_of
from lmeval_ext.storage.safetensors_header import DTYPE_BITS, FLOAT8, FLOATS
from lmeval_ext.storage.tensors import StoredTensor, Weight

# Last parts of tensor names in packings that have no row: one row per name, and such a tensor makes the figure unknown.
_UNSUPPORTED_SUFFIXES = frozenset({
    "qweight", "compressed", "bitmask", "weight_packed", "q_weight", "trellis", "codes", "codebooks", "codebook",
    "centroids", "indices", "res_centroids", "outlier_centroids", "outlier_indices", "Qidxs", "Qidxs_list", "SU", "SV",
    "tlut", "W_q", "B_24", "meta", "in_tp_codes",
})  # fmt: skip
# A matrix with such a name scales another tensor. If no row has used it, the packing is unknown.
_SIDE_TENSOR = re.compile(r"(scales?|scale_inv|scale_2|zeros|zero_point|absmax|centroids\.weight)$")

_ROWS: dict[str, list[Packing]] = {}
for _row in PACKINGS:
    _ROWS.setdefault(_row.payload, []).append(_row)


def group_tensors(tensors: dict[str, StoredTensor], layers: int | None) -> list[Weight]:
    """Group a checkpoint's tensors into logical weights.

    tensors: all tensors by name. layers: number of layers of the language model, for `role_of`. Each tensor belongs to
    exactly one of the weights. A weight that no row describes has elements None and a `problem`.
    """
    remaining = dict(tensors)
    weights = []
    for name in tensors:
        for payload, rows in _ROWS.items():
            base = name.removesuffix(payload)
            match = _first_match(rows, base, remaining) if base != name and name in remaining else None
            if match:
                row, parts = match
                for part in parts.values():
                    del remaining[part.name]
                weights.append(_packed(row, base, parts, layers))
    return weights + [_unpacked(tensor, layers) for tensor in remaining.values()]


def _first_match(rows: list[Packing], base: str, remaining: dict[str, StoredTensor]) -> tuple[Packing, Parts] | None:
    """Return the first row that describes the tensors of this base name, and these tensors by suffix."""
    for row in rows:
        suffixes = (row.payload, *row.required, *row.optional)
        parts = {suffix: remaining[base + suffix] for suffix in suffixes if base + suffix in remaining}
        complete = all(
            suffix in parts and parts[suffix].dtype in (dtypes or DTYPE_BITS) for suffix, dtypes in row.required.items()
        )
        if complete and parts[row.payload].dtype in row.dtypes and not _is_gptq(row, parts):
            return row, parts
    return None


def _is_gptq(row: Packing, parts: Parts) -> bool:
    """Return whether tensors that fit the AWQ row are GPTQ's: only AWQ packs the output dimension of qweight."""
    return row.name == "awq" and parts[".scales"].shape[-1:] == parts[".qweight"].shape[-1:]


def _packed(row: Packing, base: str, parts: Parts, layers: int | None) -> Weight:
    """Return the weight that the tensors of one row encode."""
    bits = 8 * sum(part.nbytes for part in parts.values())
    try:
        shape = row.shape(parts)
    except (Unclear, ValueError, OSError) as error:
        role = role_of(base, matrix=True, layers=layers)
        return Weight(base, role, bits, None, row.name, f"{base[:200]!r} looks like {row.family}, but {error}")
    dtype = parts[row.payload].dtype if row.name == "unpacked" else row.name
    return Weight(base, role_of(base, len(shape) >= 2, layers), bits, prod(shape), dtype)


def _unpacked(tensor: StoredTensor, layers: int | None) -> Weight:
    """Return the weight of a tensor that no row has used: a dense weight, norm, bias, buffer, or an unknown packing."""
    module = tensor.name.removesuffix(".weight")
    bits = 8 * tensor.nbytes
    last = tensor.name.rsplit(".", 1)[-1]
    side = len(tensor.shape) >= 2 and tensor.numel > 1 and _SIDE_TENSOR.search(tensor.name)
    known = tensor.dtype in FLOATS | FLOAT8 and last not in _UNSUPPORTED_SUFFIXES and not side
    if known or BUFFERS.search(tensor.name):
        matrix = len(tensor.shape) >= 2 and known and not BUFFERS.search(tensor.name)
        return Weight(module, role_of(module, matrix, layers), bits, tensor.numel, tensor.dtype)
    problem = f"{tensor.name[:200]!r} ({tensor.dtype} {list(tensor.shape)}) belongs to no packing known here"
    return Weight(module, role_of(module, True, layers), bits, None, "unknown", problem)
