"""Group the stored tensors of a checkpoint into logical weights, by the tables of `packings` and `roles`.

Layers and experts repeat, so tensors are first collected by their name without the layer's number (`_collect`), and
each such group is looked at once. Within a group, layers whose tensors have other forms are told apart (`_alike`).
Experts whose tensors are alike in every layer are one group too: one expert stands for all (`_fold`).

A new format needs no change here. A packing that is only to be recognised as unknown needs an entry in
`_UNSUPPORTED_SUFFIXES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from math import prod

from lmeval_ext.storage.decoder import Facts, find_decoder
from lmeval_ext.storage.layouts import Parts, Unclear
from lmeval_ext.storage.packings import PACKINGS, Packing
from lmeval_ext.storage.pieces import Piece
from lmeval_ext.storage.roles import BUFFERS, CACHE_SCALE, is_routing
from lmeval_ext.storage.safetensors_header import DTYPE_BITS, FLOAT8, FLOATS
from lmeval_ext.storage.tensors import Form, StoredTensor, TensorTable, Weight, cut, joined

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
# All suffixes that the rows of one payload name.
_SUFFIXES = {
    payload: tuple(dict.fromkeys(suffix for row in rows for suffix in (payload, *row.required, *row.optional)))
    for payload, rows in _ROWS.items()
}
# The last component of a name does not give these
_ENDINGS = [payload for payload in _ROWS if not payload.startswith(".") or payload.count(".") > 1]


class _Group:
    """Tensors of one name but for the layer's number, and of one form.

    first: the tensor of the layer `number`. numbers: all layers. experts: the numbers of the experts that this one
    stands for, itself first; [""] for a tensor that is not of a numbered expert.
    """

    __slots__ = ("experts", "first", "number", "numbers")

    def __init__(self, first: StoredTensor, numbers: list[str]) -> None:
        self.first = first
        self.number = numbers[0]
        self.numbers = numbers
        self.experts = [""]


_Forms = dict[Form, _Group]
_Names = dict[str, _Forms]  # by the name below the layer's number (".mlp.up_proj.weight"), or by the full name


def group_tensors(tensors: TensorTable, facts: Facts) -> list[Weight]:
    """Group a checkpoint's tensors into logical weights.

    tensors: all tensors. facts: what config.json says of the decoder. Each tensor belongs to exactly one of the
    weights. A weight that no row describes has elements None and a `problem`.
    """
    pieces = [
        piece
        for stack, names in _collect(tensors).items()
        for piece in (*_packed_pieces(stack, names, tensors, facts), *_plain_pieces(stack, names))
    ]
    return find_decoder(pieces, facts).weights(pieces)


def _collect(tensors: TensorTable) -> dict[str | None, _Names]:
    """Collect the tensors of all files by stack of layers, name below the layer, and form."""
    stacks: dict[str | None, _Names] = {}
    for run in tensors.runs:
        forms = stacks.setdefault(run.stack, {}).setdefault(run.rest, {})
        group = forms.get(run.form)
        if group is None:
            forms[run.form] = _Group(tensors.headers[run.file][run.index], run.numbers.copy())
        else:
            group.numbers += run.numbers
    return {stack: _fold(names) for stack, names in stacks.items()}


def _fold(names: _Names) -> _Names:
    """Return the names of a stack with one expert for all whose tensors have equal names, forms and layers.

    An expert is what lies below a second number: ".mlp.experts.7.up_proj.weight". Names keep their order.
    """
    experts: dict[tuple[str | None, str], list[tuple[str, str, _Forms]]] = {}
    for name, forms in names.items():
        prefix, number, rest = cut(name.removeprefix("."))
        experts.setdefault((prefix, number), []).append((name, rest, forms))
    alike: dict[tuple[object, ...], list[str]] = {}
    others: set[str] = set()
    for (prefix, number), tensors in experts.items():
        if prefix is None:
            continue
        content = [(rest, form, *group.numbers) for _, rest, forms in tensors for form, group in forms.items()]
        numbers = alike.setdefault((prefix, *content), [])
        numbers.append(number)
        if len(numbers) > 1:
            others.update(name for name, _, _ in tensors)
        else:
            for group in chain.from_iterable(forms.values() for _, _, forms in tensors):
                group.experts = numbers
    return {name: forms for name, forms in names.items() if name not in others} if others else names


def _packed_pieces(stack: str | None, names: _Names, tensors: TensorTable, facts: Facts) -> Iterator[Piece]:
    """Yield the weights that a row describes, and take their tensors out of `names`."""
    for name in list(names):
        for payload in _payloads(name):
            runs = names.get(name)
            if not runs:
                break
            base = name[: len(name) - len(payload)]
            parts = {suffix: names[base + suffix] for suffix in _SUFFIXES[payload] if names.get(base + suffix)}
            if len(parts) == 1:
                continue
            experts = next(iter(runs.values())).experts
            for alike, numbers in _alike(stack, base, payload, parts, tensors):
                match = _first_match(_ROWS[payload], alike)
                if match:
                    row, used = match
                    for suffix, tensor in used.items():
                        _take(names, base + suffix, tensor, numbers)
                    yield _packed(row, stack, base, used, numbers, experts, facts)


def _payloads(name: str) -> Iterator[str]:
    """Yield the payload suffixes that a name may end with."""
    last = name[name.rfind(".") :]
    if last in _ROWS:
        yield last
    else:
        yield from (ending for ending in _ENDINGS if name.endswith(ending))


def _alike(
    stack: str | None, base: str, payload: str, parts: dict[str, _Forms], tensors: TensorTable
) -> list[tuple[Parts, list[str]]]:
    """Return the layers whose tensors of a base name have the same suffixes and forms, with the tensors of one."""
    runs = {suffix: next(iter(forms.values())) for suffix, forms in parts.items()}
    numbers = runs[payload].numbers
    if all(len(forms) == 1 for forms in parts.values()) and all(run.numbers == numbers for run in runs.values()):
        return [({suffix: run.first for suffix, run in runs.items()}, numbers)]
    by_number: dict[str, dict[str, Form]] = {}
    for suffix, forms in parts.items():
        for form, run in forms.items():
            for number in run.numbers:
                by_number.setdefault(number, {})[suffix] = form
    alike: dict[tuple[tuple[str, Form], ...], list[str]] = {}
    for number, signature in by_number.items():
        if payload in signature:
            alike.setdefault(tuple(signature.items()), []).append(number)
    return [
        (
            {
                suffix: _one_of(parts[suffix][form], stack, base + suffix, numbers, tensors)
                for suffix, form in signature
            },
            numbers,
        )
        for signature, numbers in alike.items()
    ]


def _one_of(group: _Group, stack: str | None, rest: str, numbers: list[str], tensors: TensorTable) -> StoredTensor:
    """Return the tensor of one of the layers `numbers`."""
    return group.first if group.number in numbers else tensors[joined(stack, numbers[0], rest)]


def _take(names: _Names, name: str, tensor: StoredTensor, numbers: list[str]) -> None:
    """Take the tensors of these layers out of `names`."""
    form = Form(tensor.dtype, tensor.shape, tensor.nbytes)
    run = names[name][form]
    taken = set(numbers)
    left = [number for number in run.numbers if number not in taken] if len(taken) < len(run.numbers) else []
    if left:
        run.numbers = left
        return
    del names[name][form]
    if not names[name]:
        del names[name]


def _first_match(rows: list[Packing], parts: Parts) -> tuple[Packing, Parts] | None:
    """Return the first row that describes some of these tensors, and those tensors by suffix."""
    for row in rows:
        if parts[row.payload].dtype not in row.dtypes:
            continue
        complete = all(
            suffix in parts and parts[suffix].dtype in (dtypes or DTYPE_BITS) for suffix, dtypes in row.required.items()
        )
        if complete and row.fits(parts):
            suffixes = (row.payload, *row.required, *row.optional)
            return row, {suffix: parts[suffix] for suffix in suffixes if suffix in parts}
    return None


def _packed(
    row: Packing, stack: str | None, base: str, parts: Parts, numbers: list[str], experts: list[str], facts: Facts
) -> Piece:
    """Return the weight that the tensors of one row encode, in each of the layers and for each of the experts."""
    bits = 8 * sum(part.nbytes for part in parts.values())
    module = base.removeprefix(".")
    # A fused tensor's payload has the name of the weight; a payload ".weight" belongs to the module.
    module += "" if row.payload.startswith(".") else row.weight
    try:
        if row.configured is None:
            shape = row.shape(parts)
        else:
            bases = [_of_expert(base + row.payload, expert).removesuffix(row.payload) for expert in experts]
            names = {joined(stack, number, name) for number in numbers for name in bases}
            shape = _configured(row, names, parts, facts)
        if row.running and facts.precision is not None:
            bits = row.running(parts, facts.precision)
    except (Unclear, ValueError, OSError) as error:
        name = joined(stack, numbers[0], base)
        problem = f"{name[:200]!r} looks like {row.family}, but {error}"
        return Piece(stack, module, numbers, bits, None, None, row.name, True, problem, len(experts))
    dtype = parts[row.payload].dtype if row.name == "unpacked" else row.name
    return Piece(stack, module, numbers, bits, prod(shape), shape, dtype, len(shape) >= 2, copies=len(experts))


def _of_expert(name: str, expert: str) -> str:
    """Return the name of the same tensor in another expert."""
    prefix, _, rest = cut(name.removeprefix("."))
    return name if prefix is None else "." + joined(prefix, expert, rest)


def _configured(row: Packing, names: set[str], parts: Parts, facts: Facts) -> tuple[int, ...]:
    """Return the logical shape that the config gives these weights. Raises Unclear if it gives several."""
    assert row.configured is not None
    shapes = {row.configured(parts, facts.quantization, name) for name in names}
    if len(shapes) > 1:
        raise Unclear("the quantization config gives layers of equal tensors different shapes")
    return shapes.pop()


def _plain_pieces(stack: str | None, names: _Names) -> Iterator[Piece]:
    """Yield the tensors that no row has used: dense weights, norms, biases, buffers, and unknown packings."""
    for name, runs in names.items():
        for run in runs.values():
            yield _plain(stack, name, run.first, run.numbers, len(run.experts))


def _plain(stack: str | None, name: str, tensor: StoredTensor, numbers: list[str], copies: int) -> Piece:
    module = name.removesuffix(".weight").removeprefix(".")
    bits = 8 * tensor.nbytes
    last = name.rsplit(".", 1)[-1]
    buffer = BUFFERS.search(tensor.name) or CACHE_SCALE.search(tensor.name)
    side = len(tensor.shape) >= 2 and tensor.numel > 1 and _SIDE_TENSOR.search(name)
    known = tensor.dtype in FLOATS | FLOAT8 and last not in _UNSUPPORTED_SUFFIXES and not side
    if known or buffer or is_routing(module):
        matrix = len(tensor.shape) >= 2 and not buffer
        return Piece(stack, module, numbers, bits, tensor.numel, tensor.shape, tensor.dtype, matrix, copies=copies)
    problem = f"{tensor.name[:200]!r} ({tensor.dtype} {list(tensor.shape)}) belongs to no packing known here"
    if last in _UNSUPPORTED_SUFFIXES or side:
        module = module.rpartition(".")[0] or module
    return Piece(stack, module, numbers, bits, None, None, "unknown", True, problem, copies)
