"""From stored shapes to logical shapes: one function per layout, that is, per way of packing a matrix.

Each function takes the tensors of one packed weight, by suffix, and returns the logical shape of the weight. It raises
Unclear where the tensors contradict the layout, because a guess would be worse than no figure. The rows of
`packings.PACKINGS` cite the source that defines each layout.

To add a layout, write such a function: derive the shape from the stored shapes alone, and check with `_expect` every
side tensor whose shape follows from it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from lmeval_ext.storage.rounding import ceil_div
from lmeval_ext.storage.tensors import StoredTensor

Parts = dict[str, StoredTensor]  # the tensors of one packed weight, by suffix
Shape = tuple[int, ...]


class Unclear(Exception):
    """The tensors of a weight contradict its layout. The message names the contradiction."""


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise Unclear(message)


def as_stored(payload: str) -> Callable[[Parts], Shape]:
    """Return the layout of codes that have the shape of the weight, such as int8 and float8."""
    return lambda parts: parts[payload].shape


def floats(payload: str, scale: str, bits: int, group: int) -> Callable[[Parts], Shape]:
    """Return the layout of codes of 4 or 6 bits, packed into bytes, and one scale per `group` weights.

    Codes and scales are packed along the last dimension. Fused experts, [experts, in, out], have the inputs before it.
    """

    def shape(parts: Parts) -> Shape:
        packed, scales = parts[payload].shape, parts[scale].shape
        _expect(len(packed) >= 2, f"{payload[1:] or 'it'} has the shape {list(packed)}, expected a matrix")
        expected = []
        for axis in (-1,) if len(packed) == 2 else (-1, -2):
            inputs = 8 * packed[axis] // bits
            expected.append(_replaced(packed, axis, ceil_div(inputs, group)))
            if scales == expected[-1] and inputs * bits == 8 * packed[axis]:
                return _replaced(packed, axis, inputs)
        raise Unclear(f"{scale[1:]} has the shape {list(scales)}, expected {list(expected[0])} for groups of {group}")

    return shape


def is_mxfp6(parts: Parts) -> bool:
    """Return whether packed codes have 6 bits rather than 4: 24 bytes rather than 16 for each scale."""
    return parts[".weight_packed"].shape[-1:] == tuple(24 * size for size in parts[".weight_scale"].shape[-1:])


def _replaced(shape: Shape, axis: int, size: int) -> Shape:
    sizes = list(shape)
    sizes[axis] = size
    return tuple(sizes)


def mxfp4_blocks(parts: Parts) -> Shape:
    """Blocks [..., in / 32, 16 bytes] of 32 codes with one exponent byte per block; fused experts add a dimension."""
    blocks, scales = parts["_blocks"].shape, parts["_scales"].shape
    _expect(
        len(blocks) >= 3 and blocks[-1] == 16 and scales == blocks[:-1],
        f"blocks {list(blocks)} and scales {list(scales)} are not blocks of 32 values with one scale each",
    )
    return (*blocks[:-2], 32 * blocks[-2])


def pack_quantized(parts: Parts) -> Shape:
    """Codes of 1 to 8 bits in int32; weight_shape holds the logical shape in int64 (or int32).

    A word has 32 // bits whole codes, or, from compressed-tensors 0.20 on, codes lie without gaps across words.
    """
    packed, stored = parts[".weight_packed"].shape, parts[".weight_shape"]
    _expect(stored.dtype in ("I64", "I32") and 2 <= stored.numel <= 3, "weight_shape is not a shape")
    raw = stored.read()
    kind = "q" if stored.dtype == "I64" else "i"
    rows, columns = struct.unpack(f"<{stored.numel}{kind}", raw)[-2:]
    words = {w for bits in range(1, 9) for w in (ceil_div(columns, 32 // bits), ceil_div(columns * bits, 32))}
    fits = len(packed) >= 2 and rows == packed[-2] and columns >= 0 and packed[-1] in words
    _expect(fits, f"weight_shape says {rows} x {columns}, which weight_packed {list(packed)} cannot hold")
    return (*packed[:-2], rows, columns)


def awq(parts: Parts) -> Shape:
    """GEMM layout of AWQ, always 4 bits: qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]."""
    (*experts, rows, columns), (*scaled, groups, out) = _matrices(parts, ".qweight"), _matrices(parts, ".scales")
    _expect(experts == scaled, "qweight and scales are of different experts")
    _expect(out > 0 and 32 * columns == 4 * out, f"qweight of {columns} columns does not hold {out} 4-bit outputs")
    _expect(groups > 0 and rows % groups == 0, f"{groups} groups do not divide {rows} inputs")
    _expect(parts[".qzeros"].shape == (*experts, groups, columns), "qzeros is not one packed row for each group")
    return (*experts, rows, out)


def is_awq(parts: Parts) -> bool:
    """Return whether tensors that AWQ and GPTQ call alike are AWQ's: only AWQ packs the output dimension of qweight."""
    return parts[".scales"].shape[-1:] != parts[".qweight"].shape[-1:]


