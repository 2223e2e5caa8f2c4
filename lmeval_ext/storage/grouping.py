"""Group the tensors of a checkpoint into logical weights, by the packing table and the table of roles."""

from __future__ import annotations

import re
from math import prod

from lmeval_ext.storage.layouts import Parts, Unclear
from lmeval_ext.storage.packings import PACKINGS, Packing
from lmeval_ext.storage.roles import BUFFERS, role_of
from lmeval_ext.storage.safetensors_header import DTYPE_BITS, FLOAT8, FLOATS
from lmeval_ext.storage.tensors import StoredTensor, Weight

# Tensors of packings that are recognised but not in the table: their presence makes the figure unknown.
_FOREIGN = frozenset({
    "qweight", "compressed", "bitmask", "weight_packed", "q_weight", "trellis", "codes", "codebooks", "codebook",
    "centroids", "indices", "res_centroids", "outlier_centroids", "outlier_indices", "Qidxs", "Qidxs_list", "SU", "SV",
    "tlut", "W_q", "B_24", "meta", "in_tp_codes",
})  # fmt: skip
# A matrix of such a name scales another tensor: left over, it shows a packing that no row explains.
_SIDE = re.compile(r"(scales?|scale_inv|scale_2|zeros|zero_point|absmax|centroids\.weight)$")

_ROWS: dict[str, list[Packing]] = {}
for _row in PACKINGS:
    _ROWS.setdefault(_row.payload, []).append(_row)


def find(tensors: dict[str, StoredTensor], layers: int | None) -> list[Weight]:
    """Group a checkpoint's tensors into logical weights.

    tensors: all tensors by name; layers: number of layers of the language model, for `role_of`. Every tensor ends up
    in exactly one weight. A weight that no row explains has elements None and a `problem`.
    """
    left = dict(tensors)
    weights = []
    for name in tensors:
        for payload, rows in _ROWS.items():
            base = name.removesuffix(payload)
            found = _first(rows, base, left) if base != name and name in left else None
            if found:
                row, parts = found
                for part in parts.values():
                    del left[part.name]
                weights.append(_packed(row, base, parts, layers))
    return weights + [_plain(tensor, layers) for tensor in left.values()]


def _first(rows: list[Packing], base: str, left: dict[str, StoredTensor]) -> tuple[Packing, Parts] | None:
    """The first row that explains the tensors of this base name, and its parts by suffix."""
    for row in rows:
        suffixes = (row.payload, *row.required, *row.optional)
        parts = {suffix: left[base + suffix] for suffix in suffixes if base + suffix in left}
        complete = all(
            suffix in parts and parts[suffix].dtype in (dtypes or DTYPE_BITS) for suffix, dtypes in row.required.items()
        )
        if complete and parts[row.payload].dtype in row.dtypes and not _is_gptq(row, parts):
            return row, parts
    return None


def _is_gptq(row: Packing, parts: Parts) -> bool:
    """AWQ packs the output dimension of qweight, GPTQ leaves it as long as that of the scales."""
    return row.name == "awq" and parts[".scales"].shape[-1:] == parts[".qweight"].shape[-1:]


def _packed(row: Packing, base: str, parts: Parts, layers: int | None) -> Weight:
    bits = 8 * sum(part.nbytes for part in parts.values())
    try:
        shape = row.shape(parts)
    except (Unclear, ValueError, OSError) as error:
        role = role_of(base, matrix=True, layers=layers)
        return Weight(base, role, bits, None, row.name, f"{base[:200]!r} looks like {row.family}, but {error}")
    dtype = parts[row.payload].dtype if row.name == "unpacked" else row.name
    return Weight(base, role_of(base, len(shape) >= 2, layers), bits, prod(shape), dtype)


def _plain(tensor: StoredTensor, layers: int | None) -> Weight:
    """A tensor that stands for itself: dense weights, norms, biases, buffers."""
    module = tensor.name.removesuffix(".weight")
    bits = 8 * tensor.nbytes
    last = tensor.name.rsplit(".", 1)[-1]
    side = len(tensor.shape) >= 2 and tensor.numel > 1 and _SIDE.search(tensor.name)
    known = tensor.dtype in FLOATS | FLOAT8 and last not in _FOREIGN and not side
    if known or BUFFERS.search(tensor.name):
        matrix = len(tensor.shape) >= 2 and known and not BUFFERS.search(tensor.name)
        return Weight(module, role_of(module, matrix, layers), bits, tensor.numel, tensor.dtype)
    problem = f"{tensor.name[:200]!r} ({tensor.dtype} {list(tensor.shape)}) belongs to no packing known here"
    return Weight(module, role_of(module, True, layers), bits, None, "unknown", problem)