def gptq(parts: Parts) -> Shape:
    """qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], scales [groups, out], g_idx [in].

    The bits follow from qzeros, the only tensor that is packed along a dimension of known length.
    """
    (*experts, rows, out), (*zeroed, groups, zeros) = _matrices(parts, ".qweight"), _matrices(parts, ".qzeros")
    bits = 32 * zeros / out if out else 0
    _expect(experts == zeroed, "qweight and qzeros are of different experts")
    _expect(bits in (2, 3, 4, 5, 6, 7, 8), f"qzeros of {zeros} columns gives {bits:g} bits for {out} outputs")
    _expect(parts[".scales"].shape == (*experts, groups, out), "scales is not one row for each group")
    inputs = 32 * rows / bits
    _expect(inputs.is_integer(), f"qweight of {rows} rows does not hold whole {bits:g}-bit columns")
    if ".g_idx" in parts:
        length = parts[".g_idx"].shape[-1:]
        _expect(length == (inputs,), f"g_idx has {length} entries for {inputs:g} inputs")
    return (*experts, int(inputs), out)


def bnb_4bit(parts: Parts) -> Shape:
    """Two codes per byte, flattened, and one absmax per block of 32 to 4096 weights (a power of two).

    The shape is (elements, 1): the stored tensors do not have the two dimensions.
    """
    payload, absmax = parts[".weight"], parts[".weight.absmax"]
    elements = 2 * payload.nbytes
    blocks = {ceil_div(elements, 2**power) for power in range(5, 13)}
    _expect(absmax.numel in blocks, f"{absmax.numel} absmax values do not fit {elements} weights")
    return (elements, 1)


def bnb_4bit_fused(parts: Parts) -> Shape:
    """The same for fused experts, whose tensors are not called ".weight"."""
    return bnb_4bit({".weight": parts[""], ".weight.absmax": parts[".absmax"]})


def exl2(parts: Parts) -> Shape:
    """q_weight [rows, out]: columns of mixed bit widths in int32; the permutation has one entry per input."""
    rows, out = _two(parts, ".q_weight")
    inputs = next(parts[key].numel for key in (".q_invperm", ".q_perm") if key in parts)
    _expect(inputs > 0 and 1 <= 32 * rows / inputs <= 8.5, f"q_weight of {rows} rows does not fit {inputs} inputs")
    return (inputs, out)


def exl3(parts: Parts) -> Shape:
    """Trellis of 16 x 16 tiles, int16 [in / 16, out / 16, 16 * bits], and sign vectors for inputs and outputs.

    bits may be half-integer. suh and svh hold one float16 per sign; su and sv of older files hold 16 signs per int16.
    """
    trellis = parts[".trellis"].shape
    _expect(len(trellis) == 3 and trellis[2] > 0 and trellis[2] % 8 == 0, f"trellis has the shape {list(trellis)}")
    sides = {".suh": trellis[0], ".svh": trellis[1], ".su": trellis[0] / 16, ".sv": trellis[1] / 16}
    for key, tiles in sides.items():
        _expect(
            key not in parts or parts[key].numel == 16 * tiles, f"{key[1:]} does not fit the trellis {list(trellis)}"
        )
    return (16 * trellis[0], 16 * trellis[1])


def modelopt_int4(parts: Parts) -> Shape:
    """Two codes a byte along the output dimension."""
    (*experts, rows, columns), (*scaled, scales, groups) = (
        _matrices(parts, ".weight"),
        _matrices(parts, ".weight_scale"),
    )
    fits = experts == scaled and scales == 2 * rows and groups > 0 and columns % groups == 0
    _expect(fits, f"scales {scales} x {groups} do not fit packed codes {rows} x {columns}")
    return (*experts, 2 * rows, columns)


def bitnet(parts: Parts) -> Shape:
    """Four weights per byte, along the outputs: [out / 4, in]."""
    rows, columns = _two(parts, ".weight")
    return (4 * rows, columns)


def is_bitnet(parts: Parts) -> bool:
    """Return whether packed weights have one scale for the matrix, as BitNet's."""
    return parts[".weight_scale"].numel == 1 and parts[".weight"].numel > 1


def aqlm(parts: Parts) -> Shape:
    """codes [out / h, in / g, C], codebooks [C, 2^b, h, g], scales [out / h, 1, 1, 1]."""
    codes, books = parts[".codes"].shape, parts[".codebooks"].shape
    _expect(len(codes) == 3 and len(books) == 4, f"codes {list(codes)} and codebooks {list(books)} are not AQLM's")
    _expect(codes[2] == books[0], f"codes of {codes[2]} codebooks, but codebooks has {books[0]}")
    _expect(
        parts[".scales"].shape == (codes[0], 1, 1, 1),
        f"scales {list(parts['.scales'].shape)} do not fit {codes[0]} rows of blocks",
    )
    return (codes[0] * books[2], codes[1] * books[3])


def needs_config(parts: Parts) -> Shape:
    """The shape function of rows whose logical shape is in the quantization config."""
    raise Unclear("its logical shape is in the quantization config")


def vptq(parts: Parts, config: Mapping[str, Any], name: str) -> Shape:
    """indices [groups, ⌈out / v⌉, words]; in_features and out_features are in the config of the matrix.

    Parameters are in `config_for_layers` by name, in `shared_layer_config` by the name's last part, or, before 19
    November 2024, in the quantization config itself.
    """
    layers, shared = config.get("config_for_layers"), config.get("shared_layer_config")
    found = layers.get(name) if isinstance(layers, dict) else None
    if found is None and isinstance(shared, dict):
        found = shared.get(name.rpartition(".")[2])
    settings = found if found is not None else config.get(name)
    _expect(isinstance(settings, dict), "the quantization config has no parameters for it")
    assert isinstance(settings, dict)
    rows, columns = settings.get("out_features"), settings.get("in_features")
    lengths = settings.get("vector_lens")
    _expect(
        type(rows) is int and type(columns) is int and isinstance(lengths, list) and len(lengths) == 2
        and type(lengths[1]) is int and lengths[1] > 0,
        "its parameters in the quantization config are incomplete",
    )  # fmt: skip
    assert isinstance(rows, int)
    assert isinstance(columns, int)
    assert isinstance(lengths, list)
    indices = parts[".indices"].shape
    _expect(
        len(indices) == 3 and indices[1] == ceil_div(rows, lengths[1]),
        f"indices {list(indices)} do not fit {rows} outputs in vectors of {lengths[1]}",
    )
    for side in (".perm", ".weight_scale", ".weight_bias"):
        _expect(side not in parts or parts[side].shape == (columns,), f"{side[1:]} does not fit {columns} inputs")
    return (rows, columns)


def from_signs(parts: Parts) -> Shape:
    """(length of SV, length of SU): one sign per output and per input."""
    sizes = parts[".SV"].shape, parts[".SU"].shape
    _expect(len(sizes[0]) == len(sizes[1]) == 1, f"SU {list(sizes[1])} and SV {list(sizes[0])} are not vectors")
    return (*sizes[0], *sizes[1])


def qtip(parts: Parts, config: Mapping[str, Any], name: str) -> Shape:
    """trellis [tiles, ⌈td_x td_y K / 16⌉], and one sign per output and per input."""
    rows, columns = from_signs(parts)
    keys = ("td_x", "td_y", "K")
    high, wide, bits = (config.get(key) for key in keys)
    if config.get("K_v_proj") is not None and name.endswith("v_proj"):
        bits = config.get("K_v_proj")
    _expect(all(type(n) is int and n > 0 for n in (high, wide, bits)), f"quip_params does not say {', '.join(keys)}")
    assert isinstance(high, int)
    assert isinstance(wide, int)
    assert isinstance(bits, int)
    expected = (ceil_div(rows, high) * ceil_div(columns, wide), ceil_div(high * wide * bits, 16))
    trellis = parts[".trellis"].shape
    _expect(trellis == expected, f"trellis has the shape {list(trellis)}, expected {list(expected)}")
    return (rows, columns)


def any_precision(parts: Parts) -> Shape:
    """qweight [planes, out, in / 32], lutB [out, 2^B]."""
    _, rows, words = parts[".qweight"].shape
    for side, tensor in parts.items():
        fits = side == ".qweight" or tensor.shape == (rows, 1 << int(side.removeprefix(".lut")))
        _expect(fits, f"{side[1:]} has the shape {list(tensor.shape)}, which does not fit {rows} outputs")
    return (rows, 32 * words)


def is_any_precision(parts: Parts) -> bool:
    """Return whether codes have as many planes as their largest table has bits."""
    shape = parts[".qweight"].shape
    return len(shape) == 3 and f".lut{shape[0]}" in parts


def any_precision_bits(parts: Parts, precision: int) -> int:
    """The bits of the planes and the table that one precision uses."""
    planes = parts[".qweight"].shape[0]
    table = parts.get(f".lut{precision}")
    if table is None or not 0 < precision <= planes:
        raise Unclear(f"it has no precision {precision}")
    return 8 * (parts[".qweight"].nbytes * precision // planes + table.nbytes)


def hqq(parts: Parts) -> Shape:
    """Codes in groups, several in each number of W_q; `shape` holds the logical shape in int64."""
    raw = parts[".shape"].read()
    _expect(parts[".shape"].numel == 2 and len(raw) == 16, "its tensor shape is not a shape")
    rows, columns = struct.unpack("<2q", raw)
    height, width = _two(parts, ".W_q")
    per_number = (1, 2, 4, 8) if parts[".W_q"].dtype == "U8" else (10,)
    # 3-bit codes: ten rows in one row of int32, the last ones padding
    fits = rows > 0 and columns > 0 and width > 0 and any(
        ceil_div(rows * columns, width * count) == height and (count == 10 or rows * columns == height * width * count)
        for count in per_number
    )  # fmt: skip
    _expect(fits, f"shape says {rows} x {columns}, which W_q [{height}, {width}] cannot hold")
    return (rows, columns)


def quanto_packed(parts: Parts) -> Shape:
    """Codes [groups / 2 or / 4, group size] of 4 or 2 bits, two or four rows in one row of bytes; one scale per group.

    The shape is (groups, group size): the stored tensors do not have the two dimensions.
    """
    height, width = _two(parts, ".weight._data._data")
    groups = parts[".weight._scale"].numel
    _expect(
        parts[".weight._shift"].numel == groups and height in (ceil_div(groups, 2), ceil_div(groups, 4)),
        f"{groups} scales do not fit packed codes [{height}, {width}]",
    )
    return (groups, width)


# torchao's weights of one byte each, by the config's `_type` (torchao 0.15, quantization/quant_api.py)
_TORCHAO_BYTES = re.compile(r"^(Int8|Float8|Intx)\w*Config$|^Int8DynamicActivationIntxWeightConfig$")


def torchao(parts: Parts, config: Mapping[str, Any], name: str) -> Shape:
    """One byte per weight, as stored; other types of torchao's pack several, which only the config's type shows."""
    kinds = torchao_types(config)
    _expect(
        bool(kinds) and all(map(_TORCHAO_BYTES.match, kinds)),
        f"torchao's {', '.join(sorted(kinds)) or 'type'} is not known to store one byte per weight",
    )
    return _two(parts, "._weight_qdata")


def torchao_types(config: Mapping[str, Any]) -> set[str]:
    """Names of the configs in `quant_type`: {"Int8WeightOnlyConfig"}."""
    settings = config.get("quant_type")
    entries = settings.values() if isinstance(settings, dict) else ()
    return {str(entry["_type"]) for entry in entries if isinstance(entry, dict) and "_type" in entry}


def _two(parts: Parts, key: str) -> tuple[int, int]:
    """Return the two dimensions of a part. Raises Unclear if it has another number of them."""
    shape = parts[key].shape
    _expect(len(shape) == 2, f"{key[1:]} has the shape {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def _matrices(parts: Parts, key: str) -> Shape:
    """Return the dimensions of a matrix, or of the matrices of fused experts. Raises Unclear for anything else."""
    shape = parts[key].shape
    _expect(len(shape) in (2, 3), f"{key[1:]} has the shape {list(shape)}, expected a matrix")
    return shape
